"""Two processes with two devices each train as one process with four, and each reads the other's checkpoints."""

import contextlib
import os
import pathlib
import shutil
import signal
import socket
import subprocess
import sys
import time

import jax
import numpy as np
import pytest
from tiny_run import MODELS, make_clips, numbers, settings

from elastic import checkpoints
from elastic.distributed.hosts import Hosts, host_share, local_rows
from elastic.distributed.mesh import make_mesh
from elastic.training import loop
from elastic.training.loop import train

ROOT = pathlib.Path(__file__).resolve().parents[2]
MESHES = ("2,2,1,1", "1,1,2,2")


@pytest.fixture(scope="module", autouse=True)
def four_devices():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "make_mesh", lambda dim: make_mesh(dim, jax.devices()[:4]))
        yield


@pytest.fixture(scope="module")
def clips(tmp_path_factory):
    return make_clips(tmp_path_factory.mktemp("clips"))


def options(clips, folder, mesh_dim, **changes):
    common = dict(mesh_dim=mesh_dim, data=dict(batch_size=4), save=dict(freq=2, milestone_freq=4))
    return settings(clips, folder, **(common | dict(total_steps=4) | changes))


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        return probe.getsockname()[1]


@contextlib.contextmanager
def two_processes(command_of, **environment):
    """Runs `command_of(process)` twice, and leaves none behind."""
    common = {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)}
    environment = os.environ | common | environment
    running = [
        subprocess.Popen(
            [sys.executable, *command_of(process)],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for process in range(2)
    ]
    try:
        yield running
    finally:
        for process in running:
            process.kill()


@pytest.fixture(scope="module")
def joined(clips, tmp_path_factory):
    """The folders of runs on two processes, one for each mesh."""
    folder = tmp_path_factory.mktemp("joined")
    worker, port = ROOT / "tests" / "support" / "host_worker.py", free_port()
    with two_processes(lambda n: [worker, str(n), str(port), clips, folder, *MESHES]) as running:
        said = [process.communicate(timeout=900)[0] for process in running]
    assert [process.returncode for process in running] == [0, 0], "\n".join(said)[-4000:]
    return folder


@pytest.fixture(scope="module")
def alone(clips, tmp_path_factory):
    """The folder of six steps of one process with four devices, and the state after them."""
    folder = tmp_path_factory.mktemp("alone")
    return folder, train(options(clips, folder, MESHES[1], total_steps=6), MODELS["vae"]).state


@pytest.mark.slow
@pytest.mark.parametrize("mesh_dim", MESHES)
def test_two_processes_have_the_losses_and_parameters_of_one(joined, alone, mesh_dim):
    ours, theirs = numbers(alone[0]), numbers(joined / mesh_dim)
    assert [record["step"] for record in theirs] == [1, 2, 3, 4]
    for one, two in zip(ours[:4], theirs, strict=True):
        for name in ("loss", "recon_loss", "gradient_norm", "kept_tokens", "epoch"):
            assert two[name] == pytest.approx(one[name], rel=1e-5), name
    milestone = pathlib.Path("milestones", "00000004")
    assert sorted(path.name for path in (joined / mesh_dim / milestone).iterdir()) == [
        "config.json",
        "data_position.json",
        "params",
        "streaming_train_state",
    ]
    last, written, params = (
        checkpoints.load_params(folder, MODELS["vae"])
        for folder in (joined / mesh_dim / "pretrained", joined / mesh_dim / milestone, alone[0] / milestone)
    )  # fmt: skip
    jax.tree.map(np.testing.assert_array_equal, last, written)
    for a, b in zip(jax.tree.leaves(written), jax.tree.leaves(params), strict=True):
        assert np.abs(a - b).max() < 1e-4


@pytest.mark.slow
def test_one_process_goes_on_where_two_stopped(clips, tmp_path, joined, alone):
    shutil.copytree(joined / MESHES[0], tmp_path / "run")
    state = train(options(clips, tmp_path / "run", MESHES[1], total_steps=6), MODELS["vae"]).state
    assert int(state.step) == 6
    for a, b in zip(numbers(tmp_path / "run"), numbers(alone[0]), strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-5)
    for a, b in zip(jax.tree.leaves(state.params), jax.tree.leaves(alone[1].params), strict=True):
        assert np.abs(np.asarray(a) - np.asarray(b)).max() < 1e-4


@pytest.mark.slow
def test_a_signal_to_one_process_stops_both_at_the_same_step_and_both_save(clips, tmp_path):
    """A Ctrl-C becomes the SIGTERM of a pod's scheduler, and the process that got no signal stops too."""
    port = free_port()

    def command(process):
        return [
            ROOT / "scripts" / "train.py", f"--train_dataset.vision_dataset.path={clips}",
            "--train_dataset.vision_dataset.batch_size=2", "--train_dataset.vision_dataset.workers=0",
            "--mesh_dim=2,1,1,1", "--total_steps=100000", "--log_freq=1", "--save_model_freq=100000",
            "--load_elastic_config=debug", f"--update_elastic_config={MODELS['vae'].to_json_dict()}",
            f"--logger.output_dir={tmp_path}", "--jax_distributed.initialize_jax_distributed=True",
            f"--jax_distributed.coordinator_address=localhost:{port}",
            "--jax_distributed.num_processes=2", f"--jax_distributed.process_id={process}",
        ]  # fmt: skip

    metrics, until = tmp_path / "metrics.jsonl", time.monotonic() + 200
    with two_processes(command, JAX_NUM_CPU_DEVICES="1") as running:
        while not (metrics.exists() and metrics.read_text().count("\n") >= 2):
            assert all(process.poll() is None for process in running) and time.monotonic() < until
            time.sleep(0.1)
        running[1].send_signal(signal.SIGINT)
        said = [process.communicate(timeout=100)[0] for process in running]
    assert [process.returncode for process in running] == [143, 143], "\n".join(said)[-4000:]
    (saved,) = (tmp_path / "checkpoints").iterdir()
    assert all(f"Stopped and saved at step {int(saved.name)};" in text for text in said)


@pytest.mark.parametrize(
    ("mesh_dim", "rows"), [("2,4,1,1", {1}), ("1,2,2,2", {4}), ("1,1,2,4", {8}), ("8,1,1,1", {1})]
)
def test_a_device_holds_its_rows_and_all_devices_hold_all(mesh_dim, rows):
    from jax.sharding import NamedSharding
    from jax.sharding import PartitionSpec as P

    sharding = NamedSharding(make_mesh(mesh_dim), P(("dp", "fsdp"), "sp"))
    parts = [
        range(*index[0].indices(8))
        for index in sharding.addressable_devices_indices_map((8, 4)).values()
    ]
    assert {len(part) for part in parts} == rows
    assert local_rows(sharding, (8, 4)) == list(range(8))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (dict(num_processes=2), "initialize_jax_distributed=True"),
        (dict(initialize_jax_distributed=True, num_processes=2), "coordinator_address=HOST:PORT"),
        (
            dict(
                initialize_jax_distributed=True,
                coordinator_address="localhost:1",
                num_processes=2,
                process_id=2,
            ),
            "process_id=2 must lie in 0 to 1",
        ),
        (dict(initialize_jax_distributed=True, local_device_ids="a"), "local_device_ids='a'"),
        (dict(independent=True, num_processes=2, process_id=2), "process_id=2 must lie in 0 to 1"),
        (dict(independent=True, coordinator_address="a:1", num_processes=2), "only share work"),
    ],
)
def test_hosts_that_cannot_find_each_other_are_refused(given, message):
    with pytest.raises(ValueError, match=message):
        Hosts(**given)


def test_processes_that_only_share_work_need_no_coordinator():
    assert host_share(Hosts(independent=True, num_processes=3, process_id=2)) == (2, 3)
    assert host_share(Hosts(independent=True)) == (0, 1)

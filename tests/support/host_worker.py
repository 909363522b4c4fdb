"""One process of a run on several: python host_worker.py PROCESS PORT CLIPS FOLDER MESH..."""

import pathlib
import sys

sys.path[:0] = [str(pathlib.Path(__file__).resolve().parents[2])]

import jax  # noqa: E402

jax.config.update("jax_num_cpu_devices", 2)

from tiny_run import MODELS, settings  # noqa: E402

from elastic.distributed.hosts import Hosts, join_hosts  # noqa: E402
from elastic.training.loop import train  # noqa: E402

process, port, clips, folder, *meshes = sys.argv[1:]
join_hosts(
    Hosts(
        initialize_jax_distributed=True,
        coordinator_address=f"localhost:{port}",
        num_processes=2,
        process_id=int(process),
    )
)
for mesh_dim in meshes:
    config = settings(
        pathlib.Path(clips),
        pathlib.Path(folder, mesh_dim),
        mesh_dim=mesh_dim,
        total_steps=4,
        data=dict(batch_size=4),
        save=dict(freq=2, milestone_freq=4),
    )
    train(config, MODELS["vae"])

"""Tokenizes a data set into shards, in one process or many; `--help` lists the flags."""

import dataclasses
import functools
import pathlib
from typing import TYPE_CHECKING

from elastic.cli import app
from elastic.cli.flags import ENGINE
from elastic.distributed.job_share import share_of_job
from elastic.io.names import check_repository

if TYPE_CHECKING:
    from elastic.distributed.hosts import Hosts


def tokenize(flags: app.Values) -> int:
    """Loads the model, does this process's shards, prints a table when all are finished."""
    app.check_target(flags)
    if flags["files_per_shard"] < 1:
        raise ValueError(f"--files_per_shard={flags['files_per_shard']} must be at least 1.")
    from elastic.media.inputs import check_input

    check_input(flags["input_path"])  # known before anything heavy is imported
    if flags["push"]:
        check_repository(flags["push"], argument="--push")
    # Known before anything heavy is imported, where it does not depend on the model.
    engine = ENGINE.read(flags)
    options = app.encode_options(flags) if app.has_target(flags) else None

    from elastic.distributed import cpu_devices
    from elastic.distributed.hosts import Hosts, host_share, join_hosts

    hosts = Hosts(**flags.under("jax_distributed"), independent=True)
    if engine.engine == "ray":
        _check_alone(hosts)
    else:
        hosts = _with_share_of_job(hosts)
    cpu_devices.set_up_cpu()
    join_hosts(hosts)

    from elastic.pipeline import dataset, dataset_summary, load_model

    spec, folder = flags["load_checkpoint"], pathlib.Path(flags["output_folder"])
    inputs = dataset.list_inputs(flags["input_path"], folder)
    config = load_model.model_config(
        spec, preset=flags["load_elastic_config"], changes=flags["update_elastic_config"]
    )
    options = options or app.encode_options(flags, config.recommended_thresholds)
    load = functools.partial(
        load_model.load_tokenizer,
        spec,
        config,
        options,
        mesh_dim=flags["mesh_dim"],
        batch=flags["batch"],
        search_width=flags["search_width"],
        dtype=flags["dtype"],
        window_blocks=flags["max_blocks_per_chunk"] or None,
        context=flags["context"],
    )
    shared = dict(
        files_per_shard=flags["files_per_shard"], append=flags["append"], batch=flags["batch"]
    )
    if engine.engine == "ray":
        from elastic.pipeline import ray_engine

        outcome = ray_engine.tokenize_dataset(
            load, inputs, folder, options, engine=engine, verbose=flags["verbose"], **shared
        )
    else:
        index, count = host_share(hosts)
        tokenizer = load()
        load_model.log_model(tokenizer)
        app.log.info("%d files; this is process %d of %d.", len(inputs), index, count)
        outcome = dataset.tokenize_dataset(
            tokenizer,
            inputs,
            folder,
            options,
            process_index=index,
            process_count=count,
            # The others are lost when the first one goes, whom they have joined.
            wait=hosts.initialize_jax_distributed,
            **shared,
        )
    if outcome.summary is not None:
        print(dataset_summary.describe(outcome.summary, folder))
        if not outcome.summary["totals"]["clips"]:
            raise ValueError(
                f"None of the {len(inputs)} files could be read; {folder / dataset_summary.BAD} says why."
            )
        if flags["push"] and host_share(hosts)[0] == 0:
            from elastic.pipeline.push import push_dataset

            print(push_dataset(folder, flags["push"], private=flags["push_private"]))
    return 0


def _check_alone(hosts: "Hosts") -> None:
    """Refuses a share of the files beside Ray, whose actors share them."""
    if hosts.initialize_jax_distributed or (hosts.num_processes, hosts.process_id) != (1, 0):
        raise ValueError(
            "--engine=ray shares the files among its actors, which --ray_actors= counts; leave out --jax_distributed."
        )


def _with_share_of_job(hosts: "Hosts") -> "Hosts":
    """The same, or where no flag says it, with the share that SLURM or Kubernetes gives to this process."""
    if hosts.initialize_jax_distributed or (hosts.num_processes, hosts.process_id) != (1, 0):
        return hosts
    share = share_of_job()
    if share is None:
        return hosts
    app.log.info(
        "Process %d of %d, as %s say; --jax_distributed.num_processes and process_id win.",
        share.process_id, share.num_processes, share.source,
    )  # fmt: skip
    return dataclasses.replace(
        hosts, num_processes=share.num_processes, process_id=share.process_id
    )

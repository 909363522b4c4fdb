"""Tokenizes a data set into shards, in one process or many; `--help` lists the flags."""

import dataclasses
import pathlib
from typing import TYPE_CHECKING

from elastic.cli import app
from elastic.distributed.job_share import share_of_job

if TYPE_CHECKING:
    from elastic.distributed.hosts import Hosts


def tokenize(flags: app.Values) -> int:
    """Loads the model, does this process's shards, prints a table when all are finished."""
    app.check_target(flags)
    if flags["files_per_shard"] < 1:
        raise ValueError(f"--files_per_shard={flags['files_per_shard']} must be at least 1.")
    from elastic.media.inputs import check_input

    check_input(flags["input_path"])  # known before anything heavy is imported
    # Known before anything heavy is imported, where it does not depend on the model.
    options = app.encode_options(flags) if app.has_target(flags) else None

    from elastic.distributed import cpu_devices, mesh
    from elastic.distributed.hosts import Hosts, host_share, join_hosts

    hosts = _with_share_of_job(Hosts(**flags.under("jax_distributed"), independent=True))
    cpu_devices.set_up_cpu()
    join_hosts(hosts)

    import jax

    from elastic.pipeline import dataset, dataset_summary, load_model, tokenize_files

    spec, folder = flags["load_checkpoint"], pathlib.Path(flags["output_folder"])
    inputs = dataset.list_inputs(flags["input_path"], folder)
    config = load_model.model_config(
        spec, preset=flags["load_elastic_config"], changes=flags["update_elastic_config"]
    )
    options = options or app.encode_options(flags, config.recommended_thresholds)
    devices = mesh.make_mesh(flags["mesh_dim"], jax.local_devices())
    load_model.check_run(
        options, config, devices, width=flags["search_width"], batch=flags["batch"]
    )
    index, count = host_share(hosts)
    tokenizer = tokenize_files.ElasticTokenizer.from_pretrained(
        spec,
        config=config,
        dtype=flags["dtype"],
        mesh=devices,
        window_blocks=flags["max_blocks_per_chunk"] or None,
        context=flags["context"],
        search_width=flags["search_width"],
    )
    load_model.log_model(tokenizer)
    app.log.info("%d files; this is process %d of %d.", len(inputs), index, count)
    outcome = dataset.tokenize_dataset(
        tokenizer,
        inputs,
        folder,
        options,
        files_per_shard=flags["files_per_shard"],
        append=flags["append"],
        batch=flags["batch"],
        process_index=index,
        process_count=count,
        # The others are lost when the first one goes, whom they have joined.
        wait=hosts.initialize_jax_distributed,
    )
    if outcome.summary is not None:
        print(dataset_summary.describe(outcome.summary, folder))
        if not outcome.summary["totals"]["clips"]:
            raise ValueError(
                f"None of the {len(inputs)} files could be read; {folder / dataset_summary.BAD} says why."
            )
    return 0


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

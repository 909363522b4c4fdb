"""Tokenizes an image, a video or a folder of them; `--help` lists the flags."""

from elastic.cli import app


def tokenize(flags: app.Values) -> int:
    """Loads the model, tokenizes the input, prints a table for each file."""
    app.check_target(flags)
    from elastic.media.inputs import check_input

    check_input(flags["input_path"])  # known before anything heavy is imported
    # Known before anything heavy is imported, where it does not depend on the model.
    options = app.encode_options(flags) if app.has_target(flags) else None

    from elastic.distributed import cpu_devices, mesh
    from elastic.pipeline import load_model
    from elastic.pipeline import tokenize_files as runs

    cpu_devices.set_up_cpu()
    inputs = runs.find_inputs(flags["input_path"], output_folder=flags["output_folder"])
    config = load_model.model_config(
        flags["load_checkpoint"],
        preset=flags["load_elastic_config"],
        changes=flags["update_elastic_config"],
    )
    options = options or app.encode_options(flags, config.recommended_thresholds)
    devices = mesh.make_mesh(flags["mesh_dim"])
    several = len(inputs) > 1 or options.fit == "tile"
    batch = flags["batch"] if several else min(flags["batch"], 1)
    load_model.check_run(options, config, devices, width=flags["search_width"], batch=batch)
    tokenizer = runs.ElasticTokenizer.from_pretrained(
        flags["load_checkpoint"],
        config=config,
        dtype=flags["dtype"],
        mesh=devices,
        window_blocks=flags["max_blocks_per_chunk"] or None,
        context=flags["context"],
        search_width=flags["search_width"],
    )
    load_model.log_model(tokenizer)
    _, bad = runs.tokenize_files(
        tokenizer,
        inputs,
        flags["output_folder"],
        options,
        overwrite=flags["overwrite"],
        resume=flags["resume"],
        viz=flags["viz"],
        batch=flags["batch"],
    )
    if bad:
        raise ValueError(
            f"{len(bad)} of {len(inputs)} files could not be read; the first is {bad[0]}."
        )
    return 0

"""Turns a token file back into video or a picture; `--help` lists the flags."""

from elastic.cli import app


def decode(flags: app.Values) -> int:
    """Loads tokens and model, and writes the clip."""
    from elastic.distributed import cpu_devices
    from elastic.pipeline import decode_files, load_model, tokenize_files

    tokens = decode_files.open_tokens(flags["input_path"])
    output = flags["output_path"] or decode_files.default_output(flags["input_path"], tokens)
    decode_files.check_decoded_name(output, tokens)
    cpu_devices.set_up_cpu()
    spec = flags["load_checkpoint"] or decode_files.model_of(tokens)
    config = load_model.model_config(
        spec, preset=flags["load_elastic_config"], changes=flags["update_elastic_config"]
    )
    decode_files.check_same_model(tokens, config, spec)
    tokenizer = tokenize_files.ElasticTokenizer.from_pretrained(
        spec,
        config=config,
        dtype=flags["dtype"],
        mesh_dim=flags["mesh_dim"],
        window_blocks=tokens.window_blocks,
        model_id=flags["load_checkpoint"] or tokens.model_id,
    )
    load_model.log_model(tokenizer)
    decode_files.decode_to_file(
        tokenizer, tokens, output, follow=flags["follow"], batch=flags["batch"]
    )
    app.log.info("%s -> %s", tokens, output)
    return 0

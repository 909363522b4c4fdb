"""Turns a token file back into video or a picture; `--help` lists the flags."""

import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

from elastic import cli
from elastic.cli_flags import DECODE


def decode(flags: cli.Values) -> int:
    """Loads tokens and model, and writes the clip."""
    from elastic import mesh, runs

    tokens = runs.open_tokens(flags["input_path"])
    runs.check_decoded_name(flags["output_path"], tokens)
    mesh.set_up_cpu()
    spec = flags["load_checkpoint"] or runs.model_of(tokens)
    config = runs.model_config(
        spec, preset=flags["load_elastic_config"], changes=flags["update_elastic_config"]
    )
    runs.check_same_model(tokens, config, spec)
    tokenizer = runs.ElasticTokenizer.from_pretrained(
        spec,
        config=config,
        dtype=flags["dtype"],
        mesh_dim=flags["mesh_dim"],
        window_blocks=tokens.window_blocks,
    )
    cli.log.info("%s", runs.describe(tokenizer))
    runs.decode_to_file(tokenizer, tokens, flags["output_path"], follow=flags["follow"])
    cli.log.info("%s -> %s", tokens, flags["output_path"])
    return 0


if __name__ == "__main__":
    sys.exit(cli.run(DECODE, decode))

"""Tokenizes an image, a video or a folder of them; `--help` lists the flags."""

import pathlib
import sys

# So that the documented command runs wherever the requirements are installed.
sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

from elastic import cli
from elastic.cli_flags import INFERENCE


def tokenize(flags: cli.Values) -> int:
    """Loads the model, tokenizes the input, prints a table for each file."""
    targets = ("threshold", "psnr", "n_codes", "avg_tokens", "bitrate")
    if flags["threshold"] is None and not any(flags[name] for name in targets):
        raise ValueError(
            "Give --threshold=ERROR (such as 0.003) or --psnr=DB for a quality that every block reaches, --n_codes=N for a "
            "fixed length, or --avg_tokens=N or --bitrate=KBIT for a budget that the blocks share."
        )
    if not pathlib.Path(flags["input_path"]).exists():  # known before anything heavy is imported
        raise ValueError(f"There is no file {flags['input_path']!r}; check --input_path.")

    from elastic import mesh, runs

    mesh.use_all_cpu_cores()
    inputs = runs.find_inputs(flags["input_path"], output_folder=flags["output_folder"])
    config = runs.model_config(
        flags["load_checkpoint"],
        preset=flags["load_elastic_config"],
        changes=flags["update_elastic_config"],
    )
    runs.check_resolution(flags["resolution"], config)
    tokenizer = runs.ElasticTokenizer.from_pretrained(
        flags["load_checkpoint"],
        config=config,
        dtype=flags["dtype"],
        mesh_dim=flags["mesh_dim"],
        window_blocks=flags["max_blocks_per_chunk"] or None,
        context=flags["context"],
        search_width=flags["search_width"],
    )
    cli.log.info("%s", runs.describe(tokenizer))
    _, bad = runs.tokenize_files(
        tokenizer,
        inputs,
        flags["output_folder"],
        overwrite=flags["overwrite"],
        threshold=flags["threshold"],
        psnr=flags["psnr"],
        metric=flags["metric"],
        avg_tokens=flags["avg_tokens"] or None,
        bitrate=flags["bitrate"] or None,
        delay_blocks=flags["delay_blocks"],
        budget_counts=flags["budget_counts"],
        num_tokens=flags["n_codes"] or None,
        search=flags["search_alg"],
        rate=flags["fps"] or None,
        max_frames=flags["max_frames"] or None,
        max_fraction=flags["max_prop_codes"],
        fallback_fraction=flags["default_prop_codes"],
        num_counts=flags["num_counts"],
    )
    if bad:
        raise ValueError(
            f"{len(bad)} of {len(inputs)} files could not be read; the first is {bad[0]}."
        )
    return 0


if __name__ == "__main__":
    sys.exit(cli.run(INFERENCE, tokenize))

"""Measures models on a folder of clips, side by side; `--help` lists the flags."""

import dataclasses
import functools
import math
from typing import TYPE_CHECKING, Any

from elastic.cli import app
from elastic.cli.flags import USUAL

if TYPE_CHECKING:
    from elastic.evaluation.evaluate import EvaluationConfig
    from elastic.tokenizer import ElasticTokenizer

_LADDERS = 2  # clips that ladder.png shows


def evaluate(flags: app.Values) -> int:
    """Loads one model after the other, measures it, prints the tables."""
    models = parse_models(flags["models"])
    usual = flags["thresholds"] == USUAL
    thresholds = [] if usual else numbers(flags["thresholds"], "thresholds")
    counts = numbers(flags["num_tokens"])
    from elastic.media.inputs import check_input, find_clips
    from elastic.media.location import is_part

    check_input(flags["input_path"])  # known before anything heavy is imported

    from elastic import checkpoints, search
    from elastic.distributed import cpu_devices, mesh
    from elastic.evaluation import evaluate as evaluation
    from elastic.evaluation import records, tables
    from elastic.pipeline import load_model, tokenize_files

    cpu_devices.set_up_cpu()
    config = evaluation.EvaluationConfig(
        thresholds=evaluation.EvaluationConfig.thresholds
        if usual
        else tuple(float(threshold) for threshold in thresholds),
        num_tokens=tuple(counts),
        searches=tuple(app.words(flags["searches"])),
        num_counts=flags["num_counts"],
        search_tolerance=flags["search_tolerance"],
        metrics=tuple(app.words(flags["metrics"])) or records.METRICS,
        metric_frames=flags["metric_frames"],
        max_frames=flags["max_frames"] or None,
        fps=flags["fps"] or None,
        reader=flags["reader"],
        exact_color=flags["exact_color"],
        fit=flags["fit"],
        resolution=flags["resolution"],
        tile_overlap=flags["tile_overlap"],
        pictures=_LADDERS,
        codecs=tuple(app.words(flags["codec"])),
    )
    # What cannot work is refused before the first model is measured, which may take an hour.
    clips = find_clips(flags["input_path"], without=flags["output_folder"])
    files = clips if any(map(is_part, clips.values())) else list(clips.values())
    tables.check_folder(flags["output_folder"])
    shapes = {}
    for name, spec in models.items():
        own = checkpoints.load_config(spec) is not None
        preset = "" if own else flags["load_elastic_config"]
        changes = flags["update_elastic_config"]
        shapes[name] = load_model.model_config(spec, preset=preset, changes=changes)
        if usual and (recommended := shapes[name].recommended_thresholds):
            config, usual = dataclasses.replace(config, thresholds=recommended), False
        config.conditions(shapes[name])
    config, weights = with_weights(flags, config)
    devices = mesh.make_mesh(flags["mesh_dim"])
    results = {}
    tokenizer: ElasticTokenizer | None = None
    for name, spec in models.items():
        shape = shapes[name]
        load = functools.partial(checkpoints.load_params, spec, shape)
        about: dict[str, Any] = dict(
            model_id=spec, prior=search.load_prior(checkpoints.folder_of(spec))
        )
        same = tokenizer and tokenizer.config == shape.replace(mask_type=tokenizer.config.mask_type)
        if tokenizer is not None and same:  # a baseline: the programs are compiled already
            tokenizer = tokenizer.with_params(load(), mask_type=shape.mask_type, **about)
        else:
            tokenizer = tokenize_files.ElasticTokenizer(
                shape,
                load,
                dtype=flags["dtype"],
                mesh=devices,
                window_blocks=flags["max_blocks_per_chunk"] or None,
                context=flags["context"],
                search_width=flags["search_width"],
                **about,
            )
        load_model.log_model(tokenizer, name=name)
        results[name] = evaluation.evaluate(tokenizer, files, config, **weights)
    # Shown first: should the folder be full by now, the numbers are not lost.
    print(tables.describe(results))
    written = tables.write(flags["output_folder"], results)
    print(f"{', '.join(file.name for file in written)} in {flags['output_folder']}")
    bad = next(iter(results.values())).skipped
    if bad:
        raise ValueError(
            f"{len(bad)} of {len(files)} files could not be read and are in no number; the first is {next(iter(bad))}."
        )
    return 0


def with_weights(
    flags: app.Values, config: "EvaluationConfig"
) -> tuple["EvaluationConfig", dict[str, Any]]:
    """The metrics that can be measured, and their weights as arguments of `evaluate`.

    A metric whose weights are missing is left out, if nobody asked for it by name.
    """
    from elastic.metrics import frechet, load_lpips_weights
    from elastic.metrics.dists import load_dists_weights

    wanted, vgg, channels, networks = list(config.metrics), None, None, {}
    for name in ("fvd", "fid"):
        if path := flags[f"{name}_weights"]:
            networks[name] = frechet.load_network(name, path)
            wanted.append(name)
        elif name in wanted:
            if flags["metrics"]:
                raise ValueError(
                    f"--metrics names {name}, which needs --{name}_weights=FILE: the TorchScript file of "
                    f"{frechet.NETWORKS[name]}."
                )
            wanted.remove(name)
    if "dists" in wanted:
        try:
            channels = load_dists_weights(flags["dists_weights"] or None)
        except ValueError:
            if flags["metrics"] or flags["dists_weights"]:
                raise
            wanted.remove("dists")  # in silence: its package is no requirement
    if "lpips" in wanted or "dists" in wanted:  # both look through VGG16
        try:
            vgg = load_lpips_weights(flags["lpips_weights"] or None)
        except ValueError as error:
            if flags["metrics"] or flags["lpips_weights"]:
                raise
            app.log.warning("LPIPS is not measured: %s", error)
            wanted = [name for name in wanted if name not in ("lpips", "dists")]
    weights = {"lpips_weights": vgg, "dists_weights": channels, "networks": networks}
    return dataclasses.replace(config, metrics=tuple(wanted)), weights


def numbers(text: str, flag: str = "num_tokens") -> list[int | float]:
    """Whole numbers as integers, those with a point as floats.

    Raises:
      ValueError: a part is no finite number.
    """
    found: list[int | float] = []
    for word in app.words(text):
        try:
            found.append(int(word) if word.lstrip("-").isdigit() else float(word))
        except ValueError as error:
            raise ValueError(f"--{flag}={text}: {word!r} is not a number.") from error
        if not math.isfinite(found[-1]):
            raise ValueError(f"--{flag}={text}: {word!r} is not finite.")
    return found


def parse_models(text: str) -> dict[str, str]:
    """{name: checkpoint} of --models; one without a name takes the last part of its path.

    Raises:
      ValueError: two have the same name, or one has no checkpoint.
    """
    models: dict[str, str] = {}
    for word in app.words(text):
        name, equals, spec = (part.strip() for part in word.partition("="))
        if not equals or any(mark in name for mark in "/:"):  # the sign belongs to a path
            name, spec = word.rsplit("::", 1)[-1].rstrip("/").rsplit("/", 1)[-1], word
        if not name or not spec:
            raise ValueError(f"--models: {word!r} must be NAME=MODEL or MODEL.")
        if name in models:
            raise ValueError(
                f"--models: two are called {name!r}; write NAME=MODEL for one of them."
            )
        models[name] = spec
    if not models:
        raise ValueError("--models is empty; name at least one, such as example/fsq.")
    return models

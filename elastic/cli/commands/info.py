"""Says what a file, a folder or a repository is: tokens, shards, a model, a training run, a clip; `--help` lists the flags."""

import collections
import json
import pathlib
from typing import TYPE_CHECKING, Any

from elastic.cli import app
from elastic.cli.script import Flag, Script
from elastic.io import json_file

if TYPE_CHECKING:
    from elastic.config import ElasticTokConfig
    from elastic.tokens import TokenizedClip

INFO = Script(
    name="elastictok info",
    usage="FILE|FOLDER|REPOSITORY",
    description=(
        "Says what a file or a folder is: a token file (tokens.npz, tokens.part), shards, the results of tokenizing, a model "
        "(a checkpoint, a folder, OWNER/NAME, a name such as small-fsq), a training run, an image or a video. Weights are not loaded."
    ),
    groups={
        "Input": (Flag("path", "", "what to look at", required=True),),
        "Output": (Flag("json", False, "print JSON instead of a table"),),
        "Other": (Flag("debug", False, "show the traceback of an error"),),
    },
    positional="path",
)


def info(flags: app.Values) -> int:
    """Prints what the path is."""
    about = describe(flags["path"])
    if flags["json"]:
        print(json.dumps(about, indent=2))
        return 0
    kind = about.pop("kind")
    width = max(map(len, about))
    print(f"{flags['path']}: {kind}")
    for name, value in about.items():
        print(f"  {name:{width}}  {value}")
    return 0


def describe(spec: str) -> dict[str, Any]:
    """What `spec` is, as rows of a table; the first one is `kind`.

    Raises:
      ValueError: it is nothing that is known here.
    """
    path = pathlib.Path(spec)
    if path.is_dir():
        return _folder(path)
    if path.is_file():
        return _file(path)
    from elastic.checkpoints.named_models import NAMES
    from elastic.checkpoints.resolve import nearby

    try:
        return _model(spec)
    except ValueError as error:
        repository = spec.count("/") == 1 and not path.parent.is_dir()
        if repository or "::" in spec or "://" in spec:  # the error says what is wrong with it
            raise
        raise ValueError(
            f"{spec!r} is no file, no folder and no name of a model ({', '.join(NAMES)}).{nearby(path)}"
        ) from error


def _folder(path: pathlib.Path) -> dict[str, Any]:
    if (path / "metrics.jsonl").is_file() or _steps(path, "checkpoints"):
        return _run(path)
    if (path / "state").is_dir() and (path / "notes").is_dir():
        return {"kind": "one checkpoint of a training run", "run": str(path.absolute().parents[1])}
    if any(path.glob("*.parquet")):
        return _shards(path)
    if (path / "tokens.npz").is_file():
        return _file(path / "tokens.npz")
    if (path / "unfinished" / "tokens.part").is_file():
        return _part(path / "unfinished" / "tokens.part")
    try:
        return _model(str(path))
    except ValueError as error:
        from elastic import media

        files = media.find_media(path)
        if files:
            endings = collections.Counter(file.suffix.lower() for file in files)
            counted = ", ".join(f"{count} {ending}" for ending, count in endings.most_common())
            return {"kind": "a folder of images and videos", "files": counted}
        raise ValueError(
            f"{path} holds no tokens, shards, model, training run, images or videos: {error}"
        ) from error


def _file(path: pathlib.Path) -> dict[str, Any]:
    from elastic.tokens import TokenFileError, TokenizedClip
    from elastic.tokens.any_file import kind_of

    try:
        kind = kind_of(path)
    except TokenFileError:
        kind = ""
    if kind == "npz":
        return _clip(TokenizedClip.load(path), path)
    if kind == "shard":
        return _shards(path)
    if kind == "part":
        return _part(path)
    if path.suffix.lower() == ".json":
        return _config_file(path)
    if path.name.startswith(("params", "streaming_")) or path.suffix in (
        ".safetensors",
        ".msgpack",
    ):
        return _model(str(path))
    from elastic import media

    try:
        found = media.probe(path)
    except media.MediaError as error:
        try:
            return _model(str(path))
        except ValueError as other:
            raise ValueError(f"{path} is neither media ({error}) nor a model ({other})") from other
    about: dict[str, Any] = {
        "kind": "an image" if found.kind == "image" else "a video",
        "size": f"{found.width}x{found.height}",
    }
    if found.kind == "video":
        varies = ", which varies" if found.variable_rate else ""
        about["frames"] = f"{found.num_frames} at {found.rate:g}/s{varies}"
    if found.transfer != "sdr":
        about["range"] = f"high ({found.transfer}); it is tone-mapped"
    return about


def _tiles(clip: "TokenizedClip") -> str:
    """How many tiles a frame has, if it has several."""
    columns, rows = len(clip.tile_columns), len(clip.tile_rows)
    return "" if clip.num_tiles == 1 else f" of {clip.num_tiles} tiles ({columns} by {rows})"


def _clip(clip: "TokenizedClip", path: pathlib.Path) -> dict[str, Any]:
    counts, width, height = clip.counts, *clip.source
    about: dict[str, Any] = {
        "kind": "the tokens of an image" if clip.is_image else "the tokens of a video",
        "original": f"{width}x{height}"
        if clip.is_image
        else f"{width}x{height}, {clip.num_frames} frames at {clip.rate:g}/s",
        "decodes to": "x".join(map(str, clip.frame))
        + ("" if clip.fit == "crop" else f" (fit={clip.fit})"),
        "model": f"{clip.model_id} ({clip.bottleneck_type}, config {clip.config_hash})",
        "tokens": f"{clip.num_tokens} in {clip.num_blocks} blocks{_tiles(clip)}: mean {clip.mean_tokens:.1f}, "
        f"min {counts.min()}, max {counts.max()} "
        f"of {clip.tokens_per_block}",
        "bits": f"{clip.num_bits}, {clip.bits_per_pixel:.4g} a pixel",
    }
    if clip.rate:
        kbit = clip.num_bits / 1000 * clip.rate / clip.num_frames
        about["rate"] = f"{kbit:.1f} kbit/s"
    met = sum(block.met_threshold for block in clip)
    about["threshold"] = (
        f"none ({clip.search})"
        if clip.threshold is None
        else f"{clip.threshold:g}, met by {met} of {len(clip)} {'blocks' if clip.num_tiles == 1 else 'tiles of blocks'} ({clip.search})"
    )
    about["file"] = f"{path.stat().st_size / 1000:.1f} kB"
    return about


def _part(path: pathlib.Path) -> dict[str, Any]:
    from elastic.tokens import read_token_stream

    header, blocks = read_token_stream(path)
    found = list(blocks)
    return {
        "kind": "the tokens so far of a run that is under way or was interrupted",
        "model": header.get("model_id"),
        "blocks": len(found),
        "frames": sum(block.num_frames for block in found),
        "tokens": sum(block.tokens.num_kept for block in found),
    }


def _shards(path: pathlib.Path) -> dict[str, Any]:
    from elastic.pipeline.dataset_plan import PLAN, DatasetPlan
    from elastic.pipeline.dataset_summary import PLOT, bars
    from elastic.pipeline.shard_numbers import count_clips
    from elastic.tokens import TokenShards

    shards = TokenShards(path)
    header, counts = shards.header, shards.counts()
    total = sum(int(count.sum()) for count in counts)
    blocks = sum(map(len, counts))
    histogram = collections.Counter(int(count) for clip in counts for count in clip)
    plan = path / PLAN
    options = DatasetPlan.load(plan).options if plan.is_file() else {}
    numbers = count_clips(shards.facts(), mean_square=options.get("metric", "mse") == "mse")
    found = numbers.to_json()
    about = {
        "kind": f"{len(shards.paths)} shard{'s' * (len(shards.paths) > 1)} of tokens",
        "clips": len(shards),
        "model": f"{header['model_id']} ({header['bottleneck_type']}, config {header['config_hash']})",
        "tokens": f"{total} in {blocks} blocks: mean {total / blocks:.1f} of {header['tokens_per_block']}",
        "threshold": f"{header['threshold']} ({header['search']})",
        "tokens per block": _bars(bars(histogram, header["tokens_per_block"]), "blocks"),
    }
    if numbers.psnr:
        about["PSNR per block"] = _bars(found["psnr_per_block"], "blocks", " dB")
    if numbers.seconds:
        rates = found["tokens_per_second"]
        about["tokens per second"] = f"{_bars(rates, 'clips')}, mean {rates['mean']:.1f}"
    for name in ("worst", "best"):
        for number, clip in enumerate(getattr(numbers, name), 1):
            about[f"{name} {number}"] = (
                f"{clip.psnr:.1f} dB, {clip.mean_tokens:g} tokens a block: {clip.id}"
            )
    about["files"] = f"{sum(file.stat().st_size for file in shards.paths) / 1e6:.2f} MB"
    if (path / PLOT).is_file():
        about["picture"] = str(path / PLOT)
    return about


def _bars(histogram: dict[str, list[Any]], unit: str, scale: str = "") -> str:
    """A histogram as one line of text: its bars, and where they begin and end."""
    heights, edges = histogram[unit], histogram["edges"]
    levels = "▁▂▃▄▅▆▇█"
    most = max(heights)
    bars = "".join(
        levels[(len(levels) - 1) * height // most] if height else " " for height in heights
    )
    return f"{edges[0]:g} |{bars}| {edges[-1]:g}{scale}"


def _run(path: pathlib.Path) -> dict[str, Any]:
    about: dict[str, Any] = {"kind": "a training run"}
    metrics = path / "metrics.jsonl"
    last = json_file.last_numbers(metrics) if metrics.is_file() else {}
    if "step" in last:
        about["last record"] = f"step {last.pop('step')}"
    about |= {name: f"{value:.6g}" for name, value in last.items()}
    for folder in ("checkpoints", "milestones"):
        if steps := _steps(path, folder):
            about[folder] = ", ".join(steps[-5:])
    if (path / "config.json").is_file():
        about |= {
            name: value
            for name, value in _config_file(path / "config.json").items()
            if name != "kind"
        }
    done = path / "pretrained"
    about["finished"] = f"yes: {done}" if (done / "config.json").is_file() else "no"
    return about


def _steps(run: pathlib.Path, folder: str) -> list[str]:
    """The names of the checkpoints in a folder of a run."""
    return sorted(entry.name for entry in (run / folder).glob("*") if entry.name.isdigit())


def _config_file(path: pathlib.Path) -> dict[str, Any]:
    from elastic.config import load_config

    return {"kind": "the configuration of a model"} | _shape(load_config(str(path)))


def _model(spec: str) -> dict[str, Any]:
    from elastic import checkpoints
    from elastic.checkpoints.resolve import TRAIN_STATE, index_tensors, resolve
    from elastic.checkpoints.validate import STATE_PARAMS, checkpoint_kind, param_groups

    file, _ = resolve(spec)
    tensors = index_tensors(file)
    kind, groups = checkpoint_kind(tensors), param_groups(tensors)
    params = groups.get(STATE_PARAMS if kind == TRAIN_STATE else next(iter(groups)), {})
    size = sum(tensor.num_bytes // tensor.dtype.itemsize for tensor in params.values())
    types = collections.Counter()
    for tensor in params.values():
        types[tensor.dtype.name] += tensor.num_bytes
    config = checkpoints.load_config(spec)
    about = {
        "kind": "a model" if kind != TRAIN_STATE else "the training state of a model",
        "weights": f"{file} ({file.stat().st_size / 1e6:.1f} MB)",
        "parameters": f"{size / 1e6:.2f} M, {', '.join(name for name, _ in types.most_common())}",
    }
    if config is None:
        return about | {"config": "none beside the weights; give --load_elastic_config"}
    curves = (file.parent / "curves.json").is_file()
    return about | _shape(config) | {"first guess": "curves.json" if curves else "none"}


def _shape(config: "ElasticTokConfig") -> dict[str, Any]:
    fsq = config.bottleneck_type == "fsq"
    kept = "" if config.keep_fraction is None else f", {config.mask_type}"
    return {
        "bottleneck": f"fsq, {config.codebook_size:,} codes" if fsq else f"vae, {config.code_dim} channels",
        "frames": f"{config.resolution}x{config.resolution}, {config.frames_per_block} a block, patches {config.patch_size}",
        "tokens": f"{config.min_toks} to {config.max_toks} a block{kept}",
        "context": f"{config.max_sequence_length // config.max_toks} blocks",
        "layers": f"{config.layers} of width {config.hidden_size}",
        "config": config.config_hash(),
    }  # fmt: skip

"""What the scripts do with files: a clip to a folder of results, a token file back to a clip."""

import contextlib
import logging
import os
import time
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from tqdm import tqdm

from elastic import checkpoint, media, report
from elastic.config import ElasticTokConfig, load_config, update_config
from elastic.media_write import WRITABLE_VIDEO_SUFFIXES
from elastic.metrics import psnr_of_mse
from elastic.ops import choose_implementation
from elastic.tensor_file import replaced_together
from elastic.tokenizer import ElasticTokenizer
from elastic.tokens import TokenizedClip

log = logging.getLogger(__name__)

TOKENS, REPORT, PLOT = "tokens.npz", "report.json", "plot.png"
VIDEO, PICTURE = "viz.mp4", "viz.png"
RESULTS = (TOKENS, REPORT, VIDEO, PICTURE, PLOT)  # every name that a run may write


class Run(NamedTuple):
    """One finished run."""

    source: Path
    folder: Path
    files: tuple[Path, ...]
    report: dict[str, Any]


def model_config(checkpoint_spec: str, *, preset: str = "", changes: str = "") -> ElasticTokConfig:
    """The model's shape: `preset`, else the config.json beside the checkpoint; then `changes`.

    Raises:
      ValueError: there is neither, or an option is unknown or out of range.
    """
    config = load_config(preset) if preset else checkpoint.load_config(checkpoint_spec)
    if config is None:
        raise ValueError(
            f"{checkpoint_spec!r} has no config.json beside it; say what the model is with "
            "--load_elastic_config (200m for the released ones) and --update_elastic_config."
        )
    return update_config(config, changes)


def check_resolution(resolution: int, config: ElasticTokConfig) -> None:
    """Refuses a resolution that is not the model's; 0 is no wish."""
    if resolution not in (0, config.resolution):
        raise ValueError(
            f"resolution={resolution}, but the frames of this model have {config.resolution} rows: "
            f"max_toks={config.max_toks}, patch_size={config.patch_size} and "
            f"frames_per_block={config.frames_per_block} decide. Leave it out, or change these."
        )


def describe(tokenizer: ElasticTokenizer) -> str:
    """One line: the model, the devices and the kernel."""
    config, mesh = tokenizer.config, tokenizer.mesh
    sizes = [np.size(leaf) for leaf in _leaves(tokenizer.weights)]
    axes = ",".join(f"{axis}:{size}" for axis, size in mesh.shape.items())
    devices = mesh.devices.flat
    kernel = choose_implementation(
        config.attention_implementation,
        head_dim=config.head_dim,
        dtype=tokenizer.codec.dtype,
        mesh=mesh,
    )
    return (
        f"Model {tokenizer.model_id}: {config.bottleneck_type}, {sum(sizes) / 1e6:.1f} M parameters, "
        f"{config.min_toks} to {config.max_toks} tokens per block of {config.frames_per_block} "
        f"frames at {config.resolution}x{config.resolution}; {tokenizer.window_blocks} blocks of "
        f"context; {mesh.size} x {devices[0].device_kind} ({axes}); attention {kernel!r}, "
        f"{tokenizer.codec.dtype} products."
    )


def find_inputs(
    path: str | os.PathLike, *, output_folder: str | os.PathLike | None = None
) -> dict[Path, str]:
    """The files to tokenize, each with the name of its folder under the output folder.

    One file gives the name '': its results go to the output folder itself. Files of a folder keep
    their place in it, without their ending where no other file then has the same name. What lies
    in the output folder, results of earlier runs, is no input.

    Raises:
      ValueError: nothing is there, or a folder has no image or video.
    """
    path = Path(path)
    if not path.exists():
        raise media.MediaError(f"There is no file {str(path)!r}; check --input_path.")
    if not path.is_dir():
        return {path: ""}
    files = media.find_media(path)
    if output_folder is not None:
        results = Path(output_folder).resolve()
        files = [file for file in files if results not in file.resolve().parents]
    if not files:
        raise media.MediaError(f"There is no image or video in {str(path)!r} or its folders.")
    names = [file.relative_to(path) for file in files]
    stems = [str(name.with_suffix("")) for name in names]
    return {
        file: stem if stems.count(stem) == 1 else str(name)
        for file, name, stem in zip(files, names, stems, strict=True)
    }


def tokenize_file(
    tokenizer: ElasticTokenizer,
    source: str | os.PathLike,
    folder: str | os.PathLike,
    *,
    overwrite: bool = True,
    progress: bool = True,
    **options: Any,
) -> Run:
    """Tokenizes one file and writes tokens, report, picture and plot into `folder`.

    Memory holds one block of frames: those that the picture needs wait in an unfinished file beside
    the results (twice the size of the clip, uncompressed, at the model's resolution). The results
    take their names when all are complete; those of an earlier run are replaced one by one.

    Args:
      overwrite: False refuses a folder that holds results.
      progress: show a bar with an estimate.
      options: those of `ElasticTokenizer.stream`.

    Raises:
      ValueError: the file cannot be read or the options contradict each other.
      OSError: the folder cannot be written to. Nothing is left behind in either case.
    """
    source, folder = Path(source), Path(folder)
    encoding = tokenizer.stream(source, **options)
    _check_folder(folder, overwrite=overwrite)
    with replaced_together(folder, RESULTS) as work:
        frames = _Frames(work, tokenizer.config.resolution)
        started = time.perf_counter()
        blocks = []
        with (
            frames.writing(),
            tqdm(
                total=encoding.num_blocks, desc=source.name, unit="block", disable=not progress
            ) as bar,
        ):
            for block in encoding:
                frames.add(block.frames, block.reconstruction)
                blocks.append({"passes": block.passes, "seconds": block.seconds})
                bar.set_postfix_str(f"{block.tokens.num_kept} tokens", refresh=False)
                bar.update()
        seconds = time.perf_counter() - started
        tokens = encoding.tokens()
        tokens.save(work / TOKENS)
        totals = {"seconds": seconds, "psnr": frames.psnr}
        found = report.build_report(tokens, per_block=blocks, totals=totals)
        report.write_json(work / REPORT, found)
        report.plot_report(found, work / PLOT)
        _draw(tokens, frames, work, progress=progress)
        frames.remove()
        files = tuple(folder / name for name in RESULTS if (work / name).exists())
    return Run(source, folder, files, found)


def tokenize_files(
    tokenizer: ElasticTokenizer,
    inputs: Mapping[Path, str],
    folder: str | os.PathLike,
    **options: Any,
) -> tuple[list[Run], list[Path]]:
    """`tokenize_file` for each; of several, one that is no good is named in the log and left out.

    Returns:
      The finished runs, and the files that could not be read.
    """
    runs, bad = [], []
    for number, (file, name) in enumerate(inputs.items()):
        if len(inputs) > 1:
            log.info("%s (%d of %d)", file, number + 1, len(inputs))
        try:
            run = tokenize_file(tokenizer, file, Path(folder) / name, **options)
        except media.MediaError as error:
            if len(inputs) == 1:
                raise
            log.warning("Left out: %s", error)
            bad.append(file)
            continue
        runs.append(run)
        log.info("%s", summary(run))
    return runs, bad


def summary(run: Run) -> str:
    """The closing table of a run."""
    clip, totals = run.report["clip"], run.report["totals"]
    met = f"{totals['blocks_met']} of {totals['blocks']} blocks"
    threshold = clip["threshold"]
    size = f"{clip['resolution']}x{clip['resolution']}"
    shown = "an image" if clip["is_image"] else f"{totals['frames']} frames"
    rows = {
        "blocks": f"{totals['blocks']} ({shown}, {size})",
        "tokens per block": f"mean {totals['mean_tokens']:.1f}, min {totals['min_tokens']}, "
        f"max {totals['max_tokens']} of {clip['tokens_per_block']}",
        "threshold": "none" if threshold is None else f"{threshold:g}, met by {met}",
        "PSNR": f"{totals['psnr']:.2f} dB",
        "bits per pixel": f"{totals['bits_per_pixel']:.4g} "
        f"({totals['compression_ratio']:.0f} times less than 8-bit RGB)",
        "speed": f"{totals['frames_per_second']:.3g} frames/s, "
        f"{totals['passes_per_block']:.2f} passes per block",
        "files": f"{', '.join(file.name for file in run.files)} in {run.folder}",
    }
    width = max(map(len, rows))
    return "\n".join(
        [f"{run.source}:", *(f"  {name:{width}}  {value}" for name, value in rows.items())]
    )


def model_of(tokens: TokenizedClip) -> str:
    """The checkpoint that a token file names, if it lies here.

    Raises:
      ValueError: it does not. Nothing is downloaded because a file says so.
    """
    if not Path(tokens.model_id).exists():
        raise ValueError(
            f"The tokens were made by {tokens.model_id!r}, which is not here; name the model with "
            "--load_checkpoint (hf::OWNER/NAME fetches one)."
        )
    return tokens.model_id


def check_same_model(tokens: TokenizedClip, config: ElasticTokConfig, spec: str) -> None:
    """Refuses a model of another shape than the one that made the tokens, before it is loaded."""
    if tokens.config_hash != config.config_hash():
        raise ValueError(
            f"The tokens were made by {tokens.model_id!r} (config {tokens.config_hash}), but {spec!r} "
            f"is another model (config {config.config_hash()}); give the one that made them, with "
            "the --load_elastic_config and --update_elastic_config of that run."
        )


def decode_to_file(
    tokenizer: ElasticTokenizer,
    tokens: TokenizedClip,
    path: str | os.PathLike,
    *,
    progress: bool = True,
) -> None:
    """Decodes a token record block by block into a video, or a picture into an image file.

    Raises:
      ValueError: another model made the tokens, or the ending of `path` does not fit.
      OSError: the file cannot be written. Nothing is left behind in either case.
    """
    path = Path(path)
    check_decoded_name(path, tokens)
    blocks = tokenizer.decode_stream(tokens)
    if tokens.is_image:
        media.write_image(path, next(iter(blocks))[0])
        return
    first = next(blocks)  # another model is refused here, before a file is begun
    with (
        media.VideoWriter(path, tokens.rate) as video,
        tqdm(total=len(tokens.blocks), desc=path.name, unit="block", disable=not progress) as bar,
    ):
        for block in _chain(first, blocks):
            for frame in block:
                video.write(frame)
            bar.update()


def check_decoded_name(path: str | os.PathLike, tokens: TokenizedClip) -> None:
    """Refuses a video's name for a picture, and the other way round."""
    suffix = Path(path).suffix.lower()
    video = suffix in WRITABLE_VIDEO_SUFFIXES
    if video == tokens.is_image:
        what, way = ("a picture", ".png") if tokens.is_image else ("a video", ".mp4")
        raise media.MediaError(
            f"The tokens are of {what}; {str(path)!r} does not end like one, use {way}."
        )


class _Frames:
    """Originals and reconstructions of a run, in two files of raw pixels until the picture is drawn."""

    def __init__(self, work: Path, resolution: int):
        self._paths = [work / f"{name}.rgb" for name in ("original", "reconstruction")]
        self._shape = (resolution, resolution, 3)
        self._files: list[Any] = []
        self._squares, self._count = 0, 0

    @contextlib.contextmanager
    def writing(self) -> Iterator[None]:
        """Opens both files for `add`."""
        with contextlib.ExitStack() as stack:
            self._files = [stack.enter_context(open(path, "wb")) for path in self._paths]
            yield

    def add(self, original: np.ndarray, reconstruction: np.ndarray) -> None:
        """Appends a block of each."""
        for file, frames in zip(self._files, (original, reconstruction), strict=True):
            file.write(np.ascontiguousarray(frames).data)
        difference = original.astype(np.int32) - reconstruction
        self._squares += int(np.sum(np.square(difference), dtype=np.int64))
        self._count += original.size

    @property
    def psnr(self) -> float:
        """PSNR in dB of all frames so far."""
        return psnr_of_mse(self._squares / self._count * (2 / 255) ** 2)

    def read(self) -> tuple[Iterable[np.ndarray], Iterable[np.ndarray]]:
        """Originals and reconstructions, frame by frame."""
        original, reconstruction = (self._read(path) for path in self._paths)
        return original, reconstruction

    def _read(self, path: Path) -> Iterator[np.ndarray]:
        size = int(np.prod(self._shape))
        with open(path, "rb") as file:
            while pixels := file.read(size):
                yield np.frombuffer(pixels, np.uint8).reshape(self._shape)

    def remove(self) -> None:
        """Deletes both files."""
        for path in self._paths:
            path.unlink()


def _draw(tokens: TokenizedClip, frames: _Frames, work: Path, *, progress: bool) -> None:
    """The picture or video of original, reconstruction and tokens used."""
    originals, reconstructions = frames.read()
    if tokens.is_image:
        (original,), (reconstruction,), (block,) = originals, reconstructions, tokens.blocks
        picture = report.strip_picture(
            original,
            reconstruction,
            count=block.num_kept,
            tokens_per_block=tokens.tokens_per_block,
            loss=block.loss,
            met=block.met_threshold,
        )
        media.write_image(work / PICTURE, picture)
        return
    drawn = report.strip_frames(
        originals,
        reconstructions,
        counts=tokens.counts,
        tokens_per_block=tokens.tokens_per_block,
        frames_per_block=tokens.frames_per_block,
        losses=[block.loss for block in tokens.blocks],
        met=[block.met_threshold for block in tokens.blocks],
        rate=tokens.rate,
    )
    bar = tqdm(
        drawn, total=tokens.num_frames, desc=VIDEO, unit="frame", leave=False, disable=not progress
    )
    media.write_video(work / VIDEO, bar, tokens.rate)


def _check_folder(folder: Path, *, overwrite: bool) -> None:
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"{folder} is a file; name a folder for the results.")
    present = [name for name in RESULTS if (folder / name).exists()]
    if present and not overwrite:
        raise ValueError(
            f"{folder} holds results already ({', '.join(present)}); name another folder, or leave "
            "out --overwrite=False."
        )


def _chain(first: np.ndarray, rest: Iterable[np.ndarray]) -> Iterator[np.ndarray]:
    yield first
    yield from rest


def _leaves(tree: Any) -> list[Any]:
    return (
        [leaf for child in tree.values() for leaf in _leaves(child)]
        if isinstance(tree, dict)
        else [tree]
    )

"""What the scripts do with files: a clip to a folder of results, a token file back to a clip."""

import logging
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from elastic.checkpoints import params
from elastic.config import ElasticTokConfig, load_config, update_config
from elastic.media import reader
from elastic.media.writer import WRITABLE_VIDEO_SUFFIXES
from elastic.ops import choose_implementation
from elastic.pipeline.result_folder import Job, Run
from elastic.tokenizer.session import Encoding
from elastic.tokenizer.tokenizer import ElasticTokenizer
from elastic.tokens.clip import TokenizedClip
from elastic.tokens.npz_file import TokenFileError
from elastic.tokens.stream_file import read_token_stream

log = logging.getLogger(__name__)


def model_config(checkpoint_spec: str, *, preset: str = "", changes: str = "") -> ElasticTokConfig:
    """The model's shape: `preset`, else the config.json beside the checkpoint; then `changes`.

    Raises:
      ValueError: there is neither, or an option is unknown or out of range.
    """
    config = load_config(preset) if preset else params.load_config(checkpoint_spec)
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
    config, mesh, codec = tokenizer.config, tokenizer.mesh, tokenizer.codec
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
        f"context, whose past takes {codec.past_bytes() / 1e6:,.0f} MB ({codec.trial_bytes() / 1e6:,.1f} MB a block); "
        f"{mesh.size} x {devices[0].device_kind} ({axes}); attention {kernel!r}, "
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
        raise reader.MediaError(f"There is no file {str(path)!r}; check --input_path.")
    if not path.is_dir():
        return {path: ""}
    files = reader.find_media(path, without=output_folder)
    if not files:
        raise reader.MediaError(f"There is no image or video in {str(path)!r} or its folders.")
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
    resume: bool = True,
    viz: bool = True,
    progress: bool = True,
    **options: Any,
) -> Run:
    """Tokenizes one file and writes tokens, report, picture and plot into `folder`.

    Memory holds one block of frames: those that the picture needs wait in the folder `unfinished` beside the results (twice the size
    of the clip, uncompressed, at the model's resolution), and so do the tokens found so far (`tokens.part`, which can be decoded
    while it grows). The results take their names when all are complete; those of an earlier run are replaced one by one. A run that
    was interrupted goes on from there.

    Args:
      overwrite: False refuses a folder that holds results.
      resume: False begins anew where a run was interrupted.
      viz: draw the picture or the video.
      progress: show a bar with an estimate.
      options: those of `ElasticTokenizer.stream`.

    Raises:
      ValueError: the file cannot be read or the options contradict each other; nothing is left behind.
      OSError: the folder cannot be written to; of a clip of several blocks, what was found so far stays in `unfinished`.
    """
    job = Job(Path(source), Path(folder), overwrite=overwrite, resume=resume, viz=viz)
    try:
        encoding = job.begin(tokenizer, options)
        bar = tqdm(
            total=encoding.num_blocks,
            initial=encoding.first_block,
            desc=job.source.name,
            unit="block",
            disable=not progress,
        )
        with bar:
            for block in encoding:
                job.add(block)
                bar.set_postfix_str(f"{block.tokens.num_kept} tokens", refresh=False)
                bar.update()
        return job.finish(progress=progress)
    except BaseException as error:
        kept = not (isinstance(error, ValueError) or job.is_short)
        if not kept:
            job.discard()
        if isinstance(error, OSError) and error.errno and error.filename is None:
            goes_on = "; make room, and the same command goes on" if kept else ""
            raise OSError(error.errno, f"{error.strerror}{goes_on}", str(folder)) from error
        raise
    finally:
        job.close()


def tokenize_files(
    tokenizer: ElasticTokenizer,
    inputs: Mapping[Path, str],
    folder: str | os.PathLike,
    *,
    batch: int = 1,
    progress: bool = True,
    **options: Any,
) -> tuple[list[Run], list[Path]]:
    """`tokenize_file` for each; of several, one that is no good is named in the log and left out.

    Args:
      batch: files that go through the model at once.
      options: those of `tokenize_file`.

    Returns:
      The finished runs, and the files that could not be read.
    """
    folder = Path(folder)
    if batch > 1 and len(inputs) > 1:
        return _side_by_side(tokenizer, inputs, folder, batch, progress=progress, **options)
    runs, bad = [], []
    for number, (file, name) in enumerate(inputs.items()):
        if len(inputs) > 1:
            log.info("%s (%d of %d)", file, number + 1, len(inputs))
        try:
            run = tokenize_file(tokenizer, file, folder / name, progress=progress, **options)
        except reader.MediaError as error:
            if len(inputs) == 1:
                raise
            log.warning("Left out: %s", error)
            bad.append(file)
            continue
        runs.append(run)
        log.info("%s", summary(run))
    return runs, bad


def _side_by_side(
    tokenizer: ElasticTokenizer,
    inputs: Mapping[Path, str],
    folder: Path,
    batch: int,
    *,
    progress: bool,
    overwrite: bool = True,
    resume: bool = True,
    viz: bool = True,
    **options: Any,
) -> tuple[list[Run], list[Path]]:
    jobs: dict[Encoding, Job] = {}
    runs: list[Run] = []
    bad: list[Path] = []
    bar = tqdm(total=len(inputs), unit="file", disable=not progress)

    def leave_out(job: Job, error: Exception) -> None:
        log.warning("Left out: %s", error)
        bad.append(job.source)
        job.discard()
        bar.update()

    def opened() -> Iterator[Encoding]:
        for file, name in inputs.items():
            job = Job(file, folder / name, overwrite=overwrite, resume=resume, viz=viz)
            try:
                encoding = job.begin(tokenizer, options, alone=False)
            except reader.MediaError as error:
                leave_out(job, error)
                continue
            jobs[encoding] = job
            yield encoding

    try:
        with bar:
            for encoding, block in tokenizer.stream_many(opened(), batch=batch):
                if isinstance(block, reader.MediaError):
                    leave_out(jobs.pop(encoding), block)
                elif block is not None:
                    jobs[encoding].add(block)
                else:
                    runs.append(jobs[encoding].finish(progress=False))
                    jobs.pop(encoding).close()
                    log.info("%s", summary(runs[-1]))
                    bar.update()
    finally:
        for job in jobs.values():
            job.close()
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


class TokenPart:
    """The growing token file of a run that is under way, or was interrupted.

    Attributes:
      path: of the file.
      is_image, rate, window_blocks, model_id, config_hash: as in `TokenizedClip`.

    Raises:
      TokenFileError: it is no such file.
    """

    def __init__(self, path: str | os.PathLike):
        self.path = Path(path)
        header, _ = read_token_stream(self.path)
        try:
            self.is_image, self.rate = bool(header["is_image"]), float(header["rate"])
            self.window_blocks = int(header["window_blocks"])
            self.model_id, self.config_hash = str(header["model_id"]), str(header["config_hash"])
        except (KeyError, TypeError, ValueError) as error:
            raise TokenFileError(f"{path} has a header that lacks {error}.") from error

    def __str__(self) -> str:
        return str(self.path)


def open_tokens(path: str | os.PathLike) -> TokenizedClip | TokenPart:
    """A token file, whole or growing.

    Raises:
      TokenFileError: it is neither.
      OSError: it cannot be read.
    """
    return TokenPart(path) if Path(path).suffix == ".part" else TokenizedClip.load(path)


def model_of(tokens: TokenizedClip | TokenPart) -> str:
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


def check_same_model(
    tokens: TokenizedClip | TokenPart, config: ElasticTokConfig, spec: str
) -> None:
    """Refuses a model of another shape than the one that made the tokens, before it is loaded."""
    if tokens.config_hash != config.config_hash():
        raise ValueError(
            f"The tokens were made by {tokens.model_id!r} (config {tokens.config_hash}), but {spec!r} "
            f"is another model (config {config.config_hash()}); give the one that made them, with "
            "the --load_elastic_config and --update_elastic_config of that run."
        )


def decode_to_file(
    tokenizer: ElasticTokenizer,
    tokens: TokenizedClip | TokenPart,
    path: str | os.PathLike,
    *,
    follow: bool = False,
    progress: bool = True,
) -> None:
    """Decodes tokens block by block into a video, or a picture into an image file.

    Args:
      tokens: a record, or the growing file of a run that is under way.
      follow: of the latter, wait for the blocks that are still to come.

    Raises:
      ValueError: another model made the tokens, or the ending of `path` does not fit.
      OSError: the file cannot be written. Nothing is left behind in either case.
    """
    path = Path(path)
    check_decoded_name(path, tokens)
    if isinstance(tokens, TokenPart):
        blocks, total = tokenizer.decode_stream(tokens.path, follow=follow), None
    else:
        blocks, total = tokenizer.decode_stream(tokens), len(tokens.blocks)
    first = next(blocks, None)  # another model is refused here, before a file is begun
    if first is None:
        raise ValueError(f"{tokens} has no block yet; decode it later, or wait with --follow.")
    if tokens.is_image:
        reader.write_image(path, first[0])
        return
    with (
        reader.VideoWriter(path, tokens.rate) as video,
        tqdm(total=total, desc=path.name, unit="block", disable=not progress) as bar,
    ):
        for block in _chain(first, blocks):
            for frame in block:
                video.write(frame)
            bar.update()


def check_decoded_name(path: str | os.PathLike, tokens: TokenizedClip | TokenPart) -> None:
    """Refuses a video's name for a picture, and the other way round."""
    suffix = Path(path).suffix.lower()
    video = suffix in WRITABLE_VIDEO_SUFFIXES
    if video == tokens.is_image:
        what, way = ("a picture", ".png") if tokens.is_image else ("a video", ".mp4")
        raise reader.MediaError(
            f"The tokens are of {what}; {str(path)!r} does not end like one, use {way}."
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

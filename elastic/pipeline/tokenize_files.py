"""What the scripts do with files: a clip to a folder of results, a token file back to a clip."""

import logging
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from tqdm import tqdm

from elastic import media
from elastic.pipeline.result_folder import FinishedFile, ResultFolder
from elastic.tokenizer import ElasticTokenizer
from elastic.tokenizer.session import EncodeSession

log = logging.getLogger(__name__)


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
    files = media.find_media(path, without=output_folder)
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
    resume: bool = True,
    viz: bool = True,
    progress: bool = True,
    **options: Any,
) -> FinishedFile:
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
    job = ResultFolder(Path(source), Path(folder), overwrite=overwrite, resume=resume, viz=viz)
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
) -> tuple[list[FinishedFile], list[Path]]:
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
        except media.MediaError as error:
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
) -> tuple[list[FinishedFile], list[Path]]:
    jobs: dict[EncodeSession, ResultFolder] = {}
    runs: list[FinishedFile] = []
    bad: list[Path] = []
    bar = tqdm(total=len(inputs), unit="file", disable=not progress)

    def leave_out(job: ResultFolder, error: Exception) -> None:
        log.warning("Left out: %s", error)
        bad.append(job.source)
        job.discard()
        bar.update()

    def opened() -> Iterator[EncodeSession]:
        for file, name in inputs.items():
            job = ResultFolder(file, folder / name, overwrite=overwrite, resume=resume, viz=viz)
            try:
                encoding = job.begin(tokenizer, options, alone=False)
            except media.MediaError as error:
                leave_out(job, error)
                continue
            jobs[encoding] = job
            yield encoding

    try:
        with bar:
            for encoding, block in tokenizer.stream_many(opened(), batch=batch):
                if isinstance(block, media.MediaError):
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


def summary(run: FinishedFile) -> str:
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

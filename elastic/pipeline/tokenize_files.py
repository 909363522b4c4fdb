"""What the scripts do with files: a clip to a folder of results, a token file back to a clip."""

import functools
import logging
import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path, PurePosixPath
from typing import Any

from tqdm import tqdm

from elastic import media
from elastic.io.progress import Pace, hide_bar
from elastic.media.inputs import find_clips
from elastic.media.location import Place, local_path, name_of, place_of
from elastic.media.tar_members import safe_path
from elastic.metrics import psnr_of_mse
from elastic.pipeline.result_folder import FinishedFile, ResultFolder
from elastic.tokenizer import ElasticTokenizer, EncodeOptions
from elastic.tokenizer.session import EncodeSession

log = logging.getLogger(__name__)

_BAR = "{l_bar}{bar}| {n:.1f}/{total} [{elapsed}<{remaining}, {rate_fmt}{postfix}]"


def find_inputs(
    path: str | os.PathLike, *, output_folder: str | os.PathLike | None = None
) -> dict[Place, str]:
    """The clips to tokenize, each with the name of its folder under the output folder.

    One file gives the name '': its results go to the output folder itself. Files of a folder keep
    their place in it, without their ending where no other file then has the same name, and clips of shards and lists likewise. What lies
    in the output folder, results of earlier runs, is no input.

    Raises:
      ValueError: nothing is there, or a folder has no image or video.
    """
    clips = find_clips(path, without=output_folder)
    only = next(iter(clips.values()))
    if len(clips) == 1 and (local_path(only) == Path(path) or only == os.fspath(path)):
        return {only: ""}
    if len(set(clips.values())) < len(clips):
        twice, _ = Counter(clips.values()).most_common(1)[0]
        raise media.MediaError(
            f"{os.fspath(path)!r} names {str(twice)!r} several times; each needs one folder of results."
        )
    names = {name: safe_path(name) for name in clips}
    stems = Counter(_stem(name) for name in names.values())
    whole = Counter(names.values())
    found: dict[Place, str] = {}
    for name, place in clips.items():
        stem, safe = _stem(names[name]), names[name]
        if (
            isinstance(place, Path) and Path(path).is_dir()
        ):  # its own bytes, where they are no UTF-8
            relative = place.relative_to(path)
            stem_of_file, safe = str(relative.with_suffix("")), str(relative)
            found[place] = stem_of_file if stems[stem] == 1 else safe
            continue
        if whole[safe] > 1:  # of a list, '../a.mp4' and 'a.mp4'
            safe = f"{safe}#{len(found)}"
        found[place] = stem if stems[stem] == 1 else safe
    return found


def _stem(name: str) -> str:
    return str(PurePosixPath(name).with_suffix("")) if name else name


def tokenize_file(
    tokenizer: ElasticTokenizer,
    source: str | os.PathLike | media.ClipLocation,
    folder: str | os.PathLike,
    options: EncodeOptions,
    *,
    overwrite: bool = True,
    resume: bool = True,
    viz: bool = True,
    progress: bool = True,
    batch: int = 1,
    on_progress: Callable[[float], None] | None = None,
) -> FinishedFile:
    """Tokenizes one file and writes tokens, report, picture and plot into `folder`.

    Memory holds one block of frames. Until the end, the folder `unfinished` in the results' folder holds the tokens so far
    (`tokens.part`, which can be decoded while it grows) and the frames for the picture (uncompressed, at the model's resolution:
    twice the size of the clip). The results get their names when all are complete, and replace the results of an earlier run one by
    one. An interrupted run resumes from the folder `unfinished`.

    Args:
      tokenizer: the model.
      source: an image or a video.
      folder: the folder of the results; it is made if it does not exist.
      options: which frames are read, and how the token counts are chosen.
      overwrite: False refuses a folder that holds results.
      resume: False starts an interrupted run again from the first block.
      viz: draw the picture or the video.
      progress: show a bar with an estimate.
      batch: tiles that go through the model at once.
      on_progress: called after each pass of the model with the share of the file that is done.

    Raises:
      ValueError: the file cannot be read or the options contradict each other; nothing is left behind.
      OSError: the folder cannot be written to. The blocks so far of a longer clip stay in `unfinished`.
    """
    result_folder = ResultFolder(
        place_of(source), Path(folder), overwrite=overwrite, resume=resume, viz=viz
    )
    try:
        session = result_folder.open(tokenizer, options, batch=batch)
        bar = tqdm(
            total=session.num_blocks,
            initial=session.first_block,
            desc=name_of(result_folder.source),
            unit="block",
            disable=hide_bar(progress),
            bar_format=_BAR,
            miniters=0,
            postfix="compiling",  # shown until the first pass is done
        )

        pace = Pace()

        def tell(done: float) -> None:
            # Where there is no bar: a log is not to be silent for hours.
            if progress and bar.disable and pace.is_due():
                whole = f" of {session.num_blocks}" if session.num_blocks else ""
                log.info("%s: %d%s blocks are done.", name_of(result_folder.source), done, whole)

        def show(done: float) -> None:
            tell(done)
            if on_progress is not None and session.num_blocks:
                on_progress(min(done / session.num_blocks, 1.0))
            if session.num_done == session.first_block:
                bar.set_postfix_str("", refresh=False)
            _advance(bar, done)

        session.on_progress = show
        with bar:
            for block in session:
                result_folder.add(block)
                tell(session.num_done)
                bar.set_postfix_str(f"{block.tokens.num_kept} tokens", refresh=False)
                _advance(bar, session.num_done)
        return result_folder.finish(progress=progress)
    except BaseException as error:
        kept = not (isinstance(error, ValueError) or result_folder.is_short)
        if not kept:
            result_folder.remove()
        if isinstance(error, OSError) and error.errno and error.filename is None:
            goes_on = "; free some space, and the same command resumes" if kept else ""
            raise OSError(error.errno, f"{error.strerror}{goes_on}", str(folder)) from error
        raise
    finally:
        result_folder.close()


def _advance(bar: tqdm, done: float) -> None:
    """Moves a bar to `done`, never back: passes are a forecast of blocks."""
    bar.update(max(0.0, done - bar.n))


def tokenize_files(
    tokenizer: ElasticTokenizer,
    inputs: Mapping[Place, str],
    folder: str | os.PathLike,
    options: EncodeOptions,
    *,
    batch: int = 1,
    overwrite: bool = True,
    resume: bool = True,
    viz: bool = True,
    progress: bool = True,
) -> tuple[list[FinishedFile], list[Place]]:
    """Calls `tokenize_file` for each file. If there are several, an unreadable one is named in the log and left out.

    Args:
      tokenizer: the model.
      inputs: {file: name of its folder}, as `find_inputs` returns them.
      folder: the folder in which these folders are made.
      options: which frames are read, and how the token counts are chosen.
      batch: files, or tiles of files, that go through the model at once.
      overwrite, resume, viz, progress: as for `tokenize_file`.

    Returns:
      The finished files, and the files that could not be read.
    """
    folder = Path(folder)
    if batch > 1 and len(inputs) > 1:
        result_folders = (
            ResultFolder(file, folder / name, overwrite=overwrite, resume=resume, viz=viz)
            for file, name in inputs.items()
        )
        with tqdm(
            total=len(inputs), unit="file", disable=hide_bar(progress), bar_format=_BAR
        ) as bar:
            return _tokenize_side_by_side(tokenizer, result_folders, options, batch, bar)
    finished: list[FinishedFile] = []
    unreadable: list[Place] = []
    for number, (file, name) in enumerate(inputs.items()):
        if len(inputs) > 1:
            log.info("%s (%d of %d)", file, number + 1, len(inputs))
        try:
            run = tokenize_file(
                tokenizer,
                file,
                folder / name,
                options,
                overwrite=overwrite,
                resume=resume,
                viz=viz,
                progress=progress,
                batch=batch,
            )
        except media.MediaError as error:
            if len(inputs) == 1:
                raise
            log.warning("Left out: %s", error)
            unreadable.append(file)
            continue
        finished.append(run)
        log.info("%s", summary(run))
    return finished, unreadable


def _tokenize_side_by_side(
    tokenizer: ElasticTokenizer,
    result_folders: Iterable[ResultFolder],
    options: EncodeOptions,
    batch: int,
    bar: tqdm,
) -> tuple[list[FinishedFile], list[Place]]:
    """The finished files, and those that could not be read.

    Args:
      tokenizer: the model.
      result_folders: one of each file; a file is opened when its turn comes.
      options: which frames are read, and how the token counts are chosen.
      batch: files that go through the model at once.
      bar: counts files.
    """
    open_folders: dict[EncodeSession, ResultFolder] = {}
    shares: dict[EncodeSession, float] = {}  # of each open file that is done
    finished: list[FinishedFile] = []
    unreadable: list[Place] = []

    def leave_out(result_folder: ResultFolder, error: Exception) -> None:
        log.warning("Left out: %s", error)
        unreadable.append(result_folder.source)
        result_folder.remove()
        advance()

    def advance(session: EncodeSession | None = None, done: float = 0.0) -> None:
        if session is not None:
            shares[session] = done / (session.num_blocks or done + 1)
        _advance(bar, len(finished) + len(unreadable) + sum(shares.values()))

    def opened() -> Iterator[EncodeSession]:
        for result_folder in result_folders:
            try:
                session = result_folder.open(tokenizer, options, alone=False)
            except media.MediaError as error:
                leave_out(result_folder, error)
                continue
            open_folders[session] = result_folder
            session.on_progress = functools.partial(advance, session)
            yield session

    try:
        for session, block in tokenizer.stream_many(opened(), batch=batch):
            if block is None or isinstance(block, media.MediaError):
                shares.pop(session, None)
            if isinstance(block, media.MediaError):
                leave_out(open_folders.pop(session), block)
            elif block is not None:
                open_folders[session].add(block)
            else:
                finished.append(open_folders[session].finish(progress=False))
                open_folders.pop(session).close()
                log.info("%s", summary(finished[-1]))
                advance()
    finally:
        for result_folder in open_folders.values():
            result_folder.close()
    return finished, unreadable


def summary(run: FinishedFile) -> str:
    """The closing table of a run: what was asked, and what came."""
    clip, totals, file = run.report["clip"], run.report["totals"], run.report["file"]
    size = "x".join(map(str, clip.get("frame", [clip["resolution"]] * 2)))
    tiles = totals.get("tiles", 1)
    unit = "block" if tiles == 1 else "tile of a block"
    if tiles > 1:
        size += f", {tiles} tiles of {clip['resolution']}x{clip['resolution']}"
    shown = "an image" if clip["is_image"] else f"{totals['frames']} frames"
    source = "x".join(map(str, clip["source"]))
    if file["rate"]:
        source += f" at {file['rate']:.4g} frames/s, read at {clip['rate']:.4g}"
    spent = f"{totals['bits_per_pixel']:.4g} bits per pixel"
    if totals["kbit_per_second"] is not None:
        spent = f"{totals['kbit_per_second']:.4g} kbit/s, {spent}"
    worst = totals["worst_block_psnr"]
    rows = {
        "original": source,
        "blocks": f"{totals['blocks']} ({shown}, {size})",
        "asked": _asked(run.report, unit),
        f"tokens per {unit}": f"mean {totals['mean_tokens']:.1f}, min {totals['min_tokens']}, "
        f"max {totals['max_tokens']} of {clip['tokens_per_block']}",
        "PSNR": f"{totals['psnr']:.2f} dB, worst block {worst:.2f} dB (number {totals['worst_block']})",
        "spent": f"{spent} ({totals['compression_ratio']:.0f} times less than 8-bit RGB)",
        "speed": f"{totals['frames_per_second']:.3g} frames/s, "
        f"{totals['passes_per_block']:.2f} passes per {unit}",
        "files": f"{', '.join(file.name for file in run.files)} in {run.folder}",
    }
    width = max(map(len, rows))
    return "\n".join(
        [f"{run.source}:", *(f"  {name:{width}}  {value}" for name, value in rows.items())]
    )


def _asked(report: Mapping[str, Any], unit: str) -> str:
    """The target of a run in words, and whether it was met."""
    asked, clip, totals = report["asked"], report["clip"], report["totals"]
    if asked["avg_tokens"] is not None:
        return f"{asked['avg_tokens']:g} tokens per {unit} in the mean"
    if asked["bitrate"] is not None:
        return f"{asked['bitrate']:g} kbit/s"
    threshold = clip["threshold"]
    if threshold is None:
        return f"{asked['num_tokens']} tokens per {unit}"
    if asked["metric"] != "mse":
        wanted = f"{asked['metric']} of at most {threshold:g}"
    else:
        wanted = f"{psnr_of_mse(threshold):.2f} dB (threshold {threshold:g})"
    return f"{wanted}, met by {totals['blocks_met']} of {totals['blocks']} blocks"

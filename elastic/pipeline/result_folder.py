"""The folder of results of one file: its lock, the unfinished files that an interrupted run resumes from, and the results."""

import contextlib
import json
import logging
import math
import os
import shutil
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from tqdm import tqdm

from elastic import media, report
from elastic.io import json_file
from elastic.io.atomic import locked, move_files
from elastic.io.progress import hide_bar
from elastic.media.location import Place, local_path, name_of
from elastic.metrics import psnr_of_mse
from elastic.pipeline.load_model import run_facts
from elastic.report.strip import TileCounts
from elastic.tokenizer import BlockResult, ElasticTokenizer, EncodeOptions
from elastic.tokenizer.resume import remove_resume_log
from elastic.tokenizer.session import EncodeSession
from elastic.tokens import TokenizedClip, npz_file

log = logging.getLogger(__name__)

TOKENS, REPORT, PLOT = "tokens.npz", "report.json", "plot.png"
VIDEO, PICTURE = "viz.mp4", "viz.png"
RESULTS = (TOKENS, REPORT, VIDEO, PICTURE, PLOT)  # every file name that a run may write
UNFINISHED, PART = "unfinished", "tokens.part"


class FinishedFile(NamedTuple):
    """A tokenized file: its folder, the paths of its results, and the content of report.json."""

    source: Place
    folder: Path
    files: tuple[Path, ...]
    report: dict[str, Any]


class ResultFolder:
    """The folder of results of one file, from opening the file to its finished results.

    Args:
      source: the image or video.
      folder: the folder of the results; it is made if it does not exist.
      overwrite: False refuses a folder that holds results.
      resume: False starts an interrupted run again from the first block.
      viz: draw the picture or the video. All frames are kept on disk until it is drawn.
    """

    def __init__(self, source: Place, folder: Path, *, overwrite: bool, resume: bool, viz: bool):
        self.source, self._folder, self._work = source, folder, folder / UNFINISHED
        self._overwrite, self._resume, self._viz = overwrite, resume, viz
        self._stack = contextlib.ExitStack()
        self._made: list[Path] = []
        self._locked = False
        self._session: EncodeSession | None = None
        self._frames: _Frames | None = None
        self._costs: list[dict[str, Any]] = []
        self._squares: list[int] = []  # of each block: the sum of squared errors, 8-bit values
        self._about: dict[str, Any] = {}  # what was asked, of which file, with which devices
        self._earlier_seconds = 0.0  # of the run that is resumed
        self._started = time.perf_counter()

    @property
    def is_short(self) -> bool:
        """Whether there is nothing to resume: the file is not open, or has one block only."""
        return self._session is None or self._session.num_blocks == 1

    def open(
        self,
        tokenizer: ElasticTokenizer,
        options: EncodeOptions,
        *,
        alone: bool = True,
        batch: int = 1,
    ) -> EncodeSession:
        """Opens the file, locks the folder, and returns the session that tokenizes the remaining blocks.

        Args:
          tokenizer: the model.
          options: which frames are read, and how the token counts are chosen.
          alone: no other file goes through the model in the same batch.
          batch: tiles that go through the model at once where the file is alone.

        Raises:
          ValueError: the file cannot be read, the options are wrong, or another process writes into the folder.
          OSError: the folder cannot be written to.
        """
        # First, so that a bad file or a wrong option is refused before anything is written.
        session = tokenizer.open_session(self.source, options, batch=batch)
        self._check_folder()
        self._make_folders()
        self._lock()
        resume_path = self._work / PART
        if not self._resume:
            remove_resume_log(resume_path)
        if self._viz:
            frames = tokenizer.config.frames_per_block
            self._frames = _Frames(self._work, session.layout.frame, frames)
        if not session.has_budget:
            # A resumed run must not skip a block whose frames are missing from the files of `_Frames`.
            drawable = math.inf if self._frames is None else self._frames.num_blocks
            session.open_or_replace_resume_log(
                resume_path, max_snapshot_block=drawable if alone else 0
            )
        self._session = session
        self._about = {
            "asked": options.to_json(),
            "file": {"name": name_of(self.source), "rate": session.source_rate},
            "run": run_facts(tokenizer),
        }
        for about in session.recorded:
            self._add_cost(about["passes"], about["seconds"], about["squares"])
            self._earlier_seconds += about["seconds"]
        if session.num_recorded:
            log.info("%s goes on after block %d.", self.source, session.num_recorded)
        if self._frames is not None:
            self._stack.enter_context(self._frames.writing(session.first_block))
        self._started = time.perf_counter()
        return session

    def add(self, block: BlockResult) -> None:
        """Adds the next block: its frames and what it cost."""
        if self._frames is not None:
            self._frames.add(block.frames, block.reconstruction)
        squares = block.squares
        self._add_cost(block.passes, block.seconds, squares)
        if block.tiles:
            self._costs[-1]["frame_loss"] = squares / block.frames.size * (2 / 255) ** 2

    def finish(self, *, progress: bool = True) -> FinishedFile:
        """Writes the results and removes the unfinished files."""
        assert self._session is not None
        seconds = time.perf_counter() - self._started + self._earlier_seconds
        tokens = self._session.tokens()
        tokens.save(self._work / TOKENS)
        totals = {"seconds": seconds, "psnr": _psnr(sum(self._squares), tokens, tokens.num_frames)}
        for number, squares in enumerate(self._squares):
            first = number * tokens.frames_per_block
            frames = min(tokens.frames_per_block, tokens.num_frames - first)
            self._costs[number]["psnr"] = _psnr(squares, tokens, frames)
        found = report.build_report(tokens, per_block=self._costs, totals=totals, **self._about)
        json_file.write_json(self._work / REPORT, found)
        report.plot_report(found, self._work / PLOT)
        if self._frames is not None:
            self._frames.flush()
            _draw(tokens, found["blocks"], self._frames, self._work, progress=progress)
        files = tuple(self._folder / name for name in RESULTS if (self._work / name).exists())
        move_files(self._work, self._folder, RESULTS)
        self._stack.close()
        shutil.rmtree(self._work, ignore_errors=True)
        return FinishedFile(self.source, self._folder, files, found)

    def remove(self) -> None:
        """Removes the unfinished files and the folders that `open` made, for a file that cannot be tokenized."""
        self.close()
        if self._locked:
            shutil.rmtree(self._work, ignore_errors=True)
        for folder in reversed(self._made):
            with contextlib.suppress(OSError):  # another process has put a file there
                folder.rmdir()

    def close(self) -> None:
        """Closes the files and gives up the lock. Unfinished files stay for a later run."""
        if self._session is not None:
            self._session.close()
        self._stack.close()

    def _add_cost(self, passes: int, seconds: float, squares: int) -> None:
        """Adds the passes, seconds and squared errors of one block."""
        self._costs.append({"passes": passes, "seconds": seconds})
        self._squares.append(squares)

    def _check_folder(self) -> None:
        folder = self._folder
        if folder.exists() and not folder.is_dir():
            raise ValueError(f"{folder} is a file; name a folder for the results.")
        present = [name for name in RESULTS if (folder / name).exists()]
        path = local_path(self.source)
        source = None if path is None else path.resolve()
        if source is not None and (
            source in [(folder / name).resolve() for name in present]
            or self._work.resolve() in source.parents
        ):
            raise ValueError(
                f"The results would take the place of {self.source} itself; name another folder."
            )
        if present and not self._overwrite:
            raise ValueError(
                f"{folder} holds results already ({', '.join(present)}); name another folder, or leave "
                "out --overwrite=False."
            )
        # Every run writes tokens.npz and report.json. Without them, a viz.mp4 may be the user's own.
        signed = [name for name in present if name in (TOKENS, REPORT)]
        if present and not (signed and all(_is_ours(folder / name) for name in signed)):
            raise ValueError(
                f"{folder} holds {', '.join(present)}, but not as an earlier run left them; name another folder, so that "
                "nothing of yours is replaced."
            )

    def _make_folders(self) -> None:
        for place in reversed([self._work, *self._work.parents]):
            if not place.exists():
                place.mkdir(exist_ok=True)
                self._made.append(place)

    def _lock(self) -> None:
        self._locked = self._stack.enter_context(locked(self._work / ".lock"))
        if not self._locked:
            raise ValueError(
                f"Another process is writing into {self._folder}; wait for it, or choose another output_folder."
            )


def _psnr(squares: int, tokens: TokenizedClip, num_frames: int) -> float:
    """PSNR in dB of so many frames, from the sum of their squared errors."""
    values = num_frames * math.prod(tokens.frame) * 3
    return psnr_of_mse(squares / values * (2 / 255) ** 2)


def _is_ours(path: Path) -> bool:
    """Whether a token file or a report was written by a run."""
    try:
        if path.name == TOKENS:
            return npz_file.is_sealed(path)
        return {"clip", "totals"} <= set(json.loads(path.read_bytes()))
    except (OSError, ValueError, TypeError, RecursionError):
        return False


class _Frames:
    """Originals and reconstructions of a clip, kept in two files of raw pixels until the picture is drawn."""

    def __init__(self, work: Path, size: tuple[int, int], frames_per_block: int):
        self._paths = [work / f"{name}.rgb" for name in ("original", "reconstruction")]
        self._shape = (size[1], size[0], 3)
        self._block_bytes = self._frame_bytes * frames_per_block
        self._files: list[Any] = []

    @contextlib.contextmanager
    def writing(self, num_blocks: int) -> Iterator[None]:
        """Opens both files for `add`. Their first `num_blocks` blocks, which an earlier run wrote, stay; the rest is cut off."""
        with contextlib.ExitStack() as stack:
            for path in self._paths:
                path.touch()
                file = stack.enter_context(open(path, "r+b"))
                file.truncate(num_blocks * self._block_bytes)
                file.seek(0, os.SEEK_END)
                self._files.append(file)
            yield

    def add(self, original: np.ndarray, reconstruction: np.ndarray) -> None:
        """Appends the frames of one block, uint8 [n, rows, columns, 3]."""
        for file, frames in zip(self._files, (original, reconstruction), strict=True):
            file.write(np.ascontiguousarray(frames).data)

    @property
    def num_blocks(self) -> int:
        """The number of whole blocks that both files hold."""
        sizes = [path.stat().st_size if path.exists() else 0 for path in self._paths]
        return min(sizes) // self._block_bytes

    def flush(self) -> None:
        """Flushes both files, so that `read` finds all frames."""
        for file in self._files:
            file.flush()

    def read(self) -> tuple[Iterable[np.ndarray], Iterable[np.ndarray]]:
        """Originals and reconstructions, frame by frame."""
        original, reconstruction = (self._read(path) for path in self._paths)
        return original, reconstruction

    @property
    def _frame_bytes(self) -> int:
        return int(np.prod(self._shape))

    def _read(self, path: Path) -> Iterator[np.ndarray]:
        with open(path, "rb") as file:
            while pixels := file.read(self._frame_bytes):
                yield np.frombuffer(pixels, np.uint8).reshape(self._shape)


def _draw(
    tokens: TokenizedClip,
    blocks: list[dict[str, Any]],
    frames: _Frames,
    work: Path,
    *,
    progress: bool,
) -> None:
    """Draws the picture or video of original, reconstruction and token counts.

    Args:
      tokens: of the clip.
      blocks: its blocks as report.json has them.
      frames: originals and reconstructions.
      work: the folder of the unfinished results.
      progress: show a bar.
    """
    originals, reconstructions = frames.read()
    of_tiles = tokens.counts.reshape(tokens.num_blocks, tokens.num_tiles)
    several = tokens.num_tiles > 1
    tiles = TileCounts(tokens.layout, of_tiles) if several else None
    most = tokens.tokens_per_block * tokens.num_tiles
    counts, losses, met = ([block[name] for block in blocks] for name in ("kept", "loss", "met"))
    if tokens.is_image:
        (original,), (reconstruction,) = originals, reconstructions
        picture = report.strip_picture(
            original,
            reconstruction,
            count=counts[0],
            tokens_per_block=most,
            loss=losses[0],
            met=met[0],
            tiles=tiles,
        )
        media.write_image(work / PICTURE, picture)
        return
    drawn = report.strip_frames(
        originals,
        reconstructions,
        counts=counts,
        tokens_per_block=most,
        frames_per_block=tokens.frames_per_block,
        losses=losses,
        met=met,
        rate=tokens.rate,
        tiles=tiles,
    )
    bar = tqdm(
        drawn,
        total=tokens.num_frames,
        desc=VIDEO,
        unit="frame",
        leave=False,
        disable=hide_bar(progress),
    )
    media.write_video(work / VIDEO, bar, tokens.rate)

"""Tokenizes a data set into shards, in one process or several that do not communicate. An interrupted run can be restarted.

`dataset_shards.py` says how a shard is made.
"""

import dataclasses
import functools
import logging
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from elastic.io.progress import hide_bar
from elastic.media.folders import IMAGE_SUFFIXES
from elastic.media.location import Place
from elastic.pipeline.clip_files import ClipResult, tokenize_clips
from elastic.pipeline.contact_sheet import sample_clips
from elastic.pipeline.dataset_plan import list_inputs
from elastic.pipeline.dataset_shards import Outcome, Shards, shard_name
from elastic.tokenizer import ElasticTokenizer, EncodeOptions

__all__ = [
    "Outcome",
    "Progress",
    "check_inputs",
    "identity",
    "list_inputs",
    "shard_name",
    "tokenize_dataset",
]

log = logging.getLogger(__name__)


def tokenize_dataset(
    tokenizer: ElasticTokenizer,
    inputs: Mapping[str, Place],
    folder: str | Path,
    options: EncodeOptions,
    *,
    files_per_shard: int = 64,
    process_index: int = 0,
    process_count: int = 1,
    batch: int = 1,
    append: bool = False,
    wait: bool = False,
    progress: bool = True,
) -> Outcome:
    """Tokenizes this process's shards of a data set: `process_index`, `process_index + process_count`, ...

    A second call resumes the run; the number of processes may differ. It tokenizes files anew that have changed since, and names them.
    A process that finds all shards finished writes the summary.

    Args:
      tokenizer: the model.
      inputs: {id: file}, as `list_inputs` gives them.
      folder: the folder of the shards; it is made if it does not exist.
      options: which frames are read, and how the token counts are chosen.
      files_per_shard: files in a shard; the last shard may have fewer.
      process_index, process_count: the index of this process, from 0, and the number of processes.
      batch: clips that go through the model together.
      append: tokenize files that the folder has gained since the run began, as further shards; False refuses them.
      wait: return only when all shards of the run are finished, or when no process works on the unfinished ones.
      progress: show a progress bar with the rate and the remaining time.

    Raises:
      ValueError: the options contradict each other, or the folder holds another run's shards.
      OSError: the folder cannot be written to.
    """
    check_inputs(inputs, options)
    model, settings = identity(tokenizer, options)
    shards = Shards.open_run(
        inputs,
        Path(folder),
        files_per_shard=files_per_shard,
        model=model,
        options=settings,
        append=append,
    )
    mine = range(process_index, shards.plan.num_shards, process_count)
    with Progress(shards, mine, shown=progress) as bar:
        try:
            # Once more at the end: a process that held a lock may have been killed since, and another one may have
            # begun to make a finished shard anew, because a file of it has changed.
            for shard in (*mine, *mine):
                with shards.held(shard) as held:
                    while held and not shards.finished(shard):
                        todo = shards.todo(shard)
                        for done in tokenize_clips(tokenizer, todo, options, batch=batch):
                            if shards.take(*done):
                                bar.add(done[1])
                        if shards.pack(shard):
                            place = mine.index(shard) + 1, len(mine)
                            log.info("%s is finished (%d of %d).", shard_name(shard), *place)
        except (KeyboardInterrupt, SystemExit):
            log.warning("Stopped; the same command goes on from here.")
            raise
    if wait:
        shards.wait()
    return shards.close_run(functools.partial(sample_clips, tokenizer, inputs, options))


def identity(
    tokenizer: ElasticTokenizer, options: EncodeOptions
) -> tuple[dict[str, Any], dict[str, Any]]:
    """What the tokens of a run depend on, as JSON values: of the model, with a digest of its weights, and of the options.

    Raises:
      ValueError: the options would fail for every file.
    """
    _check_options(tokenizer, options)
    model = {
        "model_id": tokenizer.model_id,
        "config_hash": tokenizer.config.config_hash(),
        "weights": tokenizer.weights_digest,
        "tokens_per_block": tokenizer.config.tokens_per_block,
    }
    return model, options.to_json() | {
        "dtype": str(np.dtype(tokenizer.codec.dtype)),
        "window_blocks": tokenizer.window_blocks,
        "context": tokenizer.context,
        "search_width": tokenizer.search_width,
    }


class Progress:
    """The progress bar of this process: files, clips and frames per second, how long the model waits, remaining time.

    Args:
      shards: the shards of the run.
      mine: the shards of this process.
      shown: show the bar; at the end the log has its last figures in any case.
      models: how many models work at once.
    """

    def __init__(self, shards: Shards, mine: Sequence[int], *, shown: bool, models: int = 1):
        total = sum(len(shards.plan.names(shard)) for shard in mine)
        done = sum(shards.num_done(shard) for shard in mine)
        self._bar = tqdm(
            total=total,
            initial=done,
            unit="file",
            disable=hide_bar(shown),
            dynamic_ncols=True,
            bar_format="{l_bar}{bar}| {n_fmt}/{total_fmt} [{elapsed}<{remaining}{postfix}]",
        )
        self._models = models
        self._clips = self._frames = 0
        self._model_seconds, self._started = 0.0, time.perf_counter()
        if done:
            log.info("%d of %d files have been tokenized before.", done, total)

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.close()
        if self._clips:
            log.info("Files of this process: %d, %s.", self._clips, self._rates())

    def add(self, result: ClipResult) -> None:
        """Counts one finished file."""
        self._clips += 1
        self._frames += result.num_frames
        self._model_seconds += result.model_seconds
        self._bar.set_postfix_str(self._rates(), refresh=False)
        self._bar.update()

    def _rates(self) -> str:
        seconds = time.perf_counter() - self._started
        waits = max(0.0, 1 - self._model_seconds / (seconds * self._models))
        return f"{self._clips / seconds:.3g} clips/s, {self._frames / seconds:.1f} frames/s, model waits {waits:.0%}"


def check_inputs(inputs: Mapping[str, Place], options: EncodeOptions) -> None:
    """Refuses options that do not fit some files, before a plan is written.

    Raises:
      ValueError: a bitrate is asked for, and there are images.
    """
    images = [name for name in inputs if Path(name).suffix.lower() in IMAGE_SUFFIXES]
    if options.bitrate is not None and images:
        raise ValueError(
            f"bitrate={options.bitrate} needs videos, but {len(images)} files are images, such as {images[0]!r}; "
            "give another target, or leave the images out."
        )


def _check_options(tokenizer: ElasticTokenizer, options: EncodeOptions) -> None:
    """Refuses options that would fail for every file."""
    trial = options
    if options.bitrate is not None:
        # A bitrate becomes a token count with the frame rate of each clip. Here any valid count will do.
        mean = tokenizer.config.min_toks
        trial = dataclasses.replace(options, bitrate=None, avg_tokens=mean)
    size = tokenizer.config.resolution
    tokenizer.open_session(np.zeros((1, size, size, 3), np.uint8), trial)

"""The checkpoints of a run: written, found, checked, read.

A checkpoint is whole or it is not there: orbax writes it beside its place, in the background, and renames
it when every host is done. It holds the state to the last bit, the position in the data and the
configuration, each host writes its own part, and another mesh or number of hosts may read it. What a disk
has done to it since is seen by the checksums that lie beside the state.
"""

import errno
import itertools
import json
import logging
import os
import pathlib
import re
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath
from flax import serialization
from orbax.checkpoint import checkpoint_managers

from elastic.config import ElasticTokConfig
from elastic.training.checksums import checksums
from elastic.training.config import SaveConfig
from elastic.training.step import TrainState

log = logging.getLogger(__name__)

FOLDER = "checkpoints"  # in a run's folder
DAMAGED = "damaged"  # in that one: what could not be read
_STATE, _NOTES = "state", "notes"  # the two items of a checkpoint
_SUMS, _NOTES_SUM = "checksums", "notes_checksum"  # parts of the notes


class DamagedCheckpoint(ValueError):
    """Parts of a checkpoint are missing or have changed since it was written."""


class Restored(NamedTuple):
    """A checkpoint that was read: its step, what was written down beside the state, the state."""

    step: int
    notes: dict[str, Any]
    state: TrainState


class Checkpoints:
    """The checkpoints of a run.

    Args:
      folder: the run's folder.
      save: which are written and kept, and where.
    """

    def __init__(self, folder: pathlib.Path, save: SaveConfig):
        self.path = epath.Path(absolute(save.path) if save.path else folder.absolute() / FOLDER)
        policies: list[Any] = [checkpoint_managers.LatestN(save.keep)]
        if save.milestone_freq:
            policies.append(checkpoint_managers.EveryNSteps(save.milestone_freq))
        options = ocp.CheckpointManagerOptions(
            preservation_policy=checkpoint_managers.AnyPreservationPolicy(policies),
            save_decision_policy=checkpoint_managers.FixedIntervalPolicy(1),  # the loop decides
            cleanup_tmp_directories=True,
            step_format_fixed_length=8,
        )
        with _explained(f"{self.path} cannot be used for checkpoints"):
            self._manager = ocp.CheckpointManager(
                self.path, options=options, item_names=(_STATE, _NOTES)
            )

    def newest(self) -> int | None:
        """The step of the newest checkpoint that was written to its end."""
        return self._manager.latest_step()

    def save(self, step: int, state: TrainState, notes: dict[str, Any]) -> None:
        """Begins to write a checkpoint; the state may be donated as soon as this returns.

        Raises:
          OSError: this one, or an earlier one in the background, cannot be written.
        """
        tree = _tree(state)
        notes = notes | {_SUMS: checksums(tree)}
        notes[_NOTES_SUM] = _sum_of(notes)
        with _explained(
            f"The checkpoint of step {step}, or the one before it, was not saved in {self.path}"
        ):
            self._manager.save(
                step,
                args=ocp.args.Composite(
                    **{_STATE: ocp.args.StandardSave(tree), _NOTES: ocp.args.JsonSave(notes)}
                ),
                force=True,
            )

    def restore_newest(
        self,
        like: TrainState,
        shardings: TrainState,
        check: Callable[[dict[str, Any]], None] = lambda notes: None,
    ) -> Restored | None:
        """The newest checkpoint that is whole; None if there is none at all.

        Damaged ones after it are moved into the folder `damaged`, and said, but only when an older one can be read: else it may be the disk
        that is not well. On many hosts a damaged one is an error: the hosts that can read their parts would wait for the one that cannot.

        Args:
          check: raises if the run does not want a checkpoint with these notes.

        Raises:
          OSError: the disk does not give it.
          ValueError: none is whole, or the newest is not of this model, optimizer and options.
        """
        damaged: dict[int, DamagedCheckpoint] = {}
        for step in sorted(self._manager.all_steps(), reverse=True):
            try:
                notes = self.notes(step)
                check(notes)
                state = self._restore(step, like, shardings, notes)
            except DamagedCheckpoint as error:
                damaged[step] = error
                if jax.process_count() > 1:
                    break
            else:
                self._set_aside(damaged, step)
                return Restored(step, notes, state)
        if damaged:
            raise damaged[max(damaged)]
        return None

    def _set_aside(self, damaged: Mapping[int, DamagedCheckpoint], step: int) -> None:
        for other, error in damaged.items():
            folder = self.path / DAMAGED
            names = (f"{other:08d}-{n}" if n else f"{other:08d}" for n in itertools.count())
            with _explained(f"{self._place(other)} cannot be moved to {folder}"):
                folder.mkdir(exist_ok=True)
                place = next(folder / name for name in names if not (folder / name).exists())
                self._place(other).rename(place)
            log.warning("%s It is in %s now, and the run goes on from step %d.", error, place, step)
        if damaged:
            self._manager.reload()

    def notes(self, step: int) -> dict[str, Any]:
        """What was written down beside the state of a step.

        Raises:
          OSError, DamagedCheckpoint: it cannot be read.
        """
        with _explained(self._unreadable(step), DamagedCheckpoint):
            found = self._manager.restore(
                step, args=ocp.args.Composite(**{_NOTES: ocp.args.JsonRestore()})
            )
        _check_notes(found[_NOTES], self._unreadable(step))
        return found[_NOTES]

    def _restore(
        self, step: int, like: TrainState, shardings: TrainState, notes: dict[str, Any]
    ) -> TrainState:
        """The state of a step, laid out as `shardings` say, whatever the mesh it was saved on."""
        target = jax.tree.map(
            lambda leaf, place: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place),
            like,
            shardings,
        )
        with _explained(self._unreadable(step), DamagedCheckpoint):
            restored = self._manager.restore(
                step, args=ocp.args.Composite(**{_STATE: ocp.args.StandardRestore(_tree(target))})
            )
        _compare(restored[_STATE], notes, self._unreadable(step))
        values: dict[str, Any] = {
            name: None
            if part is None
            else serialization.from_state_dict(part, restored[_STATE][name])
            for name, part in like._asdict().items()
        }
        return TrainState(**values)

    def _place(self, step: int) -> epath.Path:
        return self.path / f"{step:08d}"

    def _unreadable(self, step: int) -> str:
        older = max((other for other in self._manager.all_steps() if other < step), default=None)
        alone = older is None or jax.process_count() == 1
        way_out = "" if alone else f"; remove that folder to go on from step {older}"
        return f"The checkpoint of step {step}, {self._place(step)}, cannot be read{way_out}"

    def wait(self) -> None:
        """Returns when everything is written.

        Raises:
          OSError: it could not be.
        """
        with _explained(f"A checkpoint was not saved in {self.path}"):
            self._manager.wait_until_finished()

    def close(self) -> None:
        """Waits and lets go."""
        with _explained(f"A checkpoint was not saved in {self.path}"):
            self._manager.close()


def absolute(path: str) -> str:
    """A path that does not depend on the working folder; a bucket's address as it is."""
    return path if "://" in path else os.path.abspath(path)


def is_checkpoint(folder: str) -> bool:
    """Whether this is the folder of one checkpoint of a run."""
    return all((epath.Path(folder) / item).is_dir() for item in (_STATE, _NOTES))


def load_checkpoint_params(folder: str) -> tuple[ElasticTokConfig, dict[str, Any]]:
    """The model and its parameters, their running mean where there is one, of one checkpoint of a run, as NumPy arrays.

    Raises:
      OSError, DamagedCheckpoint: it cannot be read.
    """
    path = epath.Path(folder).absolute()
    unreadable = f"The checkpoint {path} cannot be read"
    with _explained(unreadable, DamagedCheckpoint):
        notes = ocp.JsonCheckpointHandler().restore(path / _NOTES)
        reader = ocp.PyTreeCheckpointHandler()
        saved = reader.metadata(path / _STATE).tree
        wanted = "ema" if "ema" in saved else "params"
        shapes = {wanted: saved[wanted]}
        # As NumPy's: the devices that it was saved from need not be here.
        how = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), shapes)
        args = ocp.args.PyTreeRestore(item=shapes, restore_args=how, partial_restore=True)
        restored = reader.restore(path / _STATE, args=args)
    _check_notes(notes, unreadable)
    _compare(restored, notes, unreadable)
    return ElasticTokConfig.from_json_dict(notes["model"]), restored[wanted]


def _sum_of(notes: Mapping[str, Any]) -> int:
    rest = {name: value for name, value in notes.items() if name != _NOTES_SUM}
    return zlib.crc32(json.dumps(rest, sort_keys=True).encode())


def _check_notes(notes: Mapping[str, Any], unreadable: str) -> None:
    if _NOTES_SUM in notes and notes[_NOTES_SUM] != _sum_of(notes):
        raise DamagedCheckpoint(f"{unreadable}: its notes have changed since they were written.")


def _compare(tree: dict[str, Any], notes: Mapping[str, Any], unreadable: str) -> None:
    """Compares what was read of a state with its checksums; earlier versions wrote none."""
    written = notes.get(_SUMS)
    if written is None:
        return
    for path, value in checksums(tree).items():
        if written.get(path) != value:
            raise DamagedCheckpoint(
                f"{unreadable}: '{path}' has changed since it was written (checksum {value}, not {written.get(path)})."
            )


def _tree(state: TrainState) -> dict[str, Any]:
    """Nested dicts: names in a checkpoint do not depend on the classes of a library."""
    return {
        name: serialization.to_state_dict(value)
        for name, value in state._asdict().items()
        if value is not None
    }


@contextmanager
def _explained(what: str, otherwise: type[ValueError] = ValueError) -> Iterator[None]:
    """Errors of orbax and of what lies under it, as one that says what was not done and why.

    Args:
      otherwise: what becomes of errors that are not the operating system's.
    """
    try:
        yield
    except Exception as error:  # orbax raises this very class for a chunk that cannot be read
        # tensorstore's errors are ValueErrors; those of files hold the number of the system's error.
        number = re.search(r"os_error_code='(\d+)'", f"{error} {error.__cause__}")
        if number is not None and int(number[1]) != errno.ENOENT:
            raise OSError(f"{what}: {os.strerror(int(number[1]))}.") from error
        reason = re.split(r"\[tensorstore_spec=|See full TensorStore", str(error))[0]
        said = f"{what}: {' '.join(reason.split()).rstrip('.')[:300]}."
        if isinstance(error, OSError) and not isinstance(error, FileNotFoundError):
            raise OSError(said) from error
        raise otherwise(said) from error

"""Trains a tiny model for three steps, or goes on from such a run: two environments show that each reads the other's checkpoints.

python tests/support/exchange_checkpoint.py write FOLDER     # in one environment
python tests/support/exchange_checkpoint.py resume FOLDER    # in another one: three more steps, on a copy
"""

import pathlib
import shutil
import sys
import tempfile

ROOT = pathlib.Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

FIRST, LAST = 3, 6  # steps after which the run is left, and after which it ends


def main(action: str, folder: pathlib.Path) -> None:
    """Does as the module's docstring says.

    Raises:
      ValueError: the action is neither 'write' nor 'resume', or the resumed run began anew.
    """
    from tiny_run import MODELS, make_clips, records, settings

    from elastic.training.loop import train

    clips, run = folder / "clips", folder / "run"
    if action == "write":
        shutil.rmtree(folder, ignore_errors=True)
        clips.mkdir(parents=True)
        make_clips(clips)
        train(settings(clips, run, total_steps=FIRST), MODELS["fsq"])
    elif action == "resume":
        with tempfile.TemporaryDirectory() as work:
            copy = pathlib.Path(work) / "run"
            shutil.copytree(run, copy)
            before = len(records(copy))
            train(settings(clips, copy, total_steps=LAST), MODELS["fsq"])
            steps = [record["step"] for record in records(copy)]
            if steps[:before] != steps[:FIRST] or len(steps) != LAST:
                raise ValueError(
                    f"The run of {folder} did not go on from its checkpoint: steps {steps}."
                )
    else:
        raise ValueError(f"{action=} must be 'write' or 'resume'.")


if __name__ == "__main__":
    main(sys.argv[1], pathlib.Path(sys.argv[2]).absolute())

"""The commands of the scripts, run in this process, and what they leave in a folder."""

from elastic.cli import app
from scripts import decode as decode_script
from scripts import inference as inference_script


def names(folder):
    """Every file and folder below, hidden ones too."""
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


def infer(*flags):
    return app.run(inference_script.INFERENCE, inference_script.tokenize, flags)


def decode(*flags):
    return app.run(decode_script.DECODE, decode_script.decode, flags)

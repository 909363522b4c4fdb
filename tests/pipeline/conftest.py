"""What the tests of several files need and what takes long to make."""

import pathlib
import re
import shlex

import pytest
from commands import infer
from small_models import CASES, CLIP, load_tokenizers

ROOT = pathlib.Path(__file__).resolve().parents[2]


@pytest.fixture(scope="session")
def tokenizers(golden):
    return load_tokenizers(golden)


@pytest.fixture(scope="session")
def documented(golden, tmp_path_factory):
    """The command that scripts/README.md documents, run with other paths and the sizes of a small model."""
    readme = (ROOT / "scripts" / "README.md").read_text(encoding="utf-8")
    found = re.search(r"^python3 -u scripts/inference\.py(?:.*\\\n)+.*$", readme, re.MULTILINE)
    assert found is not None
    flags = dict(
        flag.split("=", 1)
        for flag in shlex.split(found[0].replace("\\\n", " "))
        if flag[:2] == "--"
    )
    folder = tmp_path_factory.mktemp("documented") / "not there yet" / "out"
    # The original's README puts a `params::` before a path that has one already.
    flags["--load_checkpoint"] = f"params::params::{golden}/fsq/ckpt/params_scan_fp32"
    flags["--input_path"] = str(golden / "media" / CLIP)
    flags["--output_folder"] = str(folder)
    changes = flags["--update_elastic_config"].removesuffix(")")
    for name, value in CASES["fsq"].items():  # what the command says already gets another value
        changes = re.sub(rf"\b{name}=(\([^)]*\)|[^,]*),?", "", changes)
        changes = f"{changes.rstrip(',')},{name}={value!r}"
    flags["--update_elastic_config"] = f"{changes})"
    more = ["--fps=4", "--max_frames=11", "--threshold=0.522"]
    command = [*(f"{name}={value}" for name, value in flags.items()), *more]
    assert infer(*command) == 0
    return folder, flags

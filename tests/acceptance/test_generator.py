"""The example of a generator: it trains on a clip's tokens, and what it samples is decoded."""

import pathlib
import subprocess
import sys

import pytest

from elastic import media
from elastic.tokens import TokenizedClip

ROOT = pathlib.Path(__file__).resolve().parents[2]


@pytest.mark.slow
def test_a_generator_continues_a_clip(tmp_path):
    command = [sys.executable, ROOT / "example" / "train_generator.py", f"--output_folder={tmp_path}",
               "--steps=2", "--max_frames=16", "--prompt_blocks=1", "--num_tokens=256"]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "step 2:" in done.stdout
    tokens = TokenizedClip.load(tmp_path / "continued.npz")
    assert tokens.counts.tolist() == [256, 256]
    assert media.probe(tmp_path / "continued.mp4").num_frames == 32

"""The models and the clip in example/: what the README shows works, and tokens follow the content."""

import json
import pathlib
import re

import jax
import numpy as np
import pytest

from elastic import checkpoints, media
from elastic.config import PRESETS, ElasticTokConfig, load_config
from elastic.distributed.mesh import make_mesh
from elastic.tokenizer import ElasticTokenizer
from elastic.tokens import TokenizedClip

pytestmark = pytest.mark.usefixtures("optimized")

ROOT = pathlib.Path(__file__).resolve().parents[2]
EXAMPLE = ROOT / "example"
# Errors that a model reaches somewhere on the clip with few tokens, and elsewhere with many or not at all.
THRESHOLDS = {"fsq": (0.01, 0.005), "vae": (0.01, 0.005)}


@pytest.fixture(scope="module", params=[pytest.param("fsq", marks=pytest.mark.slow), "vae"])
def tokenizer(request):
    folder = str(EXAMPLE / request.param)
    config = load_config(folder)
    mesh = make_mesh("1,1,1,1", jax.devices()[:1])
    return ElasticTokenizer(config, checkpoints.load_params(folder, config), mesh=mesh)


def shot(tokenizer, motion):
    """A block from the middle of the first shot with this motion, at the model's resolution."""
    listed = json.loads((EXAMPLE / "video.json").read_text())["shots"]
    with media.open_clip(EXAMPLE / "video.mp4", resolution=tokenizer.config.resolution) as reader:
        frames = reader.read()
    start = next(s["first_frame"] + 4 for s in listed if s["motion"] == motion)
    return frames[start : start + tokenizer.config.frames_per_block]


def test_the_shipped_configs_are_the_presets(tokenizer):
    preset = load_config(f"small-{tokenizer.config.bottleneck_type}")
    assert tokenizer.config.config_hash() == preset.config_hash()
    assert tokenizer.window_blocks == 2
    assert set(PRESETS) >= {"200m", "debug"}
    assert isinstance(preset, ElasticTokConfig)


def test_tokens_follow_the_content_and_the_promise_holds_when_decoded(tokenizer, tmp_path):
    """Looser thresholds cost strictly fewer tokens; met means under the threshold; still shots take at most half of fast ones."""
    thresholds = THRESHOLDS[tokenizer.config.bottleneck_type]
    means = {}
    for motion in ("still", "fast"):
        original = shot(tokenizer, motion)
        for threshold in thresholds:
            tokenizer.encode(original, threshold=threshold).save(tmp_path / "tokens.npz")
            tokens = TokenizedClip.load(tmp_path / "tokens.npz")
            decoded = tokenizer.decode(tokens).astype(np.float64)
            means[motion, threshold] = tokens.mean_tokens
            error = np.mean(np.square((decoded - original) / 127.5))
            assert error <= threshold or not tokens.blocks[0].met_threshold
    still, fast = ([means[motion, t] for t in thresholds] for motion in ("still", "fast"))
    total = np.add(still, fast).tolist()
    assert total == sorted(set(total)), means
    assert all(a <= b / 2 for a, b in zip(still, fast, strict=True)), means


def test_the_readme_example_runs_as_it_is_written(monkeypatch, tmp_path):
    """Its six lines, in a folder of its own, on a short piece of the clip."""
    text = (ROOT / "README.md").read_text()
    lines = re.search(r"```python\n(from elastic import.*?)```", text, re.DOTALL)
    assert lines is not None and len(lines[1].split("\n\n")[-1].splitlines()) == 5
    (tmp_path / "example").symlink_to(EXAMPLE)
    monkeypatch.chdir(tmp_path)
    one_device = jax.devices()[:1]
    monkeypatch.setattr("elastic.distributed.mesh.jax.devices", lambda: one_device)
    encode = ElasticTokenizer.encode
    monkeypatch.setattr(
        ElasticTokenizer, "encode", lambda *a, **options: encode(*a, max_frames=8, **options)
    )
    names: dict = {}
    exec(compile(lines[1], "README.md", "exec"), names)  # noqa: S102 - our own README
    resolution = names["tokenizer"].config.resolution
    assert names["video"].shape == (8, resolution, resolution, 3)
    assert names["shorter"].counts.max() <= 256
    assert TokenizedClip.load("video.tokens.npz") == names["tokens"]

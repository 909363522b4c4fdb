"""Files tokenized in tiles: their report, their picture, and back from the token file; data sets of mixed sizes."""

import shutil

import numpy as np
import pytest
from report_cases import read_report
from small_models import load_tokenizer

from elastic import media
from elastic.evaluation.evaluate import EvaluationConfig, evaluate
from elastic.pipeline.dataset import tokenize_dataset
from elastic.pipeline.dataset_plan import list_inputs
from elastic.pipeline.decode_files import decode_to_file, open_tokens
from elastic.pipeline.tokenize_files import find_inputs, tokenize_file, tokenize_files
from elastic.tokenizer import EncodeOptions
from elastic.tokens import TokenShards


@pytest.fixture(scope="module")
def tokenizer(golden):
    return load_tokenizer(golden, "fsq")


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A clip of 48x40 whose left half moves, and a picture of 40x20."""
    folder = tmp_path_factory.mktemp("files")
    rng = np.random.default_rng(0)
    frames = np.full((4, 40, 48, 3), 128, np.uint8)
    frames[:, :, :16] = rng.integers(0, 256, (4, 40, 16, 3))
    media.write_video(folder / "clip.mp4", frames, 24)
    media.write_image(folder / "picture.png", frames[0, :20, :40])
    return folder


OPTIONS = dict(threshold=0.3, fit="tile", resolution=0)


def test_the_report_and_the_picture_have_the_tiles_and_the_file_decodes(tokenizer, files, tmp_path):
    options = EncodeOptions(**OPTIONS | dict(threshold=0.26))  # the fewest tokens meet 0.3
    run = tokenize_file(
        tokenizer, files / "clip.mp4", tmp_path / "out", options, batch=2, progress=False
    )
    report = read_report(tmp_path / "out")
    assert report["totals"]["tiles"] == 4
    assert report["clip"]["frame"] == [48, 40]
    for block in report["blocks"]:
        assert block["kept"] == sum(tile["kept"] for tile in block["tiles"])
        assert block["frame_loss"] <= block["loss"] <= max(tile["loss"] for tile in block["tiles"])
    left = [block["tiles"][0]["kept"] for block in report["blocks"]]
    right = [block["tiles"][1]["kept"] for block in report["blocks"]]
    assert sum(left) > sum(right)
    assert "viz.mp4" in [file.name for file in run.files]
    with media.open_clip(tmp_path / "out/viz.mp4", resolution=8) as viz:
        assert viz.info.width > 3 * 48  # the map is the third picture
    decoded = tmp_path / "decoded.mp4"
    tokens = open_tokens(tmp_path / "out/tokens.npz")
    decode_to_file(tokenizer, tokens, decoded, batch=2, progress=False)
    assert (media.probe(decoded).width, media.probe(decoded).height) == (48, 40)


def test_files_and_their_tiles_share_a_batch_as_they_are_alone(tokenizer, files, tmp_path):
    options, inputs = EncodeOptions(**OPTIONS), find_inputs(files)
    for batch in (1, 3):
        finished, bad = tokenize_files(
            tokenizer, inputs, tmp_path / str(batch), options, batch=batch, progress=False
        )
        assert len(finished) == 2 and not bad
    for name in inputs.values():
        one, three = (open_tokens(tmp_path / batch / name / "tokens.npz") for batch in "13")
        assert one.counts.tolist() == three.counts.tolist()


def test_a_data_set_of_mixed_sizes_and_an_evaluation_take_tiles(tokenizer, files, tmp_path):
    shutil.copytree(files, tmp_path / "in")
    inputs = list_inputs(tmp_path / "in", tmp_path / "out")
    outcome = tokenize_dataset(
        tokenizer, inputs, tmp_path / "out", EncodeOptions(**OPTIONS), batch=2, progress=False
    )
    shards = TokenShards(tmp_path / "out")
    assert [clip.frame for clip in shards] == [(48, 40), (40, 20)]
    assert outcome.summary["totals"]["blocks"] == sum(map(len, shards)) == 8 + 2
    config = EvaluationConfig(
        num_tokens=(16,), thresholds=(), metrics=("psnr",), fit="tile", resolution=0, fps=None
    )
    found = evaluate(tokenizer, list(inputs.values()), config, progress=False)
    (result,) = found.fixed()
    assert len(result.blocks) == 10
    assert result.mean_tokens == 16

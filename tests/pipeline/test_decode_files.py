"""Decoding token files: by the model that made them alone, to the frames that the report measured."""

import json
import pathlib
import types

import numpy as np
import pytest
from commands import decode, names
from PIL import Image
from small_models import CASES, CLIP, PHOTO

from elastic import media, metrics
from elastic.config import ElasticTokConfig
from elastic.pipeline import decode_files
from elastic.tokenizer import ElasticTokenizer
from elastic.tokens import TokenizedClip, write_shard


def test_the_token_file_decodes_to_the_frames_that_the_report_measured(documented, golden):
    folder, flags = documented
    out = folder / "again.mp4"
    model = [
        f"{name}={flags[name]}" for name in ("--load_elastic_config", "--update_elastic_config")
    ]
    assert decode(f"--input_path={folder}/tokens.npz", f"--output_path={out}", *model) == 0
    with media.open_clip(out, resolution=32, rate=None) as video:
        assert (video.num_frames, video.rate) == (11, 4.0)
    out.unlink()
    tokens = TokenizedClip.load(folder / "tokens.npz")
    tokenizer = ElasticTokenizer.from_pretrained(
        tokens.model_id, config=ElasticTokConfig(**CASES["fsq"]), window_blocks=4
    )
    with media.open_clip(golden / "media" / CLIP, resolution=32, rate=4, max_frames=11) as clip:
        psnr = metrics.psnr(clip.read(), tokenizer.decode(tokens))
    assert psnr == json.loads((folder / "report.json").read_text())["totals"]["psnr"]


@pytest.mark.parametrize(
    ("path", "is_image", "output"),
    [
        ("out/tokens.npz", False, "out/decoded.mp4"),
        ("out/tokens.npz", True, "out/decoded.png"),
        ("out/unfinished/tokens.part", False, "out/decoded.mp4"),
        ("cat.npz", False, "cat.decoded.mp4"),
        ("shards/shard-00000.parquet", True, "shards/shard-00000.decoded.png"),
    ],
)
def test_without_a_name_the_output_lies_beside_the_tokens(path, is_image, output):
    clip = types.SimpleNamespace(is_image=is_image)
    assert decode_files.default_output(path, clip) == pathlib.Path(output)


def test_a_shard_of_one_clip_is_decoded_like_a_token_file(tokenizers, golden, tmp_path, capsys):
    tokenizer = tokenizers["fsq"]
    clip = tokenizer.encode(golden / "media" / PHOTO, num_tokens=8)
    shard = tmp_path / "one.parquet"
    write_shard(shard, [("photo", clip)])
    decode_files.decode_to_file(tokenizer, decode_files.open_tokens(shard), tmp_path / "a.png")
    found = np.asarray(Image.open(tmp_path / "a.png"))
    np.testing.assert_array_equal(found, tokenizer.decode(clip)[0])
    write_shard(tmp_path / "two.parquet", [("a", clip), ("b", clip)])
    assert decode(f"--input_path={tmp_path}/two.parquet") == 1
    assert "holds 2 clips; choose one" in capsys.readouterr().err


def test_another_model_is_refused_for_decoding(documented, tmp_path, capsys):
    folder, _ = documented
    command = [f"--input_path={folder}/tokens.npz", f"--output_path={tmp_path}/a.mp4"]
    assert decode(*command, "--load_checkpoint=x/y", "--load_elastic_config=debug") == 1
    assert "is another model (config" in capsys.readouterr().err
    assert decode(*command[:1], f"--output_path={tmp_path}/a.png") == 1
    assert "The tokens are of a video" in capsys.readouterr().err
    assert names(tmp_path) == []


def test_a_token_file_cannot_make_the_script_fetch_a_model(tokenizers, golden, tmp_path):
    tokens = tokenizers["fsq"].encode(golden / "media" / PHOTO, num_tokens=8)
    foreign = TokenizedClip(**(vars(tokens) | {"model_id": "somebody/something"}))
    with pytest.raises(ValueError, match="name the model with --load_checkpoint"):
        decode_files.model_of(foreign)

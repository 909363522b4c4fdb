"""`elastictok info`: everything that the project writes, and a clip, says what it is; anything else is refused."""

import json
import pathlib

import pytest
from clip_cases import example

from elastic.cli import main as program
from elastic.tokens import write_shard

ROOT = pathlib.Path(__file__).resolve().parents[2]


@pytest.fixture
def shown(capsys):
    """What `elastictok info` prints of a path."""

    def show(path, *flags):
        assert program.main(["info", str(path), *flags]) == 0
        return capsys.readouterr().out

    return show


@pytest.mark.parametrize("bottleneck_type", ["fsq", "vae"])
def test_tokens_in_a_file_in_a_folder_of_results_and_in_shards(shown, tmp_path, bottleneck_type):
    clip = example(bottleneck_type)
    clip.save(tmp_path / "tokens.npz")
    for path in (tmp_path / "tokens.npz", tmp_path):
        text = shown(path)
        assert text.startswith(f"{path}: the tokens of a video\n")
        assert f"{clip.num_tokens} in {len(clip)} blocks" in text and clip.model_id in text
    (tmp_path / "shards").mkdir()
    write_shard(tmp_path / "shards" / "shard-00000.parquet", [("a", clip), ("b", clip)])
    text = shown(tmp_path / "shards")
    assert ": 1 shard of tokens\n" in text
    assert f"{2 * clip.num_tokens} in {2 * len(clip)} blocks" in text


@pytest.mark.parametrize(
    "spec", ["small-fsq", ROOT / "example/fsq", ROOT / "example/fsq/model.safetensors"]
)
def test_a_model_by_its_name_its_folder_and_its_file(shown, spec):
    text = shown(spec)
    assert text.startswith(f"{spec}: a model\n")
    for words in ("7.76 M", "fsq, 1,391,630,625 codes", "256 to 4096 a block", "curves.json"):
        assert words in text


def test_a_training_state_is_told_from_a_model(shown, golden):
    text = shown(golden / "fsq" / "ckpt" / "trainstate_scan_fp32" / "streaming_train_state")
    assert "the training state of a model" in text and "none beside the weights" in text


def test_a_run_says_how_far_it_came(shown, tmp_path):
    records = [{"step": 5, "loss": 0.5}, {"step": 10, "loss": 0.25}]
    lines = "".join(json.dumps(record) + "\n" for record in records) + '{"step": 1'
    (tmp_path / "metrics.jsonl").write_text(lines)  # its last line is being written
    for step in ("00000005", "00000010"):
        (tmp_path / "checkpoints" / step).mkdir(parents=True)
    text = shown(tmp_path)
    assert text.startswith(f"{tmp_path}: a training run\n")
    for words in ("step 10", "0.25", "00000005, 00000010", "finished     no"):
        assert words in text


def test_media_and_folders_of_media(shown):
    assert shown(ROOT / "example" / "video.mp4").splitlines()[1:] == [
        "  size    256x256",
        "  frames  224 at 24/s",
    ]
    assert "a folder of images and videos" in shown(ROOT / "example")
    assert "1 .mp4" in shown(ROOT / "example")


def test_a_program_reads_it_as_json(shown):
    assert json.loads(shown("small-vae", "--json"))["kind"] == "a model"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            ["nothing-here"],
            "'nothing-here' is no file, no folder and no name of a model (small-fsq, ",
        ),
        ([str(ROOT / "pyproject.tml")], f"Did you mean '{ROOT / 'pyproject.toml'}'?"),
        ([], "Give --path: what to look at"),
        (["one", "two"], "'one' belongs to no flag"),
        ([str(ROOT / "pyproject.toml")], "is neither media ("),
        ([str(ROOT / ".github")], "holds no tokens, shards, model, training run, images or videos"),
    ],
)
def test_what_is_nothing_known_is_refused_in_one_line(words, message, capsys):
    assert program.main(["info", *words]) == 1
    out, err = capsys.readouterr()
    assert not out and message in err and err.count("\n") == 1

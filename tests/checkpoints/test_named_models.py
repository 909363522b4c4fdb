"""Models by name: shipped ones load from any folder, released ones stand for their repository and its config."""

import pathlib

import huggingface_hub
import pytest

from elastic.checkpoints import CheckpointError, folder_of, load_config
from elastic.checkpoints.named_models import NAMES, RELEASED, SHIPPED, shipped_folder
from elastic.config import PRESETS
from elastic.config import load_config as load_preset

ROOT = pathlib.Path(__file__).resolve().parents[2]


@pytest.mark.parametrize("name", SHIPPED)
def test_a_shipped_model_loads_by_its_name_from_any_folder(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert folder_of(name) == ROOT / SHIPPED[name]
    assert load_config(name).config_hash() == load_preset(name).config_hash()
    assert shipped_folder(SHIPPED[name]) == folder_of(name)  # as token files call it


@pytest.mark.parametrize("name", RELEASED)
@pytest.mark.parametrize("write", [str, RELEASED.get, lambda name: f"hf::{RELEASED[name]}"])
def test_a_released_model_is_its_repository_with_its_preset(name, write, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    asked = []

    def download(repo, file, **options):
        asked.append(repo)
        (tmp_path / file).touch()
        return str(tmp_path / file)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    assert load_config(write(name)) == load_preset(name)
    assert set(asked) == {RELEASED[name]}


def test_every_model_of_the_readme_s_table_has_a_name():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert [name for name in NAMES if f"{name}" not in readme] == []
    assert set(NAMES) <= set(PRESETS)


def test_the_released_presets_are_the_released_models():
    fsq, vae = (load_preset(name) for name in RELEASED)
    assert fsq.config_hash() == load_preset("200m").config_hash()
    assert (vae.bottleneck_type, vae.max_toks, vae.code_dim) == ("vae", 2048, 8)
    assert (
        fsq.max_sequence_length == 4 * fsq.max_toks and vae.max_sequence_length == 4 * vae.max_toks
    )


def test_what_lies_here_goes_before_a_model_of_that_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "small-fsq").mkdir()
    (tmp_path / "small-fsq" / "params").touch()
    assert folder_of("small-fsq") == pathlib.Path("small-fsq")


def test_a_name_that_is_nearly_one_gets_a_suggestion(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(
        CheckpointError, match=r"no checkpoint 'smal-fsq'\. Did you mean the model 'small-fsq'"
    ):
        folder_of("smal-fsq")

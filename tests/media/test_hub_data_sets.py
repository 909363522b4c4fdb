"""Data sets of Hugging Face, made here and read without a network; `datasets` is an extra package."""

import importlib.util

import pytest
from data_sets import content, make_clips

from elastic.media import MediaError, open_clip
from elastic.media.inputs import find_clips


def test_without_the_package_one_line_says_what_to_install(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    with pytest.raises(ValueError, match=r"hf_dataset:: needs .*pip install datasets"):
        find_clips("hf_dataset::nobody/nothing")


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """{how it is stored: what names it}, and the bytes of its clips."""
    datasets = pytest.importorskip("datasets", reason="datasets is not installed")
    folder = tmp_path_factory.mktemp("hub")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", folder / "cache")
        clips = make_clips(folder / "clips", images=3, videos=1)
        cells = [{"bytes": data, "path": name} for name, data in clips.items()]
        features = datasets.Features(
            clip={"bytes": datasets.Value("binary"), "path": datasets.Value("string")},
            caption=datasets.Value("string"),
        )
        rows = {"clip": cells, "caption": [f"of {name}" for name in clips]}
        rows = datasets.Dataset.from_dict(rows, features=features)
        images = rows.select([0, 1]).cast_column("clip", datasets.Image(decode=False))
        datasets.DatasetDict(train=rows, test=rows.select([3, 0])).save_to_disk(folder / "disk")
        (folder / "files").mkdir()
        images.to_parquet(folder / "files" / "train-00000.parquet")
        yield folder, clips


def test_splits_of_a_data_set_are_its_clips_with_their_captions(made):
    folder, clips = made
    found = find_clips(f"hf_dataset::{folder}/disk")
    assert content(found) == clips
    assert found["a/0.png"].metadata() == {"caption": "of a/0.png"}
    names = list(clips)
    assert list(find_clips(f"hf_dataset::{folder}/disk::test")) == [names[0], names[3]]
    with open_clip(found["a/v0.mp4"], resolution=8) as clip:
        assert clip.read().shape == (5, 8, 8, 3)
    assert len({place.identity for place in found.values()}) == 4


def test_the_column_is_found_by_what_datasets_says_of_it(made):
    folder, clips = made
    found = find_clips(f"hf_dataset::{folder}/files")
    assert content(found) == {name: clips[name] for name in list(clips)[:2]}
    assert {place.column for place in found.values()} == {"clip"}
    with pytest.raises((ValueError, MediaError), match=r"cannot be loaded.*name a split"):
        find_clips(f"hf_dataset::{folder}/disk::none")

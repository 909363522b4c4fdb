"""Data sets of Hugging Face, made here and read without a network; `datasets` is an extra package."""

import importlib.util
import types

import pytest
from data_sets import content, make_clips, write_tar

from elastic.media import MediaError, open_clip
from elastic.media.inputs import find_clips


def test_without_the_package_one_line_says_what_to_install(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    with pytest.raises(
        ValueError, match=r"hf_dataset:: and hf_stream:: need .*pip install datasets"
    ):
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
        (folder / "several").mkdir()
        for number, chosen in enumerate(([0, 3], [1, 0, 2])):  # a name occurs twice
            part = rows.select(chosen)
            part.to_parquet(folder / "several" / f"train-{number:05d}-of-00002.parquet")
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


def test_a_data_set_read_where_its_files_lie_is_the_one_in_the_cache(made, monkeypatch):
    folder, clips = made
    datasets = pytest.importorskip("datasets")
    stored = sorted((folder / "cache").rglob("*.arrow"))
    found = find_clips(f"hf_stream::{folder}/several")
    assert sorted((folder / "cache").rglob("*.arrow")) == stored
    cached = find_clips(f"hf_dataset::{folder}/several")
    assert list(found) == list(cached) == sorted([*clips, "a/0.png#3"])
    assert content(found) == content(cached)
    assert [p.metadata() for p in found.values()] == [p.metadata() for p in cached.values()]
    assert {place.kind for place in found.values()} == {"parquet"}
    named = find_clips(f"hf_stream::{folder}/files::train@clip")
    assert list(named) == list(clips)[:2]
    with pytest.raises(ValueError, match=r"no split 'none' among \['train'\].*name a split"):
        find_clips(f"hf_stream::{folder}/files::none")
    monkeypatch.setattr(datasets, "load_dataset_builder", lambda _: _builder(["a.csv"]))
    with pytest.raises(ValueError, match=r"has \.csv files.*Use hf_dataset::x"):
        find_clips("hf_stream::x")


def test_of_a_data_set_elsewhere_a_run_fetches_what_it_reads(made, monkeypatch):
    datasets = pytest.importorskip("datasets")
    fsspec = pytest.importorskip("fsspec")
    folder, clips = made
    shards = fsspec.filesystem("memory")
    urls = [f"memory://hub/{number}.tar" for number in range(2)]
    names = list(clips)
    for url, few in zip(urls, (names[:2], names[1:]), strict=True):
        shards.pipe(url, write_tar(folder / "one.tar", {n: clips[n] for n in few}).read_bytes())
    monkeypatch.setattr(datasets, "load_dataset_builder", lambda _: _builder(urls))
    found = find_clips("hf_stream::OWNER/NAME")
    assert list(found) == sorted([*names, f"{names[1]}#2"])
    assert {place.place for place in found.values()} == set(urls)
    assert content(found) == clips | {f"{names[1]}#2": clips[names[1]]}


def _builder(files):
    """What `datasets` finds of a data set without a card."""
    config = types.SimpleNamespace(data_files={"train": files})
    return types.SimpleNamespace(config=config, info=types.SimpleNamespace(features=None))

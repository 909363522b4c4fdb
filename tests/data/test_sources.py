"""Training on tar shards, Parquet and lists is training on the folder; several sources have the shares that are asked for."""

import contextlib
import json
import shutil

import numpy as np
import pytest
from data_sets import make_clips, write_list, write_parquet, write_tar
from level_clips import make_folder

from elastic.config import ElasticTokConfig
from elastic.data import file_index
from elastic.data.config import DataConfig
from elastic.data.dataset import TrainingData, load_index
from elastic.data.file_index import FileIndex, parse_sources
from elastic.media import tar_members

MODEL = ElasticTokConfig(
    hidden_size=16, intermediate_size=16, num_encoder_layers=1, num_decoder_layers=1, num_attention_heads=1,
    frames_per_block=2, patch_size=(2, 8, 8), min_toks=2, max_toks=16, max_sequence_length=48,
)  # fmt: skip


@pytest.fixture(scope="module")
def kinds(tmp_path_factory):
    """{kind: path} of twelve clips."""
    place = tmp_path_factory.mktemp("kinds")
    folder = place / "clips"
    data = make_clips(folder)
    (folder / "b" / "broken.mp4").write_text("no film")
    data |= {"b/broken.mp4": b"no film"}
    data = dict(sorted(data.items()))
    (place / "hub").mkdir()
    write_parquet(place / "hub" / "train-00000.parquet", data)
    return {
        "folder": folder,
        "tar": write_tar(place / "c.tar", data),
        "parquet": write_parquet(place / "c.parquet", data),
        "hub": f"hf_stream::{place / 'hub'}",
        "csv": write_list(place / "list" / "c.csv", folder, data),
        "jsonl": write_list(place / "list" / "c.jsonl", folder, data),
    }


def open_data(path, index=None, **options):
    config = DataConfig(path=str(path), **(dict(workers=0, batch_size=3) | options))
    return TrainingData(config, MODEL, index=load_index(config, MODEL, path=index))


def take(data, first, last):
    with contextlib.closing(data.batches(first, last)) as batches:
        return list(batches)


@pytest.fixture(scope="module")
def plain(kinds):
    data = open_data(kinds["folder"], random_crop=True)
    return data, take(data, 0, 6)


@pytest.mark.parametrize("kind", ["tar", "parquet", "csv", "jsonl", "hub"])
def test_every_kind_gives_the_batches_of_the_folder_and_the_same_position(kinds, plain, kind):
    if kind == "hub":
        pytest.importorskip("datasets", reason="datasets is not installed")
    data = open_data(kinds[kind], random_crop=True)
    assert data.position(3) == plain[0].position(3)
    assert len(data.bad_files) == 1 and "broken.mp4" in next(iter(data.bad_files))
    for batch, expected in zip(take(data, 2, 6), plain[1][2:], strict=True):
        for name in expected._fields:
            np.testing.assert_array_equal(getattr(batch, name), getattr(expected, name))


def test_workers_read_a_tar_where_it_lies(kinds, plain):
    found = take(open_data(kinds["tar"], random_crop=True, workers=1), 1, 3)
    for batch, expected in zip(found, plain[1][1:3], strict=True):
        np.testing.assert_array_equal(batch.patches, expected.patches)


def test_a_tar_is_listed_once_and_measured_once_until_it_changes(kinds, tmp_path, monkeypatch):
    tar = tmp_path / "c.tar"
    shutil.copy(kinds["tar"], tar)
    first = open_data(tar, tmp_path / "index.json")
    kept = (tmp_path / "index.json").read_bytes()

    def refuse(*_, **__):
        raise AssertionError("known already")

    with monkeypatch.context() as patch:
        patch.setattr(tar_members, "members_of", refuse)
        patch.setattr(file_index.media, "open_clip", refuse)
        again = open_data(tar, tmp_path / "index.json")
    assert again.index == first.index and again.position(2) == first.position(2)
    assert (tmp_path / "index.json").read_bytes() == kept
    loaded = FileIndex.load(tmp_path / "index.json")
    assert loaded == first.index and loaded.place("a/0.png") == first.index.place("a/0.png")
    data = make_clips(tmp_path / "more", images=5, videos=0)
    write_tar(tar, data)
    assert [file.name for file in open_data(tar, tmp_path / "index.json").index.files] == list(data)


def test_a_folder_s_index_is_written_as_before(kinds, tmp_path):
    open_data(kinds["folder"], tmp_path / "index.json")
    values = json.loads((tmp_path / "index.json").read_text())
    assert values.keys() == {"format", "version", "folder", "ext", "fps", "files", "bad"}


def test_sources_have_the_shares_of_their_weights_and_lose_nothing(kinds, tmp_path):
    other = make_folder(tmp_path / "levels")
    data = open_data(f"{kinds['tar']}=0.5,{other}=0.5")
    num_blocks = np.zeros(len(data.index.files))
    for sequence in range(data.num_sequences):
        for piece in data.plan.pieces(sequence):
            num_blocks[piece.file] += piece.num_blocks
    source = np.array([file.source for file in data.index.files])
    shares = [num_blocks[source == number].sum() for number in (0, 1)]
    assert num_blocks.min() >= 1 and abs(shares[0] / shares[1] - 1) < 0.3
    assert data.blocks_per_epoch == sum(shares) > 21 + 18
    # The position is that of the clips, their weights and the seed.
    again = open_data(f"{kinds['tar']}=0.5,{other}=0.5")
    assert again.position(1) == data.position(1)
    assert open_data(f"{kinds['tar']}=0.9,{other}=0.1").position(1) != data.position(1)
    rows = [data.sequence(number) for number in range(3)]
    assert all(row.filled.any() for row in rows)
    # Without weights, each has as much as it has.
    plain = open_data(f"{kinds['tar']},{other}")
    assert plain.blocks_per_epoch == 18 + 21


def test_a_list_s_weights_say_how_often_a_clip_comes(kinds, tmp_path):
    lines = [{"path": "a/0.png", "weight": 3}, {"path": "b/1.png"}]
    lines.append({"path": "gone.png"})
    lines.append({"path": "a/v0.mp4", "start": 0.0, "end": 2 / 24, "weight": 1.5})
    path = kinds["folder"] / "few.jsonl"
    path.write_text("\n".join(map(json.dumps, lines)))
    counts = []
    for seed in range(40):
        data = open_data(path, seed=seed)
        counts.append(data.index.copies(np.ones(3, int), seed))
    images = [file.name for file in data.index.files]
    assert images == ["a/0.png", "a/v0.mp4@0-0.0833333", "b/1.png"]
    counts = np.array(counts)
    assert (counts[:, 0] == 3).all() and (counts[:, 2] == 1).all()
    assert set(counts[:, 1]) == {1, 2}
    assert [file.num_frames for file in data.index.files] == [1, 2, 1]
    assert [name.rpartition("/")[2] for name in data.bad_files] == ["gone.png"]


def test_sources_are_told_apart_by_commas_and_weights(tmp_path):
    odd = tmp_path / "a=1,b"
    odd.mkdir()
    assert parse_sources(str(odd)) == [(str(odd), None)]
    assert parse_sources("x-{0,1}.tar") == [("x-{0,1}.tar", None)]
    assert parse_sources("x-{0,1}.tar=2, s3://b/c=0.5") == [("x-{0,1}.tar", 2), ("s3://b/c", 0.5)]
    with pytest.raises(ValueError, match="give every source a weight"):
        parse_sources("a=1,b")
    with pytest.raises(ValueError, match="must be a positive number"):
        parse_sources("a=1,b=0")

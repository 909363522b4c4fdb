"""Shards of tokens: what is read is what was written, and no damage passes."""

import dataclasses
import json
import pickle

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from shard_cases import SIZES, make_rows

from elastic.tokens import TokenFileError, TokenShards, write_shard
from elastic.tokens import shards as token_shards


@pytest.fixture(params=SIZES)
def size(request):
    return SIZES[request.param]


def test_a_clip_comes_back_as_it_went_in(tmp_path, size, monkeypatch):
    monkeypatch.setattr(token_shards, "_GROUP_BYTES", 2000)
    rows = make_rows(size) + make_rows(size, first=40, clips=9, threshold=0.75)  # another search
    assert write_shard(tmp_path / "a.parquet", rows[:40]) == 40
    write_shard(tmp_path / "b.parquet", rows[40:])
    assert pq.read_metadata(tmp_path / "a.parquet").num_row_groups > 5
    shards = pickle.loads(pickle.dumps(TokenShards(tmp_path)))  # noqa: S301 - our own, just made
    assert len(shards) == 49 and list(shards.ids) == [name for name, _ in rows]
    for number in np.random.default_rng(0).permutation(49):
        assert shards[number].to_bytes() == rows[number][1].to_bytes()
    assert shards[-1] == rows[48][1] and shards.find("folder/7.mp4") == 7
    for counts, (_, clip) in zip(shards.counts(), rows, strict=True):
        np.testing.assert_array_equal(counts, clip.counts)
    with pytest.raises(IndexError, match="no clip 49"):
        shards[49]
    with pytest.raises(KeyError, match="nobody"):
        shards.find("nobody")
    write_shard(tmp_path / "again.parquet", rows[:40])
    assert (tmp_path / "again.parquet").read_bytes() == (tmp_path / "a.parquet").read_bytes()


def test_rows_say_what_the_originals_pixels_were_and_older_shards_are_read(tmp_path):
    rows = make_rows(64_000, clips=3)
    told = {"pixel_aspect": (32, 27), "transfer": "hlg"}
    rows[1] = (rows[1][0], dataclasses.replace(rows[1][1], **told))
    write_shard(tmp_path / "a.parquet", rows)
    assert list(TokenShards(tmp_path)) == [clip for _, clip in rows]
    table = pq.read_table(tmp_path / "a.parquet")
    assert table["transfer"].to_pylist() == ["sdr", "hlg", "sdr"]
    assert table["pixel_aspect"].to_pylist() == [[1, 1], [32, 27], [1, 1]]
    older = make_rows(64_000, first=3, clips=3)
    write_shard(tmp_path / "b.parquet", older)
    table = pq.read_table(tmp_path / "b.parquet")
    pq.write_table(table.drop_columns(list(told)), tmp_path / "b.parquet")
    assert list(TokenShards(tmp_path)) == [clip for _, clip in rows + older]
    pq.write_table(table.drop_columns(["transfer"]), tmp_path / "b.parquet")
    with pytest.raises(TokenFileError, match="a column is missing"):
        TokenShards(tmp_path)


def test_shards_of_several_folders_follow_each_other(tmp_path):
    rows = make_rows(64_000, clips=9)
    places = [tmp_path / "b", tmp_path / "a", tmp_path / "c.parquet"]
    for start, place in zip((0, 3, 6), places, strict=True):
        if place.suffix:
            write_shard(place, rows[start : start + 3])
        else:
            place.mkdir()
            write_shard(place / "0.parquet", rows[start : start + 2])
            write_shard(place / "1.parquet", rows[start + 2 : start + 3])
    shards = TokenShards(places)
    assert list(zip(shards.ids, shards, strict=True)) == rows
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"no shard .* in .*empty"):
        TokenShards([*places, tmp_path / "empty"])


def test_a_shard_that_was_replaced_under_its_reader_is_refused(tmp_path):
    path, rows = tmp_path / "a.parquet", make_rows(64_000)
    write_shard(path, rows)
    shards = TokenShards(path)
    write_shard(path, rows[1:])
    with pytest.raises(TokenFileError, match=r"a\.parquet has been replaced since it was opened"):
        shards[0]


def test_a_large_clip_has_several_rows_and_comes_back_whole(tmp_path, size, monkeypatch):
    """The limit stands for the one of 2^31 bytes that Parquet's readers and writers have."""
    monkeypatch.setattr(token_shards, "_ROW_NUMBERS", 60)
    rows = make_rows(size, clips=12)
    write_shard(tmp_path / "a.parquet", rows[:5])
    write_shard(tmp_path / "b.parquet", rows[5:])
    table = pq.read_table(tmp_path / "a.parquet")
    sizes = [len(tokens) for tokens in table["tokens"]]
    assert (
        table.num_rows > 5
        and max(sizes) <= 24 * 3
        and sum(size > 60 for size in sizes)
        == sum(block.values.size > 60 for _, clip in rows[:5] for block in clip.blocks)
    )
    # Any reader can put the rows of a clip together: they follow each other, and each describes itself.
    for name, clip in rows[:5]:
        parts = [row for row in table.to_pylist() if row["id"] == name]
        assert sum(part["num_frames"] for part in parts) == clip.num_frames
        assert sum(part["bits"] for part in parts) == clip.num_bits
        assert [count for part in parts for count in part["counts"]] == clip.counts.tolist()
        numbers = np.concatenate([block.values.reshape(-1) for block in clip.blocks])
        np.testing.assert_array_equal([n for part in parts for n in part["tokens"]], numbers)
        for part in parts:
            assert part["offsets"] == [0, *np.cumsum(part["counts"])[:-1]]
    shards = TokenShards(tmp_path)
    assert list(zip(shards.ids, shards, strict=True)) == rows
    for counts, (_, clip) in zip(shards.counts(), rows, strict=True):
        np.testing.assert_array_equal(counts, clip.counts)
    for number, (_, clip) in enumerate(rows):
        for first in range(len(clip.blocks)):
            found = shards.blocks(number, first, first + 2)
            wanted = clip.blocks[first : first + 2]
            assert len(found) == len(wanted)
            for one, other in zip(found, wanted, strict=True):
                np.testing.assert_array_equal(one.values, other.values)


def test_any_reader_of_parquet_finds_the_tokens_of_a_block(tmp_path):
    rows = make_rows(64_000)
    write_shard(tmp_path / "a.parquet", rows)
    table = pq.read_table(tmp_path / "a.parquet")
    header = json.loads(table.schema.metadata[b"elastictok"])
    assert (header["codebook_size"], table.schema.field("tokens").type.value_type) == (
        64_000,
        pa.uint16(),
    )
    row, clip = table.slice(7, 1).to_pylist()[0], rows[7][1]
    assert (row["id"], row["bits"], row["width"]) == ("folder/7.mp4", clip.num_bits, 647)
    for start, count, block in zip(row["offsets"], row["counts"], clip.blocks, strict=True):
        assert row["tokens"][start : start + count] == block.indices.tolist()


def test_what_is_no_sound_shard_is_refused_by_name(tmp_path):
    good, bad = tmp_path / "good.parquet", tmp_path / "bad.parquet"
    write_shard(good, make_rows(64_000))
    bad.write_text("not a table")
    with pytest.raises(TokenFileError, match=r"bad\.parquet is not a sound shard.*run scripts"):
        TokenShards(tmp_path)
    pq.write_table(pa.table({"tokens": [[1, 2]]}), bad)
    with pytest.raises(TokenFileError, match=r"bad\.parquet.*does not say 'elastictok-shard'"):
        TokenShards([good, bad])
    for changes in (
        {"config_hash": "ff"}, {"model_id": "another"}, {"tokens_per_block": 99}, {"weights": (1.0, 1.0)},
    ):  # fmt: skip
        write_shard(bad, make_rows(64_000, first=100, **changes))
        with pytest.raises(
            TokenFileError, match=rf"bad\.parquet does not go.*{next(iter(changes))}"
        ):
            TokenShards([good, bad])
    write_shard(bad, make_rows(64_000, first=39))
    with pytest.raises(TokenFileError, match=r"'folder/39.mp4' occurs twice, in .*bad.*good"):
        TokenShards(tmp_path).ids  # noqa: B018
    with pytest.raises(ValueError, match="There is no shard"):
        TokenShards(tmp_path / "..")
    with pytest.raises(TokenFileError, match="is not a file"):
        TokenShards(tmp_path / "nowhere.parquet")


def test_rows_that_do_not_belong_together_are_not_written(tmp_path):
    rows = make_rows(64_000)
    for wrong, message in [
        ([], "at least one clip"),
        ([*rows, rows[3]], "'folder/3.mp4' occurs twice"),
        (rows + make_rows(None, first=50), "bottleneck_type='vae'"),
        (rows + make_rows(64_000, first=50, threshold=0.6), r"threshold=0\.6"),
    ]:
        with pytest.raises(ValueError, match=message):
            write_shard(tmp_path / "a.parquet", wrong)
    assert list(tmp_path.iterdir()) == []


def test_no_flipped_byte_gives_other_tokens(tmp_path, monkeypatch):
    monkeypatch.setattr(token_shards, "_GROUP_BYTES", 1000)
    rows, path = make_rows(64_000, clips=12), tmp_path / "a.parquet"
    write_shard(path, rows)
    data, refused = path.read_bytes(), 0
    places = np.random.default_rng(0).permutation(len(data))[:250]
    for place in places:
        path.write_bytes(data[:place] + bytes([data[place] ^ (1 << place % 8)]) + data[place + 1 :])
        try:
            shards = TokenShards(path)
            found = list(zip(shards.ids, shards, strict=True))
        except TokenFileError as error:
            assert "a.parquet" in str(error)
            refused += 1
        else:
            assert found == rows, f"byte {place}"
    assert refused > 125
    path.write_bytes(data[:-100])
    with pytest.raises(TokenFileError, match="not a sound shard"):
        TokenShards(path)

"""Shards of tokens, and the batches that are packed from them."""

import collections
import json
import pickle

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from elastic.tokens import BlockTokens, TokenFileError, TokenizedClip, TokenShards, write_shard
from elastic.tokens import shards as token_shards
from elastic.tokens.batches import BEGIN, CONTINUE, END, PAD, Vocabulary, token_batches

SIZES = {"fsq": 64_000, "large fsq": 100_000, "vae": None}  # codebooks: 2 and 4 bytes an index
FULL, WIDTH = 24, 3  # tokens of a block, numbers of a vector


def make_clip(number, counts, size, rng, **changes):
    """A clip whose block b says in its first two numbers which clip and block it is."""
    blocks = []
    for b, count in enumerate(counts):
        if size is None:
            values = {"vectors": rng.normal(size=(count, WIDTH)).astype(np.float32)}
        else:
            values = {"indices": rng.integers(0, size, count)}
        next(iter(values.values()))[:2].flat[:2] = (number, b)
        loss = float("nan") if rng.random() < 0.2 else rng.random()
        blocks.append(BlockTokens(num_kept=count, loss=loss, met_threshold=loss < 0.5, **values))
    is_image = len(counts) == 1 and number % 2 == 0
    fields = dict(
        bottleneck_type="vae" if size is None else "fsq", codebook_size=size, tokens_per_block=FULL,
        frames_per_block=4, num_frames=1 if is_image else 4 * len(counts) - number % 4, is_image=is_image, resolution=64,
        source=(640 + number, 480), rate=0.0 if is_image else 24 / 1.001, model_id="a model", config_hash="0123abcd",
        threshold=0.5, search="binary", window_blocks=4, context="carry", weights=(0.5, -1.0),
    )  # fmt: skip
    return TokenizedClip(blocks=tuple(blocks), **(fields | changes))


def make_rows(size, *, clips=40, first=0, **changes):
    rng = np.random.default_rng(first)
    return [
        (f"folder/{number}.mp4", make_clip(number, rng.integers(2, FULL + 1, rng.integers(1, 12)).tolist(), size, rng, **changes))
        for number in range(first, first + clips)
    ]  # fmt: skip


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
    places = np.random.default_rng(0).permutation(len(data))[:400]
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
    assert refused > 200
    path.write_bytes(data[:-100])
    with pytest.raises(TokenFileError, match="not a sound shard"):
        TokenShards(path)


# --- Batches ---------------------------------------------------------------------------------


def write_shards(folder, size, clips=60):
    rows = make_rows(size, clips=clips)
    for start in range(0, clips, 16):
        write_shard(folder / f"shard-{start:05d}.parquet", rows[start : start + 16])
    return TokenShards(folder), [clip for _, clip in rows]


def segments(batches):
    """Each piece of packed batches: ids, positions, blocks, loss mask, vectors."""
    for batch in batches:
        for row in range(len(batch.tokens)):
            ids = batch.segment_ids[row]
            assert (batch.tokens[row][ids == 0] == PAD).all() and not batch.loss_mask[row][
                ids == 0
            ].any()
            for segment in range(1, ids.max() + 1):
                where = np.flatnonzero(ids == segment)
                assert np.array_equal(where, np.arange(where[0], where[-1] + 1))  # in one run
                yield tuple(None if part is None else part[row][where] for part in batch)


def collect(vocabulary, clips, batches):
    """{clip: its blocks from all pieces}, each piece checked."""
    found = collections.defaultdict(dict)
    for ids, _, positions, block_ids, mask, vectors in segments(batches):
        np.testing.assert_array_equal(positions, np.arange(len(ids)))
        np.testing.assert_array_equal(mask, ~np.isin(ids, [PAD, BEGIN, CONTINUE]))
        blocks = vocabulary.blocks(ids, vectors)
        number, first = map(int, blocks[0].values.flat[:2])
        assert ids[0] == (CONTINUE if first else BEGIN)
        last = first + len(blocks) - 1
        assert (ids[-1] == END) == (last == len(clips[number].blocks) - 1)
        starts = np.repeat(np.arange(first, last + 1), [block.num_kept + 1 for block in blocks])
        np.testing.assert_array_equal(block_ids[1 : 1 + len(starts)], starts)
        for b, block in enumerate(blocks, first):
            assert b not in found[number], "a block came twice"
            np.testing.assert_array_equal(block.values, clips[number].blocks[b].values)
            found[number][b] = block
    return found


def test_packed_batches_hold_every_token_once_in_order_and_clips_apart(tmp_path, size):
    shards, clips = write_shards(tmp_path, size)
    vocabulary = Vocabulary.of(shards)
    options = dict(sequence_length=100, batch_size=3, num_epochs=1, seed=5, packing_bins=8)
    batches = list(token_batches(shards, **options))
    assert all(batch.tokens.shape[1:] == (100,) for batch in batches)
    assert max(batch.tokens.max() for batch in batches) < vocabulary.size
    found = collect(vocabulary, clips, batches)
    assert {n: len(blocks) for n, blocks in found.items()} == {
        n: len(clip.blocks) for n, clip in enumerate(clips)
    }
    assert np.mean([batch.segment_ids > 0 for batch in batches[:-1]]) > 0.8
    # The processes of a run share the pieces.
    parts = [
        collect(
            vocabulary, clips, token_batches(shards, **options, process_index=i, process_count=3)
        )
        for i in range(3)
    ]
    got = [(n, b) for part in parts for n, blocks in part.items() for b in blocks]
    assert sorted(got) == [(n, b) for n, clip in enumerate(clips) for b in range(len(clip.blocks))]


def test_batches_go_on_where_they_were_saved_and_differ_between_epochs(tmp_path):
    shards, _ = write_shards(tmp_path, 64_000)
    iterator = iter(token_batches(shards, sequence_length=64, batch_size=4))
    batches = [next(iterator) for _ in range(5)]
    place = json.dumps(iterator.get_state())
    expected = [next(iterator) for _ in range(40)]  # more than an epoch
    again = iter(token_batches(shards, sequence_length=64, batch_size=4))
    again.set_state(json.loads(place))
    for batch in expected:
        for one, other in zip(next(again), batch, strict=True):
            np.testing.assert_array_equal(one, other)
    assert not any(np.array_equal(batches[0].tokens, batch.tokens) for batch in expected)


def test_sequences_and_ids_that_cannot_be_are_refused(tmp_path):
    shards, clips = write_shards(tmp_path, 64_000, clips=5)
    with pytest.raises(ValueError, match=r"sequence_length=26 is too short .* use 27 or more"):
        token_batches(shards, sequence_length=26, batch_size=1)
    with pytest.raises(ValueError, match="pieces to share"):
        token_batches(shards, sequence_length=64, batch_size=1, process_index=2, process_count=2)
    vocabulary = Vocabulary.of(clips[0])
    ids = vocabulary.piece(clips[0])
    with pytest.raises(ValueError, match="no count"):
        vocabulary.blocks(ids[2:])
    with pytest.raises(ValueError, match="as its count says"):
        vocabulary.blocks(ids[:-2])

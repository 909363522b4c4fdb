"""Tokenizing as it goes: clips side by side, resume files that a later run resumes from, decoding while a file grows."""

import itertools
import threading

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from small_models import load_tokenizer as load

from elastic import media
from elastic.distributed.mesh import make_mesh
from elastic.tokenizer import ElasticTokenizer, resume
from elastic.tokenizer.resume import ResumeError
from elastic.tokens import BlockTokens, TokenFileError, read_token_stream
from elastic.tokens.stream_file import TokenStreamWriter

THRESHOLD = {"fsq": 0.522, "vae": 0.5}


@pytest.fixture(scope="module", params=["fsq", "vae"])
def tokenizer(request, golden):
    return load(golden, request.param, window_blocks=3, search_width=2)


@pytest.fixture(scope="module")
def frames(golden):
    with media.open_clip(golden / "media" / "clip_160x120_30fps_97f.mp4", resolution=32) as reader:
        return reader.read()


@pytest.fixture(scope="module")
def options(tokenizer, frames):
    """A threshold that some blocks meet early, others late or never."""
    losses = [block.loss for block in tokenizer.encode(frames[:24], num_tokens=20).blocks]
    return dict(threshold=float(np.median(losses)), search="predict")


@pytest.fixture(scope="module")
def unbroken(tokenizer, frames, options):
    return tokenizer.encode(frames[:27], **options)


def interrupted(tokenizer, frames, options, path, blocks):
    """Tokenizes so many blocks and ends."""
    for number, _ in enumerate(tokenizer.stream(frames, **options, record=path), 1):
        if number == blocks:
            break


@pytest.mark.parametrize("copies", [True, False])
def test_a_run_that_goes_on_gives_what_an_unbroken_one_gives(
    tokenizer, frames, options, unbroken, tmp_path, monkeypatch, copies
):
    """Interrupted three times; with a copy of the cache after every block, and with none, when blocks are repeated."""
    monkeypatch.setattr(resume, "_COPY_SECONDS", 0.0 if copies else 1e9)
    monkeypatch.setattr(resume, "_COPY_SHARE", 0)
    path = tmp_path / "tokens.part"
    for blocks in (2, 1, 3):
        interrupted(tokenizer, frames[:27], options, path, blocks)
    if not copies:  # it ended in the middle of writing a record
        with open(path, "r+b") as file:
            file.truncate(path.stat().st_size - 3)
    encoding = tokenizer.stream(frames[:27], **options, record=path)
    recorded, first = encoding.num_recorded, encoding.first_block
    assert (first > 0) == copies and recorded >= (5 if copies else 2)
    results = list(encoding)
    assert len(results) == encoding.num_blocks - first
    assert encoding.tokens() == unbroken
    # The file is a whole clip: it decodes to what was reconstructed, and a next run repeats its numbers.
    decoded = np.concatenate(list(tokenizer.decode_stream(path)))
    np.testing.assert_array_equal(decoded, tokenizer.decode(unbroken))
    again = tokenizer.stream(frames[:27], **options, record=path)
    assert again.num_recorded == again.num_blocks
    list(again)
    assert again.tokens() == unbroken


def test_a_recording_of_another_run_is_refused(tokenizer, frames, options, tmp_path):
    path = tmp_path / "tokens.part"
    interrupted(tokenizer, frames[:27], options, path, 2)
    before = path.read_bytes()
    for other, name in (
        (dict(frames=frames[:28], **options), "clip"),
        (dict(frames=frames[:27], **options | {"threshold": 0.1}), "search"),
    ):
        with pytest.raises(ResumeError, match=f"another {name}; remove it"):
            tokenizer.stream(other.pop("frames"), **other, record=path)
    params = jax.tree.map(lambda x: np.asarray(x) * 1.001, tokenizer.params)
    with pytest.raises(ResumeError, match="another model"):
        tokenizer.with_params(params).stream(frames[:27], **options, record=path)
    with pytest.raises(ResumeError, match="cannot be read again"):
        tokenizer.stream(iter(frames[:27]), **options, record=path)
    with pytest.raises(ValueError, match="a budget is not spent block by block"):
        tokenizer.stream(frames[:27], avg_tokens=16, record=tmp_path / "b.part")
    assert path.read_bytes() == before and not (tmp_path / "b.part").exists()


def test_frames_that_come_one_by_one_are_a_clip(tokenizer, frames, options, unbroken, golden):
    """No more frames are taken than the blocks that were asked for need, and two blocks ahead."""
    taken = itertools.count()
    coming = (frame for frame, _ in zip(frames[:27], taken, strict=False))
    encoding = tokenizer.stream(coming, **options)
    assert encoding.num_blocks is None
    blocks = iter(encoding)
    next(blocks)
    assert next(taken) <= 5 * tokenizer.config.frames_per_block + 2
    list(blocks)
    assert encoding.tokens().counts.tolist() == unbroken.counts.tolist()
    path = golden / "media" / "clip_160x120_30fps_97f.mp4"
    reader = media.open_clip(path, resolution=32, max_frames=27, rate=30)
    assert list(tokenizer.stream(reader, **options))[-1].tokens.num_kept == unbroken.counts[-1]
    odd = [frames[0], frames[1][:-1]]
    with pytest.raises(ValueError, match="all of one size"):
        list(tokenizer.stream(iter(odd), **options))
    with pytest.raises(ValueError, match="No frame came"):
        tokenizer.stream(iter([]), **options)


def test_decoding_follows_a_file_that_is_being_written(tokenizer, frames, options, tmp_path):
    path = tmp_path / "tokens.part"
    encoding = tokenizer.stream(frames[:19], **options, record=path)
    decoded = []

    def follow():
        decoded.extend(tokenizer.decode_stream(path, follow=True, patience=60))

    reader = threading.Thread(target=follow)
    reader.start()
    made = np.concatenate([block.reconstruction for block in encoding])
    reader.join(60)
    # The programs differ, and so may a level's rounding.
    np.testing.assert_allclose(np.concatenate(decoded).astype(int), made, atol=1)
    interrupted(tokenizer, frames[:19], options, tmp_path / "left", 1)
    with pytest.raises(TokenFileError, match="has not grown for"):
        list(tokenizer.decode_stream(tmp_path / "left", follow=True, patience=0.1))


def test_clips_side_by_side_are_shared_evenly_over_dp(tokenizer, frames, options):
    mesh = make_mesh("2,1,1,1", jax.devices()[:2])
    many = ElasticTokenizer(tokenizer.config, tokenizer.params, mesh=mesh)
    with pytest.raises(ValueError, match="batch=3 must be a multiple of dp"):
        list(many.encode_many([frames[:5]], batch=3, **options))


@pytest.mark.parametrize(("batch", "mesh_dim"), [(3, "1,1,1,1"), (2, "2,1,2,1")])
def test_clips_side_by_side_have_the_tokens_they_have_alone(
    tokenizer, frames, options, tmp_path, golden, batch, mesh_dim
):
    """Of different lengths, with a picture and an unreadable file among them, more of them than slots."""
    (tmp_path / "bad.mp4").write_bytes(b"no video")
    sources = [
        frames[:5],
        frames[40:60],
        tmp_path / "bad.mp4",
        frames[3],
        frames[60:71],
        frames[:2],
    ]
    size = int(np.prod([int(n) for n in mesh_dim.split(",")]))
    many = ElasticTokenizer(
        tokenizer.config,
        tokenizer.params,
        mesh=make_mesh(mesh_dim, jax.devices()[:size]),
        window_blocks=3,
        search_width=2,
    )
    found = dict(many.encode_many(sources, batch=batch, **options))
    assert sorted(found) == list(range(len(sources)))
    assert isinstance(found.pop(2), media.MediaError)
    for number, tokens in found.items():
        alone = tokenizer.encode(sources[number], **options)
        assert tokens.counts.tolist() == alone.counts.tolist()
        for a, b in zip(tokens.blocks, alone.blocks, strict=True):
            np.testing.assert_allclose(a.values, b.values, rtol=0, atol=1e-5)
            np.testing.assert_allclose(a.loss, b.loss, rtol=1e-5)
            assert a.met_threshold == b.met_threshold


@settings(max_examples=60)
@given(data=st.data())
def test_a_token_stream_cut_anywhere_is_its_first_blocks(data, tmp_path_factory):
    path = tmp_path_factory.mktemp("stream") / "tokens.part"
    counts = data.draw(st.lists(st.integers(1, 5), max_size=5))
    rng = np.random.default_rng(0)
    blocks = [
        BlockTokens(num_kept=n, loss=n / 7, met_threshold=n > 2, vectors=rng.normal(size=(n, 3)))
        for n in counts
    ]
    with TokenStreamWriter(path, {"config_hash": "0"}) as writer:
        ends = [path.stat().st_size]
        for number, block in enumerate(blocks):
            writer.append(block, number + 1, memory={"x": [0.1, None]})
            ends.append(path.stat().st_size)
        writer.finish()
    whole = path.read_bytes()
    cut = data.draw(st.integers(ends[0], len(whole)))
    path.write_bytes(whole[:cut])
    header, found = read_token_stream(path)
    found = list(found)
    assert header["config_hash"] == "0"
    assert len(found) == sum(end <= cut for end in ends[1:])
    for number, (record, block) in enumerate(zip(found, blocks, strict=False)):
        assert (record.tokens.num_kept, record.tokens.loss) == (block.num_kept, block.loss)
        np.testing.assert_array_equal(record.tokens.vectors, block.vectors)
        assert (record.num_frames, record.about) == (number + 1, {"memory": {"x": [0.1, None]}})
    # Going on cuts off what is torn, or what is not wanted.
    with TokenStreamWriter(path, {}, keep=len(found)) as writer:
        writer.finish()
    assert len(list(read_token_stream(path)[1])) == len(found)
    # A byte that is not as it was written is noticed, unless it makes the last record look longer than the file.
    place = data.draw(st.integers(8, ends[-1] - 1))
    path.write_bytes(whole[:place] + bytes([whole[place] ^ 0x55]) + whole[place + 1 :])
    try:
        damaged = list(read_token_stream(path)[1])
    except TokenFileError:
        damaged = []
    assert len(damaged) < max(1, len(blocks))

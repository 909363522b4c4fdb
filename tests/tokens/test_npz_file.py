"""The token file: what is read is what was written, and no damage or forgery passes."""

import dataclasses
import hashlib
import io
import json
import math
import pathlib
import pickle
import zipfile
from typing import Any

import hypothesis.extra.numpy as hnp
import numpy as np
import pytest
from clip_cases import example
from hypothesis import given
from hypothesis import strategies as st

from elastic.tokens import BlockTokens, TokenizedClip, npz_file
from elastic.tokens.clip import TokenFileError

FINITE = st.floats(-(2.0**99), 2.0**99, width=32)


@st.composite
def clips(draw) -> dict[str, Any]:
    """The fields of any clip of either bottleneck, an image or not; `build` makes the clip.

    Apart, because the type checks of the tests draw random numbers, which Hypothesis forbids here.
    """
    fsq, is_image = draw(st.booleans()), draw(st.booleans())
    num_blocks = 1 if is_image else draw(st.integers(1, 5))
    frames_per_block = draw(st.integers(1, 4))
    codebook_size = draw(st.sampled_from([1, 2, 240, 64_000, 65_536, 65_537, 2**24]))
    threshold = draw(st.none() | st.floats(0, 1))
    dim = draw(st.integers(1, 8))
    blocks = []
    for _ in range(num_blocks):
        num_kept = draw(st.integers(1, 20))
        loss = draw(st.floats(0, allow_infinity=True) | st.just(math.nan))
        met = math.isfinite(loss) and (threshold is None or loss <= threshold)
        if fsq:
            values = hnp.arrays(np.int32, num_kept, elements=st.integers(0, codebook_size - 1))
        else:
            values = hnp.arrays(np.float32, (num_kept, dim), elements=FINITE)
        blocks.append(
            {
                "num_kept": num_kept,
                "loss": loss,
                "met_threshold": met and draw(st.booleans()),
                "indices" if fsq else "vectors": draw(values),
            }
        )
    last = draw(st.integers(1, frames_per_block))
    return {
        "blocks": blocks,
        "bottleneck_type": "fsq" if fsq else "vae",
        "codebook_size": codebook_size if fsq else None,
        "tokens_per_block": draw(st.integers(20, 4096)),
        "frames_per_block": frames_per_block,
        "num_frames": 1 if is_image else (num_blocks - 1) * frames_per_block + last,
        "is_image": is_image,
        "resolution": draw(st.integers(8, 256)),
        "source": draw(st.tuples(st.integers(1, 10_000), st.integers(1, 10_000))),
        "rate": 0.0 if is_image else draw(st.floats(0.1, 240)),
        "model_id": draw(st.text(st.characters(codec="utf-8"), max_size=20)),
        "config_hash": draw(st.text("0123456789abcdef", min_size=1, max_size=64)),
        "threshold": threshold,
        "search": draw(st.sampled_from(["binary", "linear", "fixed"])),
        "window_blocks": draw(st.integers(1, 64)),
        "context": draw(st.sampled_from(["carry", "restart"])),
        "pixel_aspect": draw(st.just((1, 1)) | st.tuples(st.integers(1, 99), st.integers(1, 99))),
        "transfer": draw(st.sampled_from(["sdr", "pq", "hlg"])),
    }


def build(fields: dict[str, Any]) -> TokenizedClip:
    blocks = tuple(BlockTokens(**block) for block in fields["blocks"])
    return TokenizedClip(**(fields | {"blocks": blocks}))


def assert_same(a: TokenizedClip, b: TokenizedClip) -> None:
    for field in dataclasses.fields(TokenizedClip):
        if field.name != "blocks":
            assert getattr(a, field.name) == getattr(b, field.name), field.name
            assert type(getattr(a, field.name)) is type(getattr(b, field.name)), field.name
    for left, right in zip(a.blocks, b.blocks, strict=True):
        assert (left.num_kept, left.met_threshold) == (right.num_kept, right.met_threshold)
        np.testing.assert_equal(left.loss, right.loss)
        for name in ("indices", "vectors"):
            values, others = getattr(left, name), getattr(right, name)
            assert (values is None) == (others is None)
            if values is not None:
                assert values.dtype == others.dtype and values.tobytes() == others.tobytes()


@given(fields=clips())
def test_what_is_read_is_what_was_written(fields):
    clip = build(fields)
    data = clip.to_bytes()
    again = TokenizedClip.from_bytes(data)
    assert_same(clip, again)
    assert again == clip and again.to_bytes() == data


def test_the_usual_pixels_take_no_room_in_a_file_and_others_are_kept():
    usual = example()
    unlike = dataclasses.replace(usual, pixel_aspect=(32, 27), transfer="pq")
    headers = []
    for clip in (usual, unlike):
        with np.load(io.BytesIO(clip.to_bytes())) as file:
            headers.append(json.loads(file["header"].tobytes()))
    assert not headers[0].keys() & {"pixel_aspect", "transfer"}
    added = {"pixel_aspect": [32, 27], "transfer": "pq"}
    assert headers[1] == headers[0] | added
    again = TokenizedClip.from_bytes(unlike.to_bytes())
    assert (again.pixel_aspect, again.transfer) == ((32, 27), "pq")
    with pytest.raises(ValueError, match=r"pixel_aspect=\(0, 1\) must be"):
        dataclasses.replace(usual, pixel_aspect=(0, 1))


@given(fields=clips())
def test_numpy_alone_reads_the_file(fields):
    clip = build(fields)
    with np.load(io.BytesIO(clip.to_bytes()), allow_pickle=False) as file:
        header = json.loads(file["header"].tobytes())
        name = "indices" if clip.bottleneck_type == "fsq" else "vectors"
        blocks = np.split(file[name], np.cumsum(file["counts"])[:-1])
        np.testing.assert_array_equal(file["losses"], [block.loss for block in clip.blocks])
    assert header["num_frames"] == clip.num_frames and header["format"] == "elastictok-tokens"
    for values, block in zip(blocks, clip.blocks, strict=True):
        np.testing.assert_array_equal(values, getattr(block, name))


@pytest.mark.parametrize("bottleneck_type", ["fsq", "vae"])
def test_any_flipped_bit_or_missing_end_is_refused(bottleneck_type):
    data = example(bottleneck_type).to_bytes()
    damaged = bytearray(data)
    for position in range(len(data)):
        damaged[position] ^= 1 << (position % 8)
        with pytest.raises(TokenFileError):
            TokenizedClip.from_bytes(bytes(damaged))
        damaged[position] = data[position]
        with pytest.raises(TokenFileError):
            TokenizedClip.from_bytes(data[:position])
    with pytest.raises(TokenFileError):
        TokenizedClip.from_bytes(data + b"\0")


def sealed(data: bytes) -> bytes:
    """The digest made right again, as someone who means harm would."""
    body = data[:-64]
    return body + hashlib.sha256(body).hexdigest().encode()


@pytest.mark.parametrize("bottleneck_type", ["fsq", "vae"])
def test_no_forged_byte_gives_another_error_or_a_clip_that_breaks_the_rules(bottleneck_type):
    data = example(bottleneck_type).to_bytes()
    for position in range(len(data) - 64):
        forged = bytearray(data)
        forged[position] ^= 1 << (position * 7 % 8)
        try:
            clip = TokenizedClip.from_bytes(sealed(bytes(forged)))
        except TokenFileError:
            continue
        assert clip.num_tokens == sum(block.num_kept for block in clip.blocks)


def forge(clip: TokenizedClip, header=None, **changes) -> bytes:
    """A sealed file with changed arrays (None removes one) or header fields."""
    arrays = dict(npz_file.unpack(clip.to_bytes(), name="x"))
    if header is not None:
        fields = json.loads(arrays["header"].tobytes()) | header
        fields = {key: value for key, value in fields.items() if value != "absent"}
        arrays["header"] = np.frombuffer(json.dumps(fields).encode(), np.uint8)
    arrays |= changes
    return npz_file.pack({key: value for key, value in arrays.items() if value is not None})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"counts": np.array([3, 8, 6], "<i4")}, "counts add up to 17"),
        ({"counts": np.array([3, 13, 0], "<i4")}, "counts add up"),
        ({"counts": np.array([-1, 8, 9], "<i4")}, "counts add up"),
        ({"counts": np.array([3, 9, 4], "<i4")}, "Block 1 keeps 9 of tokens_per_block=8"),
        ({"counts": np.array(16, "<i4")}, "not one of plain numbers"),
        ({"counts": np.array([[3, 8, 5]], "<i4")}, "counts must have one entry"),
        ({"counts": np.array([3.0, 8, 5])}, "the arrays must be"),
        ({"losses": np.array([0.1, 0.1], "<f8")}, "losses must have one entry"),
        ({"losses": np.array([0.007, 0.008, 0.005], "<f8")}, "cannot have met threshold"),
        ({"losses": np.array([-1.0, 0.008, 0.005], "<f8")}, "must not be below 0"),
        ({"indices": np.full(16, 64_000, "<u2")}, "outside codebook_size=64000"),
        ({"indices": np.zeros((16, 1), "<u2")}, "indices has shape"),
        ({"indices": np.zeros(16, "<f4")}, "the arrays must be"),
        ({"indices": None}, "the arrays must be"),
        ({"extra": np.zeros(1, "<i4")}, "the arrays must be"),
        ({"header": {"version": 2}}, "version 2; this package reads 1"),
        ({"header": {"format": "other"}}, "does not say"),
        ({"header": {"rate": "absent"}}, "missing or unknown"),
        ({"header": {"more": 1}}, "missing or unknown"),
        ({"header": {"rate": math.inf}}, "rate=inf"),
        ({"header": {"rate": 10**400}}, "of no use"),
        ({"header": {"threshold": math.nan}}, "threshold=nan"),
        ({"header": {"num_frames": 13}}, "num_frames=13 must fill 3 blocks"),
        ({"header": {"num_frames": 8}}, "num_frames=8 must fill 3 blocks"),
        ({"header": {"num_frames": True}}, "of no use"),
        ({"header": {"source": [320]}}, "of no use"),
        ({"header": {"source": [320, 0]}}, r"source=\(320, 0\)"),
        ({"header": {"source": [320, [1]]}}, "of no use"),
        ({"header": {"source": 5}}, "of no use"),
        ({"header": {"bottleneck_type": "vae"}}, "the arrays must be"),
        ({"header": {"bottleneck_type": "pca"}}, "bottleneck_type='pca'"),
        ({"header": {"context": "lose"}}, "context='lose'"),
        ({"header": {"config_hash": "../x"}}, "hexadecimal"),
        ({"header": {"is_image": True}}, "must be 1 for an image"),
    ],
)
def test_a_file_that_contradicts_itself_is_refused_by_name(tmp_path, change, message):
    path = tmp_path / "tokens.npz"
    path.write_bytes(forge(example(), **change))
    with pytest.raises(TokenFileError, match=message) as error:
        TokenizedClip.load(path)
    assert str(path) in str(error.value) and "again." in str(error.value)


def test_a_file_without_a_header_is_refused():
    with pytest.raises(TokenFileError, match="header is missing"):
        TokenizedClip.from_bytes(npz_file.pack({"counts": np.zeros(1, "<i4")}))


def test_vectors_must_be_finite():
    clip = example("vae")
    vectors = np.concatenate([block.vectors for block in clip.blocks])
    for bad in (math.nan, math.inf):
        vectors[7, 2] = bad
        with pytest.raises(TokenFileError, match="vectors must be finite"):
            TokenizedClip.from_bytes(forge(clip, vectors=vectors))


def archive(members: dict[str, bytes], compression=zipfile.ZIP_STORED) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", compression) as file:
        for name, data in members.items():
            file.writestr(name, data)
        file.comment = b"elastictok-tokens sha256 " + b"0" * 64
    return sealed(buffer.getvalue())


def array_bytes(array, **options) -> bytes:
    buffer = io.BytesIO()
    np.lib.format.write_array(buffer, array, **options)
    return buffer.getvalue()


def test_pickles_bombs_and_foreign_files_are_refused(tmp_path):
    class Harm:
        def __reduce__(self):
            return (pathlib.Path.touch, (tmp_path / "harmed",))

    objects = np.array([Harm()], object)
    buffer = io.BytesIO()
    np.savez(buffer, counts=np.zeros(3))
    claim = array_bytes(np.zeros(8, np.uint8)).replace(b"(8,), }   ", b"(1<<40,), }")
    huge = array_bytes(np.zeros(8, np.uint8)).replace(b"(8,), }         ", b"(8888888888,), }")
    deep = b"[" * 60_000
    cases = [
        b"",
        b"PK",
        b"\x89PNG" * 50,
        pickle.dumps([1, 2, 3]),
        buffer.getvalue(),
        archive({"header.npy": array_bytes(objects, allow_pickle=True)}),
        archive({"header.npy": array_bytes(np.zeros(10**7))}, zipfile.ZIP_DEFLATED),
        archive({"header.npy": claim}),
        archive({"header.npy": huge}),
        archive({"header.npy": b"\x93NUMPY\x01\x00"}),
        archive({"header.npy": array_bytes(np.asfortranarray(np.zeros((3, 2))))}),
        archive({"header.npy": array_bytes(np.frombuffer(deep, np.uint8))}),
        archive({"header": array_bytes(np.zeros(2)), "header.npy": array_bytes(np.zeros(2))}),
        sealed(b"no zip" + b"elastictok-tokens sha256 " + b"0" * 64),
    ]
    assert huge != claim != array_bytes(np.zeros(8, np.uint8)) != huge
    for data in cases:
        path = tmp_path / "tokens.npz"
        path.write_bytes(data)
        with pytest.raises(TokenFileError, match=r"tokens\.npz"):
            TokenizedClip.load(path)
    assert not (tmp_path / "harmed").exists()


def test_saving_replaces_the_file_whole_or_leaves_it(tmp_path, monkeypatch):
    path = tmp_path / "tokens.npz"
    example().save(path)
    before = path.read_bytes()

    def full(source, target):
        raise OSError("no space left")

    with monkeypatch.context() as patch:
        patch.setattr("os.replace", full)
        with pytest.raises(OSError, match="no space"):
            example(counts=(2,)).save(path)
    assert path.read_bytes() == before and [p.name for p in tmp_path.iterdir()] == ["tokens.npz"]
    assert TokenizedClip.load(path) == example()
    with pytest.raises(FileNotFoundError):
        example().save(tmp_path / "missing" / "tokens.npz")
    with pytest.raises(FileNotFoundError):
        TokenizedClip.load(tmp_path / "none.npz")

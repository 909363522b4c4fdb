"""Where a clip may be: every way to its bytes gives the same frames, and a location travels between processes."""

import dataclasses
import io
import multiprocessing.reduction
import shutil
import tarfile

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from media_cases import CLIP
from small_models import load_tokenizer

from elastic.media import ClipLocation, MediaError, open_clip, probe
from elastic.media.location import place_of


def tar_location(path, member):
    with tarfile.open(path) as tar:
        info = tar.getmember(member)
    at = (info.offset_data, info.size)
    return ClipLocation(kind="tar", place=str(path), member=member, at=at)


@pytest.fixture(scope="module")
def ways(golden, tmp_path_factory):
    """{name of the way: what `open_clip` takes} to the bytes of one clip."""
    folder, clip = tmp_path_factory.mktemp("ways"), golden / CLIP
    data = clip.read_bytes()
    with tarfile.open(folder / "clips.tar", "w") as tar:
        for name in ("first.mp4", "a/clip.mp4"):
            tar.add(clip, name)
    structs = [None, {"bytes": data, "path": "clip.mp4"}, {"bytes": None, "path": "beside.mp4"}]
    kind = pa.struct({"bytes": pa.binary(), "path": pa.string()})
    table = pa.table({"video": pa.array(structs, kind), "mp4": [None, data, data]})
    pq.write_table(table, folder / "clips.parquet", row_group_size=2)
    shutil.copy(clip, folder / "beside.mp4")

    def cell(column, group, row, **more):
        place = str(folder / "clips.parquet")
        return ClipLocation(kind="parquet", place=place, column=column, at=(group, row), **more)

    return {
        "file": clip,
        "URL": f"file://{clip}",
        "bytes": data,
        "memoryview": memoryview(data),
        "open file": io.BytesIO(data),
        "tar": tar_location(folder / "clips.tar", "a/clip.mp4"),
        "tar by URL": dataclasses.replace(
            tar_location(folder / "clips.tar", "first.mp4"), place=f"file://{folder}/clips.tar"
        ),
        "cell": cell("video", 0, 1, member="clip.mp4"),
        "cell of bytes": cell("mp4", 1, 0, member="2"),
        "cell of a path": cell("video", 1, 0, member="beside.mp4"),
        "null": cell("video", 0, 0, member="0"),
    }


def frames(source, **options):
    with open_clip(source, resolution=16, max_frames=20, **options) as clip:
        return clip.read()


GOOD = ["URL", "bytes", "memoryview", "open file", "tar", "tar by URL"]
GOOD += ["cell", "cell of bytes", "cell of a path"]


@pytest.mark.parametrize("way", GOOD)
def test_every_way_to_a_clip_s_bytes_gives_the_same_frames_and_facts(ways, way):
    source, plain = place_of(ways[way]), probe(ways["file"])
    assert probe(source).num_frames == plain.num_frames and probe(source).rate == plain.rate
    np.testing.assert_array_equal(frames(source), frames(ways["file"]))


def test_a_location_travels_to_another_process_and_says_what_it_is(ways):
    location = ways["tar"]
    sent = multiprocessing.reduction.ForkingPickler.dumps(location)
    assert multiprocessing.reduction.ForkingPickler.loads(sent) == location and len(sent) < 1000
    assert (location.name, location.suffix) == ("clip.mp4", ".mp4")
    assert str(location).endswith("clips.tar/a/clip.mp4")
    assert len({place_of(ways[name]).identity for name in GOOD if name in ("tar", "cell")}) == 2


def test_what_cannot_be_read_is_one_error_that_names_the_cell(ways):
    with pytest.raises(MediaError, match=r"clips\.parquet/video/0 .*is null"):
        probe(ways["null"])
    with pytest.raises(ValueError, match="mode 'rb'"):
        probe(io.StringIO("text"))
    outside = ClipLocation(kind="tar", place="none.tar", member="a.mp4", problem="it is cut off")
    with pytest.raises(MediaError, match=r"none\.tar/a\.mp4' cannot be read: it is cut off"):
        probe(outside)


def test_a_range_of_seconds_gives_the_frames_between_them(ways, golden):
    """97 frames at 30 frames/s."""
    path = str(golden / CLIP)
    whole = open_clip(path, resolution=16, rate=None).read()

    def part(start, end):
        location = ClipLocation(kind="file", place=path, start=start, end=end)
        return open_clip(location, resolution=16, rate=None).read()

    np.testing.assert_array_equal(part(1.0, 2.0), whole[30:60])
    np.testing.assert_array_equal(part(3.0, None), whole[90:])
    # Ranges that follow each other share no frame and lose none.
    parts = [part(start / 10, (start + 7) / 10) for start in range(0, 33, 7)]
    np.testing.assert_array_equal(np.concatenate(parts), whole)
    with pytest.raises(MediaError, match=r"lasts 3\.2\d+ s and has no frame from 4 s"):
        part(4.0, 5.0)


def test_the_tokenizer_takes_bytes_and_open_files(golden, ways):
    tokenizer = load_tokenizer(golden, "fsq")
    options = dict(num_tokens=8, max_frames=4)
    expected = tokenizer.encode(ways["file"], **options)
    for source in (
        ways["bytes"],
        io.BytesIO(ways["bytes"]),
        ways["cell"],
        f"file://{ways['file']}",
    ):
        assert tokenizer.encode(source, **options) == expected

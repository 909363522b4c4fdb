"""What people name as input: every kind gives the same clips under the same ids, and damage costs only what it touches."""

import json
import logging
import os
import tarfile

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from cachetools import LRUCache
from data_sets import KIND, add_member, content, make_clips, write_list, write_parquet, write_tar

from elastic.media import (
    ClipLocation,
    MediaError,
    cells,
    kept_members,
    open_clip,
    table_rows,
    tar_members,
)
from elastic.media.inputs import check_input, expand_braces, find_clips


@pytest.fixture(scope="module")
def clips(tmp_path_factory):
    folder = tmp_path_factory.mktemp("clips")
    return folder, make_clips(folder, images=3, videos=1)


def test_a_folder_a_tar_a_parquet_file_and_lists_give_the_same_clips_under_the_same_ids(
    clips, tmp_path
):
    folder, expected = clips
    kinds = [
        folder,
        write_tar(tmp_path / "clips.tar", expected),
        f"file://{write_tar(tmp_path / 'remote.tar', expected)}",
        write_parquet(tmp_path / "clips.parquet", expected),
        f"file://{tmp_path / 'clips.parquet'}",
        f"file://{folder}",
        *(write_list(tmp_path / f"list{e}", folder, expected) for e in (".txt", ".csv", ".jsonl")),
    ]
    for kind in kinds:
        assert content(find_clips(kind)) == expected, kind
        check_input(kind)


def test_ids_of_several_shards_begin_with_the_shard_so_that_more_shards_change_none(
    clips, tmp_path
):
    _, data = clips
    for number in range(2):
        write_tar(tmp_path / f"c-{number:03d}.tar", data)
    both = [f"c-{n:03d}.tar/{name}" for n in range(2) for name in data]
    patterns = (tmp_path, tmp_path / "c-{000..001}.tar", tmp_path / "c-*.tar", tmp_path / "c-00[01].tar")  # fmt: skip
    for pattern in patterns:
        assert list(find_clips(pattern)) == both
    assert list(find_clips(f"file://{tmp_path}/c-{{000..001}}.tar")) == both
    assert list(find_clips(f"file://{tmp_path}")) == both
    os.remove(tmp_path / "c-001.tar")
    for pattern in (tmp_path, tmp_path / "c-*.tar"):
        assert list(find_clips(pattern)) == both[: len(data)]
    with pytest.raises(MediaError, match=r"no file .*c-001\.tar', which"):
        find_clips(tmp_path / "c-{000..001}.tar")
    assert list(find_clips(tmp_path / "c-000.tar")) == list(data)


def test_braces_are_those_of_a_shell():
    assert list(expand_braces("a{08..11}{x,y}")) == [f"a{n:02d}{e}" for n in range(8, 12) for e in "xy"]  # fmt: skip
    assert list(expand_braces("a{8..10}.tar")) == ["a8.tar", "a9.tar", "a10.tar"]


def test_metadata_of_tar_parquet_and_lists_is_that_of_the_clip(clips, tmp_path):
    folder, data = clips
    captions = {name: f"a caption of {name}" for name in data}
    kinds = [
        write_tar(tmp_path / "c.tar", data, captions),
        write_parquet(tmp_path / "c.parquet", data, captions),
        write_list(tmp_path / "c.jsonl", folder, data, captions),
    ]
    for kind in kinds:
        said = {name: place.metadata() for name, place in find_clips(kind).items()}
        assert said == {n: {"caption": c, "number": len(c)} for n, c in captions.items()}, kind
    with tarfile.open(tmp_path / "keys.tar", "w") as tar:  # WebDataset's keys end at the first dot
        add_member(tar, "k1.left.png", data["a/0.png"])
        add_member(tar, "k1.txt", b"one\n")
        add_member(tar, "k2.png", data["a/0.png"])
        add_member(tar, "k2.json", b"{damaged")
    said = {name: place.metadata() for name, place in find_clips(tmp_path / "keys.tar").items()}
    assert said == {"k1.left.png": {"caption": "one"}, "k2.png": {"json": "{damaged"}}


def test_a_damaged_tar_costs_the_members_that_the_damage_touches_and_no_other(
    clips, tmp_path, caplog
):
    _, data = clips
    png = data["a/0.png"]
    path = tmp_path / "bad.tar"
    with tarfile.open(path, "w", format=tarfile.GNU_FORMAT) as tar:
        add_member(tar, "first.png", png)
        add_member(tar, "lost.png", png)
        add_member(tar, "../../out.png", png)
        add_member(tar, "/etc/abs.png", png)
        add_member(tar, "same.png", png)
        add_member(tar, "same.png", png)
        add_member(tar, "link.png", b"", type=tarfile.SYMTYPE, linkname="/etc/passwd")
        add_member(tar, "pipe.png", b"", type=tarfile.FIFOTYPE)
        add_member(tar, "._first.png", png)
        add_member(tar, "n" * 300 + ".png", png)
        add_member(tar, "last.png", png)
    raw = bytearray(path.read_bytes())
    header = raw.index(b"lost.png")
    raw[header] ^= 1  # its checksum is wrong now
    end = raw.rindex(b"last.png") + 512 + 10  # ten bytes of the last member
    path.write_bytes(raw[:end])
    with caplog.at_level(logging.WARNING):
        found = find_clips(path)
    good = {name for name, place in found.items() if not place.problem}
    assert good == {"first.png", "out.png", "etc/abs.png", "same.png", "same#2.png", "n" * 300 + ".png"}  # fmt: skip
    assert all(data == png for data in content({n: found[n] for n in good}).values())
    problems = {name: place.problem for name, place in found.items() if place.problem}
    assert problems.keys() == {f"damaged header at byte {header}", "link.png", "pipe.png", "last.png"}  # fmt: skip
    assert "bad checksum" in problems[f"damaged header at byte {header}"]
    assert "10 of its" in problems["last.png"] and "/etc/passwd" in problems["link.png"]
    for name in problems:
        with pytest.raises(MediaError, match="cannot be read") as refusal:
            open_clip(found[name], resolution=8)
        assert "\n" not in str(refusal.value)
    assert len([r for r in caplog.records if "same.png" in r.getMessage()]) == 1
    assert len([r for r in caplog.records if "is called" in r.getMessage()]) == 2


def test_a_tar_cut_inside_a_header_and_one_without_an_end_keep_their_members(clips, tmp_path):
    _, data = clips
    path = write_tar(tmp_path / "cut.tar", data)
    raw = path.read_bytes()
    last = list(data)[-1]
    header = raw.rindex(last.encode())
    for stop, lost in ((header, 0), (header + 100, 1)):
        path.write_bytes(raw[:stop])
        found = find_clips(path)
        assert sorted(n for n, p in found.items() if not p.problem) == sorted(list(data)[:-1])
        assert len([p for p in found.values() if p.problem]) == lost


def test_a_sparse_member_of_ten_gigabytes_is_named_and_takes_no_memory(clips, tmp_path):
    """GNU's old format: a map of data in the header, and the real size."""
    _, data = clips
    info = tarfile.TarInfo("huge.mp4")
    info.type = tarfile.GNUTYPE_SPARSE
    raw = bytearray(info.tobuf(tarfile.GNU_FORMAT))
    raw[386:410] = b"00000000000\x0000000000000\x00"  # one piece, empty
    raw[483:495] = b"112402762000"  # 10^10
    raw[148:156] = b" " * 8
    raw[148:156] = b"%06o\0 " % sum(raw)
    path = write_tar(tmp_path / "sparse.tar", data)
    path.write_bytes(bytes(raw) + path.read_bytes())
    found = find_clips(path)
    assert f"sparse file of {10**10} bytes" in found.pop("huge.mp4").problem
    assert content(found) == data
    # A header that announces a name of gigabytes is damage, and is not read.
    name = tarfile.TarInfo("././@LongLink")
    name.type, name.size = tarfile.GNUTYPE_LONGNAME, 5 * 10**9
    path.write_bytes(name.tobuf(tarfile.GNU_FORMAT) + write_tar(path, data).read_bytes())
    found = find_clips(path)
    assert {n for n, p in found.items() if not p.problem} == set(data) and len(found) == 5


def test_what_is_no_tar_is_refused_in_one_line(clips, tmp_path):
    with tarfile.open(tmp_path / "a.tar", "w:gz") as tar:
        add_member(tar, "a.png", b"1")
    with pytest.raises(MediaError, match=r"compressed \(gzip\)"):
        find_clips(tmp_path / "a.tar")
    for data, why in ((b"", "empty"), (b"no tar at all" * 100, "no tar file")):
        (tmp_path / "b.tar").write_bytes(data)
        with pytest.raises(MediaError, match=why):
            find_clips(tmp_path / "b.tar")
    with tarfile.open(tmp_path / "c.tar", "w") as tar:
        add_member(tar, "notes.md", b"1")
    with pytest.raises(MediaError, match="no image or video"):
        find_clips(tmp_path / "c.tar")


def test_rows_without_a_clip_are_named_and_the_others_read(clips, tmp_path):
    _, data = clips
    (tmp_path / "beside.png").write_bytes(data["a/0.png"])
    column = [None, {"bytes": None, "path": None}, {"bytes": data["a/0.png"], "path": "x.png"}]
    column += [{"bytes": None, "path": p} for p in ("beside.png", "../up.png", "/etc/passwd")]
    column += [{"bytes": data["a/0.png"], "path": "x.png"}]
    pq.write_table(pa.table({"image": pa.array(column, KIND)}), tmp_path / "n.parquet")
    found = find_clips(tmp_path / "n.parquet")
    assert list(found) == ["00000000", "00000001", "beside.png", "etc/passwd", "up.png", "x.png", "x.png#6"]  # fmt: skip
    assert content({n: found[n] for n in ("x.png", "x.png#6", "beside.png")}) == dict.fromkeys(
        ("x.png", "x.png#6", "beside.png"), data["a/0.png"]
    )
    for name, why in {"00000000": "null", "00000001": "null", "up.png": "leads out", "etc/passwd": "leads out"}.items():  # fmt: skip
        with pytest.raises(MediaError, match=why):
            open_clip(found[name], resolution=8)


def test_a_row_group_larger_than_what_is_kept_is_kept_alone(clips, tmp_path, monkeypatch):
    _, data = clips
    most = max(map(len, data.values()))
    held = LRUCache(most, getsizeof=lambda column: min(column.nbytes, most))
    monkeypatch.setattr(cells, "_HELD_BYTES", most)
    monkeypatch.setattr(cells, "_groups", held)
    column = pa.array([{"bytes": v, "path": k} for k, v in data.items()], KIND)
    pq.write_table(pa.table({"video": column}), tmp_path / "c.parquet", row_group_size=2)
    assert content(find_clips(tmp_path / "c.parquet")) == data
    assert len(held) == 1


def test_the_column_of_clips_is_found_by_its_type_or_named(tmp_path):
    def columns(path, wanted="", **table):
        metadata = table.pop("metadata", None)
        pq.write_table(pa.table(table).replace_schema_metadata(metadata), tmp_path / path)
        return {p.column for p in table_rows.rows_of_parquet(str(tmp_path / path), wanted)}

    data = pa.array([b"1"])
    assert columns("one.parquet", thing=data, label=["a"]) == {"thing"}
    assert columns("usual.parquet", hash=data, mp4=data) == {"mp4"}
    features = {"info": {"features": {"b": {"_type": "Image"}, "a": {"_type": "Value"}}}}
    said = {"huggingface": json.dumps(features)}
    assert columns("said.parquet", a=data, b=data, metadata=said) == {"b"}
    with pytest.raises(MediaError, match=r"several columns of bytes \(p, q\); name one: .*::p"):
        columns("two.parquet", p=data, q=data)
    assert {p.column for p in find_clips(f"{tmp_path}/two.parquet::q").values()} == {"q"}
    with pytest.raises(MediaError, match=r"no column of video or image bytes.*text"):
        columns("none.parquet", text=["a"])
    (tmp_path / "no.parquet").write_bytes(b"PAR1 no")
    with pytest.raises(MediaError, match=r"Cannot read .*no sound Parquet"):
        find_clips(tmp_path / "no.parquet")


def test_a_list_says_range_weight_and_anything_else(clips, tmp_path):
    folder, _data = clips
    lines = [
        {"path": "a/v0.mp4", "start": 0.0, "end": 0.1, "caption": "begin", "tags": ["x"]},
        {"path": "a/v0.mp4", "start": "0.1", "weight": 2},
        {"path": "a/0.png", "id": "my own"},
        {"path": "gone.mp4"},
    ]
    path = folder / "list.jsonl"
    path.write_text("\n".join(map(json.dumps, lines)) + "\n\n")
    found = find_clips(path)
    assert list(found) == ["a/v0.mp4@0-0.1", "a/v0.mp4@0.1-", "gone.mp4", "my own"]
    first, second = found["a/v0.mp4@0-0.1"], found["a/v0.mp4@0.1-"]
    assert first.metadata() == {"caption": "begin", "tags": ["x"], "end": 0.1}
    assert second.weight == 2 and second.metadata() == {"start": 0.1, "weight": 2.0}
    frames = [open_clip(place, resolution=8, rate=None).read() for place in (first, second)]
    whole = open_clip(folder / "a/v0.mp4", resolution=8, rate=None).read()
    np.testing.assert_array_equal(np.concatenate(frames), whole)
    bad = {
        '{"path": "a.png"}\n{"path": "a.png"}': r"names 'a\.png' twice, .* line 2",
        '{"caption": "x"}': "line 1 .* names no file",
        '{"path": "a.png", "start": 2, "end": 1}': "start=2, end=1",
        '{"path": "a.png", "end": "soon"}': "end='soon' is not a number",
        "[1]": "holds a list",
        "{": "line 1 .* no JSON",
        "": "names no file",
    }
    for text, why in bad.items():
        (tmp_path / "bad.jsonl").write_text(text)
        with pytest.raises(MediaError, match=why):
            find_clips(tmp_path / "bad.jsonl")
    (tmp_path / "bad.csv").write_text("path,caption\na.png\n")
    with pytest.raises(MediaError, match=r"line 2 .* number of columns"):
        find_clips(tmp_path / "bad.csv")


def test_a_thousand_members_are_listed_without_reading_them(tmp_path, monkeypatch):
    """Memory and time go with the number of members, not with their bytes."""
    path = tmp_path / "big.tar"
    with open(path, "wb") as file:
        for number in range(1000):
            info = tarfile.TarInfo(f"{number:04d}.mp4")
            info.size = 2**20
            file.write(info.tobuf(tarfile.GNU_FORMAT))
            file.seek(2**20, 1)
        file.write(bytes(1024))
    read = []

    class Counted(tar_members._Headers):
        def read(self, size=-1):
            data = super().read(size)
            read.append(len(data))
            return data

    monkeypatch.setattr(tar_members, "_Headers", Counted)
    found = find_clips(path)
    assert len(found) == 1000 and sum(read) < 3 * 512 * 1000
    assert isinstance(found["0999.mp4"], ClipLocation)


def test_a_tar_that_took_long_to_list_is_not_listed_again_until_it_changes(
    clips, tmp_path, monkeypatch
):
    tar = write_tar(tmp_path / "c.tar", clips[1], dict.fromkeys(clips[1], "é"))
    with tarfile.open(tar, "a") as file:
        add_member(file, "link.mp4", b"", type=tarfile.LNKTYPE, linkname="a/v0.mp4")
    cache = tmp_path / "cache"
    monkeypatch.setenv("XDG_CACHE_HOME", str(cache))
    first = find_clips(tar)
    assert not cache.exists()  # it took no time
    monkeypatch.setattr(tar_members, "_LEAST_SECONDS", 0.0)
    assert find_clips(tar) == first
    (kept,) = (cache / "elastic" / "tar_members").iterdir()

    class Listed(Exception):
        pass

    def refuse(*_):
        raise Listed

    with monkeypatch.context() as patch:
        patch.setattr(tar_members, "_entries", refuse)
        assert find_clips(tar) == first and first["link.mp4"].problem
        patch.chdir(tmp_path)
        assert next(iter(find_clips("c.tar").values())).place == "c.tar"
        os.utime(tar, (1, 1))
        with pytest.raises(Listed):
            find_clips(tar)
    assert find_clips(tar) == first
    for file in kept.parent.iterdir():
        file.write_bytes(b"damaged")
    assert find_clips(tar) == first
    monkeypatch.setattr(kept_members, "_MOST_BYTES", 0)
    os.utime(tar, (2, 2))
    assert find_clips(tar) == first and not list(kept.parent.iterdir())

"""The same few clips as people store them: a folder, tar shards, Parquet, lists."""

import io
import json
import pathlib
import shutil
import tarfile

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from elastic.media import write_video
from elastic.media.location import open_file

KIND = pa.struct({"bytes": pa.binary(), "path": pa.string()})


def make_clips(folder: pathlib.Path, *, images: int = 9, videos: int = 3) -> dict[str, bytes]:
    """Writes tiny clips in two folders below one; {name: bytes}, sorted."""
    rng = np.random.default_rng(0)
    for number in range(images):
        path = folder / "ab"[number % 2] / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (16, 20, 3), np.uint8)).save(path)
    for number in range(videos):
        frames = rng.integers(0, 256, (5, 16, 16, 3), np.uint8)
        write_video(folder / "ab"[number % 2] / f"v{number}.mp4", frames, 24)
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}


def add_member(tar: tarfile.TarFile, name: str, data: bytes, **fields) -> None:
    info = tarfile.TarInfo(name)
    info.size = len(data)
    for field, value in fields.items():
        setattr(info, field, value)
    tar.addfile(info, io.BytesIO(data))


def write_tar(path: pathlib.Path, clips: dict[str, bytes], captions=None) -> pathlib.Path:
    """A tar file; a caption stands in a .json with the same key."""
    with tarfile.open(path, "w") as tar:
        for name, data in clips.items():
            add_member(tar, name, data)
            if captions:
                text = json.dumps({"caption": captions[name], "number": len(captions[name])})
                add_member(tar, f"{name.rsplit('.', 1)[0]}.json", text.encode())
    return path


def write_parquet(path: pathlib.Path, clips: dict[str, bytes], captions=None) -> pathlib.Path:
    """Row groups of five, with structs {bytes, path}."""
    columns = {"video": pa.array([{"bytes": v, "path": k} for k, v in clips.items()], KIND)}
    if captions:
        columns["caption"] = pa.array([captions[name] for name in clips])
        columns["number"] = pa.array([len(captions[name]) for name in clips])
    pq.write_table(pa.table(columns), path, row_group_size=5)
    return path


def write_list(path: pathlib.Path, folder: pathlib.Path, clips, captions=None) -> pathlib.Path:
    """A .csv, a .jsonl or a .txt beside the folders of the clips."""
    if path.parent != folder:
        shutil.copytree(folder, path.parent, dirs_exist_ok=True)
    lines = []
    for name in clips:
        row = {"path": name}
        if captions:
            row |= {"caption": captions[name], "number": len(captions[name])}
        lines.append(row)
    if path.suffix == ".jsonl":
        text = "\n".join(map(json.dumps, lines))
    elif path.suffix == ".csv":
        values = [",".join(f'"{value}"' for value in row.values()) for row in lines]
        text = "\n".join([",".join(lines[0]), *values])
    else:
        text = "\n".join(clips)
    path.write_text(text + "\n")
    return path


def content(found):
    """{id: bytes} of the clips that `find_clips` gives."""
    result = {}
    for name, place in found.items():
        with open_file(place) as file:
            result[name] = file.read()
    return result

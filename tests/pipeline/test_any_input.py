"""A data set is the same data set as a folder, tar shards, Parquet or a list: the same rows, the same resume."""

import json
import os
import tarfile

import pyarrow.parquet as pq
import pytest
from data_sets import add_member, make_clips, write_list, write_parquet, write_tar
from small_models import load_tokenizer

from elastic.evaluation.evaluate import EvaluationConfig, evaluate
from elastic.pipeline.dataset import list_inputs, tokenize_dataset
from elastic.pipeline.file_stamp import is_unchanged, stamp_of
from elastic.pipeline.tokenize_files import find_inputs
from elastic.tokenizer import EncodeOptions
from elastic.tokens import TokenShards

OPTIONS = EncodeOptions(num_tokens=8, rate=None)


@pytest.fixture(scope="module")
def tokenizer(golden):
    return load_tokenizer(golden, "fsq", model_id="m")


@pytest.fixture(scope="module")
def clips(tmp_path_factory):
    """Nine pictures and three videos."""
    folder = tmp_path_factory.mktemp("clips")
    return folder, make_clips(folder)


@pytest.fixture(scope="module")
def inputs(clips, tmp_path_factory):
    """{kind: input path}, and the captions that three of them have."""
    folder, data = clips
    place = tmp_path_factory.mktemp("inputs")
    captions = {name: f"a caption of {name}, ü" for name in data}
    kinds = {
        "folder": folder,
        "tar": write_tar(place / "c.tar", data, captions),
        "parquet": write_parquet(place / "c.parquet", data, captions),
        "list": write_list(folder / "c.jsonl", folder, data, captions),
    }
    return kinds, captions


def run(tokenizer, path, folder, **options):
    found = list_inputs(path, folder)
    given = dict(files_per_shard=5, progress=False, batch=4) | options
    return tokenize_dataset(tokenizer, found, folder, OPTIONS, **given)


@pytest.fixture(scope="module")
def shards(tokenizer, inputs, tmp_path_factory):
    """{kind: folder of the shards}"""
    found = {}
    for kind, path in inputs[0].items():
        found[kind] = tmp_path_factory.mktemp(f"shards-{kind}")
        assert run(tokenizer, path, found[kind]).summary["totals"]["clips"] == 12
    return found


@pytest.mark.parametrize("kind", ["tar", "parquet", "list"])
def test_every_kind_of_input_gives_the_rows_of_the_folder_and_keeps_what_is_said(
    shards, inputs, kind
):
    for name in ("shard-00000", "shard-00001", "shard-00002"):
        plain, own = (pq.read_table(shards[k] / f"{name}.parquet") for k in ("folder", kind))
        assert plain.equals(own.drop_columns(["caption", "metadata"]))
        assert own["caption"].to_pylist() == [inputs[1][i] for i in own["id"].to_pylist()]
    read = TokenShards(shards[kind])
    assert list(read) == list(TokenShards(shards["folder"])) and read.ids == tuple(inputs[1])
    caption = inputs[1][read.ids[7]]
    assert read.metadata(7) == {"caption": caption, "number": len(caption)}
    assert TokenShards(shards["folder"]).metadata(7) == {}


@pytest.mark.parametrize("kind", ["tar", "parquet"])
def test_a_copied_shard_costs_nothing_and_one_changed_clip_in_it_costs_that_clip(
    shards, clips, inputs, tokenizer, tmp_path, kind, caplog
):
    folder, data = shards[kind], clips[1]
    path = inputs[0][kind]
    before = path.read_bytes(), os.stat(path).st_mtime_ns
    os.utime(path, ns=(1, 1))
    run(tokenizer, path, folder)
    assert "Tokenized anew" not in caplog.text
    name = "a/2.png"
    changed = dict(data) | {name: data["a/0.png"]}
    write = {"tar": write_tar, "parquet": write_parquet}[kind]
    try:
        write(path, changed, inputs[1])
        run(tokenizer, path, folder)
        assert f"because 1 of 12 files have changed since: {name}." in caplog.text
        rows = TokenShards(folder)
        assert rows[rows.find(name)] == rows[rows.find("a/0.png")]
        caplog.clear()
        write(path, changed, inputs[1] | {"b/1.png": "another"})  # what is said of a clip is new
        run(tokenizer, path, folder)
        assert "because 1 of 12 files have changed since: b/1.png." in caplog.text
        assert rows.ids == TokenShards(folder).ids
        assert TokenShards(folder).metadata(rows.find("b/1.png"))["caption"] == "another"
    finally:
        path.write_bytes(before[0])
        os.utime(path, ns=(before[1], before[1]))


def test_damaged_members_are_listed_and_the_others_tokenized(clips, tokenizer, tmp_path):
    _, data = clips
    path = tmp_path / "bad.tar"
    with tarfile.open(path, "w") as tar:
        for name in ("a/0.png", "a/v0.mp4"):
            add_member(tar, name, data[name])
        add_member(tar, "link.mp4", b"", type=tarfile.LNKTYPE, linkname="a/v0.mp4")
        add_member(tar, "half.mp4", data["a/v0.mp4"][:300])
        add_member(tar, "cut.png", data["a/0.png"])
    path.write_bytes(path.read_bytes()[: path.read_bytes().index(b"cut.png") + 520])
    outcome = run(tokenizer, path, tmp_path / "out")
    assert outcome.summary["totals"]["clips"] == 2
    bad = [json.loads(line) for line in (tmp_path / "out" / "bad.jsonl").read_text().splitlines()]
    assert [line["id"] for line in bad] == ["cut.png", "half.mp4", "link.mp4"]
    reasons = [line["reason"] for line in bad]
    assert "is cut off: 8 of its" in reasons[0] and "it is a link to 'a/v0.mp4'" in reasons[2]
    assert all("bad.tar/" in reason and "\n" not in reason for reason in reasons)


def test_folders_of_results_stay_in_the_output_folder_whatever_a_list_names(clips, tmp_path):
    folder, data = clips
    names = list(data)
    (tmp_path / "in").mkdir()
    listed = [f"../{os.path.relpath(folder, tmp_path)}/{name}" for name in names[:2]]
    listed.append(str(folder / names[2]))
    (tmp_path / "in" / "l.txt").write_text("\n".join(listed))
    found = find_inputs(tmp_path / "in" / "l.txt")
    assert len(found) == 3 and all(place.exists() for place in found)
    assert not any(name.startswith("/") or ".." in name for name in found.values())
    tar = write_tar(tmp_path / "c.tar", data)
    assert list(find_inputs(tar).values()) == [name.rpartition(".")[0] for name in names]
    assert set(find_inputs(folder).values()) == set(find_inputs(tar).values())


def test_evaluation_measures_a_tar_as_it_measures_the_folder(clips, tokenizer, tmp_path):
    folder, data = clips
    few = {name: data[name] for name in ("a/v0.mp4", "a/0.png")}
    tar = write_tar(tmp_path / "few.tar", few)
    config = EvaluationConfig(thresholds=(), num_tokens=(8,), metrics=("psnr",))
    results = [
        evaluate(tokenizer, files, config, progress=False)
        for files in ({name: folder / name for name in few}, list_inputs(tar, tmp_path))
    ]
    assert results[0].clips == results[1].clips
    assert [r.mse for r in results[0].results] == [r.mse for r in results[1].results]


def test_a_stamp_of_a_member_tells_its_place_and_its_content(clips, tmp_path):
    _, data = clips
    tar = write_tar(tmp_path / "c.tar", data)
    found = list_inputs(tar, tmp_path)
    stamps = {name: stamp_of(place) for name, place in found.items()}
    assert len(set(stamps.values())) == 12
    write_tar(tar, {"0.png": data["a/0.png"]} | data)  # every member lies elsewhere now
    for name, place in list_inputs(tar, tmp_path).items():
        if name in stamps:
            assert not is_unchanged(place, stamps[name], stamp_of(place), None)
    os.remove(tar)
    assert stamp_of(found["a/0.png"]).size == -1

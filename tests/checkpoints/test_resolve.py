"""Where a checkpoint comes from: how it is named, and the hub with its cache."""

import pickle
import warnings

import flax.serialization
import huggingface_hub
import pytest
from checkpoint_cases import FSQ, assert_same, file_tree

from elastic.checkpoints import load_config, load_params, save_params, save_pretrained
from elastic.checkpoints.params import CheckpointError, folder_of
from elastic.config import load_config as read_config
from elastic.io.tree import flatten

# What a checkpoint may be called


def test_every_spelling_of_a_source_gives_the_same_parameters(golden, tmp_path, monkeypatch):
    file = golden / "fsq/ckpt/params_scan_fp32"
    blob = tmp_path / "blob"
    blob.write_bytes(flax.serialization.to_bytes(file_tree()))
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder/params").write_bytes(file.read_bytes())
    save_params(tmp_path / "variables", {"params": file_tree()})
    for spec in (file, f"params::{file}", f"flax_params::{blob}", blob, tmp_path / "folder"):
        assert_same(load_params(spec, FSQ), file_tree())
    assert_same(load_params(tmp_path / "variables", FSQ), file_tree())
    with pytest.warns(UserWarning, match="more than one prefix; it is read as params::"):
        assert_same(load_params(f"params::params::{file}", FSQ), file_tree())
    state = golden / "fsq/ckpt/trainstate_scan_fp32/streaming_train_state"
    with pytest.warns(UserWarning, match="it is read as trainstate_params::"):
        load_params(f"params::trainstate_params::{state}", FSQ)
    assert load_config(file) is None


def test_a_second_prefix_is_warned_of_once_however_often_the_name_is_resolved(golden):
    spec = f"params::params::{golden}/fsq/ckpt/params_scan_fp32"
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("default")
        load_config(spec)
        folder_of(spec)
        load_params(spec, FSQ)
    assert len(caught) == 1


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("parms::FILE", r"unknown prefix 'parms'.*Did you mean 'params'\?"),
        ("pickle::FILE", "unknown prefix 'pickle'; known are params, "),
        ("params::", "names no file"),
        ("params::FOLDER", "is a folder, not a checkpoint file; it holds params"),
        ("EMPTY_FOLDER", "is a folder, not a checkpoint file; it holds none of"),
        ("params::FOLDER/prams", r"There is no checkpoint .*Did you mean '.*/params'\?"),
        ("params::EMPTY_FOLDER/nested/params", "Its folder does not exist either; .*empty_folder"),
        ("params::STATE", "holds a train state, not a parameter tree; load it as trainstate_par"),
        ("trainstate::FILE", "holds a parameter tree, not a train state; load it as params::"),
        ("TEXT", "is a text file, not a checkpoint"),
        ("params::TEXT", "is a text file, not a checkpoint"),
        ("LFS", "git-lfs pointer"),
        ("HTML", "web page"),
        ("PICKLE", r"a Python pickle .* never opened"),
        ("EMPTY", "is empty"),
        ("hf::no such/repo/name", "neither a file here nor 'org/name'"),
    ],
)
def test_what_is_no_checkpoint_is_refused_with_a_way_out(golden, tmp_path, spec, message):
    places = {name: tmp_path / name.lower() for name in ("TEXT", "LFS", "HTML", "PICKLE", "EMPTY")}
    for name, content in {
        "TEXT": b"hello, I am no checkpoint\n",
        "LFS": b"version https://git-lfs.github.com/spec/v1\noid sha256:00\n",
        "HTML": b"<!DOCTYPE html><html><body>404</body></html>",
        "PICKLE": pickle.dumps({"a": 1}),
        "EMPTY": b"",
    }.items():
        places[name].write_bytes(content)
    for name in ("FOLDER", "EMPTY_FOLDER"):
        (tmp_path / name.lower()).mkdir()
        spec = spec.replace(name, str(tmp_path / name.lower())) if name in spec.split("::")[-1].split("/") else spec  # fmt: skip
    (tmp_path / "folder/params").write_bytes(b"")
    places["FILE"] = golden / "fsq/ckpt/params_scan_fp32"
    places["STATE"] = golden / "fsq/ckpt/trainstate_scan_bf16/streaming_train_state"
    prefix, separator, rest = spec.rpartition("::")
    spec = f"{prefix}{separator}{places.get(rest, rest)}"
    with pytest.raises(CheckpointError, match=message):
        load_params(spec, FSQ)


# The hub


def fake_cache(monkeypatch, tmp_path, files: dict[str, bytes]) -> None:
    """A Hugging Face cache in `tmp_path` that holds LargeWorldModel/ElasticTok-FSQ."""
    repo, commit = tmp_path / "models--LargeWorldModel--ElasticTok-FSQ", "0" * 40
    (repo / "refs").mkdir(parents=True)
    (repo / "refs/main").write_text(commit)
    (repo / "snapshots" / commit).mkdir(parents=True)
    for name, content in files.items():
        (repo / "snapshots" / commit / name).write_bytes(content)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))


def test_a_cached_repository_loads_without_the_network(golden, tmp_path, monkeypatch):
    content = (golden / "fsq/ckpt/params_scan_bf16").read_bytes()
    fake_cache(monkeypatch, tmp_path, {"params": content})
    for spec in ("hf::LargeWorldModel/ElasticTok-FSQ", "LargeWorldModel/ElasticTok-FSQ"):
        expected = load_params(golden / "fsq/ckpt/params_scan_bf16", FSQ)
        assert_same(load_params(spec, FSQ), expected)
        assert load_config(spec, local_files_only=True) == read_config("ElasticTok-FSQ")


def test_a_cached_repository_with_safetensors_brings_its_config(tmp_path, monkeypatch):
    save_pretrained(tmp_path / "saved", FSQ, file_tree())
    files = {entry.name: entry.read_bytes() for entry in (tmp_path / "saved").iterdir()}
    fake_cache(monkeypatch, tmp_path / "cache", files)
    assert load_config("LargeWorldModel/ElasticTok-FSQ") == FSQ
    found = flatten(load_params("LargeWorldModel/ElasticTok-FSQ", FSQ))
    assert found.keys() == flatten(file_tree()).keys()


def test_a_download_brings_what_belongs_to_the_weights(tmp_path, monkeypatch):
    """Its config and its curves lie beside it then; a repository without curves is none the worse."""
    save_pretrained(tmp_path / "hub", FSQ, file_tree())
    errors, asked = huggingface_hub.errors, []

    def download(repo, name, *, revision, local_files_only):
        if local_files_only:
            raise errors.LocalEntryNotFoundError("not cached")
        if not (tmp_path / "hub" / name).is_file():
            raise errors.EntryNotFoundError(name)
        asked.append(name)
        return str(tmp_path / "hub" / name)

    monkeypatch.setattr(huggingface_hub, "get_hf_file_metadata", lambda url: None)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    assert folder_of("hf::org/model") == tmp_path / "hub"
    assert asked == ["model.safetensors", "config.json"]
    (tmp_path / "hub" / "curves.json").write_text("{}")
    folder_of("hf::org/model")
    assert asked[2:] == ["model.safetensors", "config.json", "curves.json"]


@pytest.mark.parametrize("local_files_only", [True, False])
def test_an_uncached_repository_without_a_network_says_the_way_out_at_once(
    tmp_path, monkeypatch, capfd, local_files_only
):
    fake_cache(monkeypatch, tmp_path, {})
    asked, remote = [], []

    def nobody_listens(url, **options):
        asked.append(url)
        port = "http://127.0.0.1:9"  # refuses at once, as does a machine without a network
        return ask(url.replace(huggingface_hub.constants.ENDPOINT, port), **options)

    def download(repo, name, *, local_files_only, **options):
        remote.extend([name] * (not local_files_only))  # which would try again and again
        return fetch(repo, name, local_files_only=True, **options)

    ask, fetch = huggingface_hub.get_hf_file_metadata, huggingface_hub.hf_hub_download
    monkeypatch.setattr(huggingface_hub, "get_hf_file_metadata", nobody_listens)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    with pytest.raises(CheckpointError) as error:
        load_params("LargeWorldModel/ElasticTok-VAE", FSQ, local_files_only=local_files_only)
    assert not remote and capfd.readouterr() == ("", "")
    assert "'LargeWorldModel/ElasticTok-VAE' is neither a file here nor in the Hugging Face cache" in str(error.value)  # fmt: skip
    why = "only local files" if local_files_only else "the hub is out of reach (["
    assert f", and {why}" in str(error.value)
    assert "`hf download LargeWorldModel/ElasticTok-VAE params --local-dir DIR`" in str(error.value)
    assert "params::DIR/params" in str(error.value)
    assert len(asked) == (not local_files_only)


def test_a_hub_that_goes_away_between_two_questions_says_the_same(tmp_path, monkeypatch):
    fake_cache(monkeypatch, tmp_path, {})

    def unreachable(repo, name, **options):
        raise huggingface_hub.errors.LocalEntryNotFoundError("no network")

    monkeypatch.setattr(huggingface_hub, "get_hf_file_metadata", lambda url: None)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", unreachable)
    with pytest.raises(CheckpointError, match="cache, and the hub is out of reach; where there"):
        load_params("LargeWorldModel/ElasticTok-VAE", FSQ)

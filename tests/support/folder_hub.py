"""A hub in a folder: what is uploaded lies there, and can be downloaded."""

import pathlib
import shutil

import huggingface_hub
import pytest


def use_folder_as_hub(monkeypatch: pytest.MonkeyPatch, folder: pathlib.Path) -> pathlib.Path:
    """Puts `folder` in the place of the Hugging Face Hub; gives it back."""

    class Api:
        def __init__(self, token=None):
            pass

        def create_repo(self, repo_id, *, private, exist_ok, repo_type="model"):
            (folder / repo_id).mkdir(parents=True, exist_ok=exist_ok)
            (folder / f"{repo_id}.kind").write_text(
                f"{'private' if private else 'public'} {repo_type}"
            )

        def file_exists(self, repo_id, name, *, revision, repo_type="model"):
            return (folder / repo_id / name).is_file()

        def upload_file(self, *, path_or_fileobj, path_in_repo, repo_id, commit_message, **_):
            (folder / repo_id / path_in_repo).write_bytes(path_or_fileobj)
            return f"commit: {commit_message}"

        def upload_folder(
            self,
            *,
            repo_id,
            folder_path,
            commit_message,
            allow_patterns=None,
            ignore_patterns=None,
            **_,
        ):
            source = pathlib.Path(folder_path)
            names = [
                path.relative_to(source).as_posix() for path in source.rglob("*") if path.is_file()
            ]
            kept = huggingface_hub.utils.filter_repo_objects(
                names, allow_patterns=allow_patterns, ignore_patterns=ignore_patterns
            )
            for name in kept:
                (folder / repo_id / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(source / name, folder / repo_id / name)
            return f"commit: {commit_message}"

    def download(repo, name, *, revision, local_files_only):
        if not (folder / repo / name).is_file():
            raise huggingface_hub.errors.LocalEntryNotFoundError(name)
        return str(folder / repo / name)

    monkeypatch.setattr(huggingface_hub, "HfApi", Api)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    return folder

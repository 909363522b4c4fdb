"""From the name of a checkpoint to its file on this machine, and to the tensors in the file."""

import contextlib
import difflib
import os
import re
import warnings
from pathlib import Path
from typing import cast

from elastic.checkpoints.named_models import NAMES, RELEASED, shipped_folder
from elastic.io.msgpack_stream import index_blob, index_stream
from elastic.io.safetensors_file import index_safetensors, looks_like_safetensors
from elastic.io.tensors import Tensor
from elastic.io.tree import CheckpointError

PARAMS, TRAIN_STATE = "a parameter tree", "a train state"  # kinds of checkpoints
PREFIXES = {
    "params": PARAMS,
    "flax_params": PARAMS,
    "trainstate_params": TRAIN_STATE,
    "trainstate": TRAIN_STATE,
    "hf": None,
}
FILES = ("model.safetensors", "params", "streaming_params", "streaming_train_state")
HUB_FILES = ("params", "model.safetensors")
_COMPANIONS = ("config.json", "curves.json")  # are downloaded with the weights, if they exist


def _split_prefix(spec: str) -> tuple[str | None, str]:
    """'params::/file' -> ('params', '/file'). Of several prefixes the last counts (a warning)."""
    *prefixes, rest = spec.split("::")
    for prefix in prefixes:
        if prefix not in PREFIXES:
            close = difflib.get_close_matches(prefix, PREFIXES, n=1)
            hint = f" Did you mean {close[0]!r}?" if close else ""
            raise CheckpointError(
                f"Checkpoint {spec!r}: unknown prefix {prefix!r}; known are "
                f"{', '.join(PREFIXES)}.{hint}"
            )
    if not rest:
        raise CheckpointError(
            f"Checkpoint {spec!r} names no file; write params::FILE, a folder or a repository."
        )
    if len(prefixes) > 1:
        # Python shows a warning once per line of code that it is attributed to. A run resolves its checkpoint
        # several times, so the warning is attributed to this line and not to the callers.
        warnings.warn(
            f"Checkpoint {spec!r} has more than one prefix; it is read as {prefixes[-1]}::{rest}.",
            stacklevel=1,
        )
    return (prefixes[-1] if prefixes else None), rest


def _is_repo(text: str) -> bool:
    """Whether `text` can be 'org/name' rather than a path: neither it nor its folder lies here."""
    shaped = re.fullmatch(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", text, re.ASCII)
    return shaped is not None and not Path(text).exists() and not Path(text).parent.is_dir()


def resolve(
    spec: str | os.PathLike,
    *,
    revision: str | None = None,
    local_files_only: bool = False,
    names: tuple[str, ...] = FILES,
    local: bool = False,
) -> tuple[Path, str | None]:
    """The file that `spec` names, and the kind of checkpoint that its prefix implies.

    Args:
      spec: prefix and file, repository, folder, file, or the name of a model (`elastic.checkpoints.named_models`). What lies
        here under a model's name goes before the model.
      revision: branch, tag or commit of a repository.
      local_files_only: look in the Hugging Face cache only.
      names: files to look for in a folder, in this order.
      local: a spec without a prefix is never a repository.

    Returns:
      The path, and `PARAMS`, `TRAIN_STATE` or None.

    Raises:
      CheckpointError: there is no such file.
    """
    kind, rest = _split_prefix(os.fspath(spec))
    if kind is None and not local:
        rest = _of_model(rest)
    if kind == "hf" or (kind is None and not local and _is_repo(rest)):
        return _from_hub(rest, revision=revision, local_files_only=local_files_only), None
    path = Path(rest).expanduser()
    if path.is_dir():
        inside = [name for name in names if (path / name).is_file()]
        if kind is None and inside:
            return path / inside[0], None
        way = f"it holds {', '.join(inside)}" if inside else f"it holds none of {', '.join(names)}"
        raise CheckpointError(f"{path} is a folder, not a checkpoint file; {way}.")
    if not path.exists():
        raise CheckpointError(f"There is no checkpoint {str(path)!r}.{nearby(path)}")
    if not path.is_file() or not os.access(path, os.R_OK):
        raise CheckpointError(f"{path} is not a file that can be read.")
    return path, PREFIXES[kind] if kind else None


def repository(spec: str | os.PathLike) -> str | None:
    """The Hugging Face repository that `spec` names; None where it names something else."""
    kind, rest = _split_prefix(os.fspath(spec))
    if kind is None:
        rest = _of_model(rest)
    return rest if kind == "hf" or (kind is None and _is_repo(rest)) else None


def _of_model(name: str) -> str:
    """The repository or the folder of a model that has this name; the name itself where there is none, or where a file has it."""
    if Path(name).exists():
        return name
    return RELEASED.get(name) or str(shipped_folder(name) or name)


def nearby(path: Path) -> str:
    """What a path that is not there may have been meant to be, as a sentence; '' if nothing is near."""
    folder = path.parent
    if folder == Path() and (close := difflib.get_close_matches(path.name, NAMES, n=1)):
        return f" Did you mean the model {close[0]!r}?"
    if not folder.is_dir():
        above = next(parent for parent in folder.absolute().parents if parent.is_dir())
        return f" Its folder does not exist either; {above} does."
    close = difflib.get_close_matches(path.name, [entry.name for entry in folder.iterdir()], n=1)
    if close:
        return f" Did you mean {str(folder / close[0])!r}?"
    inside = [name for name in FILES if (folder / name).is_file()]
    return f" Its folder holds {', '.join(inside)}." if inside else ""


def _from_hub(repo: str, *, revision: str | None, local_files_only: bool) -> Path:
    """The weights of a repository, from the cache if they are there, else downloaded into it.

    Cached weights are used without asking the hub: released weights do not change. Before a download it is asked once
    whether it answers: the client by itself tries six times, which takes half a minute and a dozen lines.
    """
    from huggingface_hub import errors, hf_hub_download

    def fetch(name: str, *, local: bool) -> Path:
        return Path(hf_hub_download(repo, name, revision=revision, local_files_only=local))

    why = "only local files were asked for" if local_files_only else ""
    try:
        for name in HUB_FILES:
            with contextlib.suppress(errors.LocalEntryNotFoundError):
                return fetch(name, local=True)
        why = why or _out_of_reach(repo, revision)
        for name in HUB_FILES if not why else ():
            try:
                weights = fetch(name, local=False)
            except errors.LocalEntryNotFoundError:
                why = "the hub is out of reach"
                break
            except errors.EntryNotFoundError:
                continue
            for companion in _COMPANIONS:
                with contextlib.suppress(errors.EntryNotFoundError):
                    fetch(companion, local=False)
            return weights
        if not why:
            raise CheckpointError(f"Repository {repo!r} has none of {', '.join(HUB_FILES)}.")
    except errors.HFValidationError as error:
        raise CheckpointError(f"{repo!r} is neither a file here nor 'org/name'.") from error
    except (errors.RepositoryNotFoundError, errors.RevisionNotFoundError) as error:
        at = f" at {revision!r}" if revision else ""
        raise CheckpointError(
            f"{repo!r}{at} is neither a file here nor a Hugging Face repository open to you."
        ) from error
    except (OSError, _client_error()) as error:
        raise CheckpointError(
            f"Downloading the weights of {repo!r} failed: {_reason(error)}"
        ) from error
    raise CheckpointError(
        f"{repo!r} is neither a file here nor in the Hugging Face cache, and {why}; where there is a network, run "
        f"`hf download {repo} {HUB_FILES[0]} --local-dir DIR`, copy DIR here and pass "
        f"params::DIR/{HUB_FILES[0]}."
    )


def _out_of_reach(repo: str, revision: str | None) -> str:
    """Why the hub does not answer; '' if it does, whatever the answer is."""
    from huggingface_hub import errors, get_hf_file_metadata, hf_hub_url

    try:
        get_hf_file_metadata(hf_hub_url(repo, HUB_FILES[0], revision=revision))
    except errors.HfHubHTTPError:  # no such repository or file: the download says so, too
        return ""
    except (OSError, _client_error()) as error:
        return f"the hub is out of reach ({_reason(error)})"
    return ""


def _client_error() -> type[Exception]:
    """The base of all errors of the HTTP library that this version of the hub's client uses."""
    from huggingface_hub import errors

    return cast(type[Exception], errors.HfHubHTTPError.__bases__[0])


def _reason(error: Exception) -> str:
    return str(error).strip().partition("\n")[0] or type(error).__name__


def index_tensors(path: Path) -> list[Tensor]:
    """The tensors of a file in any format; the first bytes determine which."""
    with open(path, "rb") as file:
        head = file.read(64)
    if not head:
        raise CheckpointError(f"{path} is empty; it was not written or not copied to its end.")
    if looks_like_safetensors(head):
        tensors = index_safetensors(path)
    elif head[0] == 0x92:
        tensors = index_stream(path)
    elif 0x80 < head[0] < 0x90 or head[0] in (0xDE, 0xDF):
        tensors = index_blob(path)
    else:
        raise CheckpointError(
            f"{path} is {_foreign(head)}, not a checkpoint in a format that is read here."
        )
    if not tensors:
        raise CheckpointError(f"{path} holds no tensors.")
    return tensors


def _foreign(head: bytes) -> str:
    if head.startswith(b"version https://git-lfs"):
        return "a git-lfs pointer (fetch the file it stands for: git lfs pull)"
    if head[0] == 0x80:
        return "a Python pickle (those can run code and are never opened)"
    if head.startswith(b"PK"):
        return "a zip archive (a PyTorch or NumPy file?)"
    if head.lstrip().lower().startswith((b"<!doctype", b"<html")):
        return "a web page (a failed download?)"
    if all(byte in b"\t\r\n" or 32 <= byte < 127 for byte in head):
        return "a text file"
    return f"a file of unknown format (it starts with bytes {head[:8].hex(' ')})"

"""From what the user calls a checkpoint to the tensors in a file on this machine."""

import difflib
import os
import re
import warnings
from pathlib import Path

from elastic.safetensor_file import index_safetensors, looks_like_safetensors
from elastic.streaming import index_blob, index_stream
from elastic.tensor_file import CheckpointError, Tensor

PARAMS, TRAIN_STATE = "a parameter tree", "a train state"
PREFIXES = {
    "params": PARAMS,
    "flax_params": PARAMS,
    "trainstate_params": TRAIN_STATE,
    "trainstate": TRAIN_STATE,
    "hf": None,
}
FILES = ("model.safetensors", "params", "streaming_params", "streaming_train_state")
HUB_FILES = ("params", "model.safetensors")


def split_prefix(spec: str) -> tuple[str | None, str]:
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
        warnings.warn(
            f"Checkpoint {spec!r} has more than one prefix; it is read as {prefixes[-1]}::{rest}.",
            stacklevel=3,
        )
    return (prefixes[-1] if prefixes else None), rest


def is_repo(text: str) -> bool:
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
    """The file that `spec` names (in a folder, one of `names`) and what its prefix says it holds.

    `local` keeps a spec without a prefix from being taken for a repository.
    """
    kind, rest = split_prefix(os.fspath(spec))
    if kind == "hf" or (kind is None and not local and is_repo(rest)):
        path = from_hub(rest, HUB_FILES, revision=revision, local_files_only=local_files_only)
        if path is None:
            raise CheckpointError(
                f"Repository {rest!r} holds neither of {' and '.join(HUB_FILES)}."
            )
        return path, None
    path = Path(rest).expanduser()
    if path.is_dir():
        inside = [name for name in names if (path / name).is_file()]
        if kind is None and inside:
            return path / inside[0], None
        way = f"it holds {', '.join(inside)}" if inside else f"it holds none of {', '.join(names)}"
        raise CheckpointError(f"{path} is a folder, not a checkpoint file; {way}.")
    if not path.exists():
        raise CheckpointError(f"There is no checkpoint {str(path)!r}.{_nearby(path)}")
    if not path.is_file() or not os.access(path, os.R_OK):
        raise CheckpointError(f"{path} is not a file that can be read.")
    return path, PREFIXES[kind] if kind else None


def _nearby(path: Path) -> str:
    folder = path.parent
    if not folder.is_dir():
        above = next(parent for parent in folder.absolute().parents if parent.is_dir())
        return f" Its folder does not exist either; {above} does."
    close = difflib.get_close_matches(path.name, [entry.name for entry in folder.iterdir()], n=1)
    if close:
        return f" Did you mean {str(folder / close[0])!r}?"
    inside = [name for name in FILES if (folder / name).is_file()]
    return f" Its folder holds {', '.join(inside)}." if inside else ""


def from_hub(
    repo: str, names: tuple[str, ...], *, revision: str | None, local_files_only: bool
) -> Path | None:
    """The first of `names` that a repository has, from the cache or downloaded to it, or None."""
    import httpx
    from huggingface_hub import errors, hf_hub_download

    out_of_reach = False
    for name in names:
        try:
            # Once the hub was out of reach, the cache is all there is: do not wait for it again.
            offline = local_files_only or out_of_reach
            return Path(hf_hub_download(repo, name, revision=revision, local_files_only=offline))
        except errors.LocalEntryNotFoundError:
            out_of_reach = True
        except (
            errors.RepositoryNotFoundError,
            errors.RevisionNotFoundError,
            errors.HFValidationError,
        ) as error:
            reason = str(error).strip().splitlines()[0]
            at = f" at {revision!r}" if revision else ""
            raise CheckpointError(
                f"{repo!r}{at} is neither a file here nor a Hugging Face repository open to you "
                f"({reason})."
            ) from error
        except errors.EntryNotFoundError:
            continue
        except (OSError, httpx.HTTPError) as error:
            raise CheckpointError(f"Downloading {name} of {repo!r} failed: {error}.") from error
    if out_of_reach and "config.json" not in names:
        why = "only local files were asked for" if local_files_only else "the hub is out of reach"
        raise CheckpointError(
            f"{repo!r} is not in the Hugging Face cache, and {why}; "
            f"where there is a network, run `hf download {repo} {names[0]} --local-dir DIR`, "
            f"copy DIR here and pass params::DIR/{names[0]}."
        )
    return None


def index_tensors(path: Path) -> list[Tensor]:
    """The tensors of a file in any of the formats; which one, its first bytes tell."""
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

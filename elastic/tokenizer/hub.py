"""A tokenizer as a folder and as a Hugging Face repository, with a card that is made from the model."""

import os
import pathlib
import tempfile
from typing import Any, NamedTuple

import jax
import numpy as np

from elastic import checkpoints
from elastic.config import ElasticTokConfig
from elastic.io import json_file
from elastic.io.atomic import atomic_write
from elastic.io.names import check_repository
from elastic.search import CurvePrior, curve_prior

CARD = "README.md"


class Model(NamedTuple):
    """What is saved of a tokenizer; the attributes are those of `ElasticTokenizer`."""

    config: ElasticTokConfig
    params: dict[str, Any]
    prior: CurvePrior | None
    model_id: str


def save_pretrained(model: Model, folder: str | os.PathLike, *, float_dtype: Any = None) -> None:
    """Writes config.json, model.safetensors, and curves.json if the tokenizer has a prior, into a folder.

    Args:
      model: what is saved.
      folder: is made if it is missing; its other files are not touched, but for the curves of earlier weights, which go.
      float_dtype: type of the floats: 'fp32', 'bf16', 'fp16' or 'fp8'; None keeps theirs.
    """
    folder = pathlib.Path(folder)
    checkpoints.save_pretrained(
        folder, model.config, jax.device_get(model.params), float_dtype=float_dtype
    )
    curves = folder / curve_prior.FILE_NAME
    if model.prior is not None:
        atomic_write(curves, model.prior.to_json().encode())
    else:
        curves.unlink(missing_ok=True)


def push_to_hub(
    model: Model,
    repo_id: str,
    *,
    private: bool = False,
    token: str | None = None,
    revision: str | None = None,
    commit_message: str | None = None,
    float_dtype: Any = None,
    run: str | os.PathLike | None = None,
    card: str | None = None,
) -> str:
    """Uploads what `save_pretrained` writes, and a card; gives the address of the commit.

    The arguments after `model` are those of `ElasticTokenizer.push_to_hub`, which documents them.
    """
    from huggingface_hub import HfApi

    check_repository(repo_id)
    text = model_card(model, repo_id, run=run) if card is None else card
    api = HfApi(token=token)
    with tempfile.TemporaryDirectory() as folder:
        save_pretrained(model, folder, float_dtype=float_dtype)
        api.create_repo(repo_id, private=private, exist_ok=True)
        if card is not None or not api.file_exists(repo_id, CARD, revision=revision):
            (pathlib.Path(folder) / CARD).write_text(text, encoding="utf-8")
        commit = api.upload_folder(
            repo_id=repo_id,
            folder_path=folder,
            revision=revision,
            commit_message=commit_message or f"Upload {model.model_id}",
        )
    return str(commit)


def model_card(model: Model, repo_id: str, *, run: str | os.PathLike | None = None) -> str:
    """The card of a model in Markdown: what it is, the lines that use it, and what a run measured of it.

    Raises:
      ValueError: the folder `run` is no run's.
    """
    config = model.config
    size = sum(np.size(leaf) for leaf in jax.tree.leaves(model.params))
    fsq = config.bottleneck_type == "fsq"
    levels = ", ".join(map(str, config.fsq_quant_levels))
    kind = (
        f"discrete (FSQ): {config.codebook_size:,} codes, levels {levels}"
        if fsq
        else f"continuous (VAE): {config.vae_bottleneck_dim} channels"
    )
    rows = {
        "Bottleneck": kind,
        "Parameters": f"{size / 1e6:.1f} M, {config.layers} layers of width {config.hidden_size}",
        "Frames": f"{config.resolution} x {config.resolution} pixels, in blocks of {config.frames_per_block}",
        "Patch": " x ".join(map(str, config.patch_size)) + " (frames, rows, columns)",
        "Tokens of a block": f"{config.min_toks:,} to {config.max_toks:,}"
        if config.keep_fraction is None
        else f"{config.mask_type}, of {config.max_toks:,}",
        "Context": f"{config.max_sequence_length // config.max_toks} blocks",
        "First guess of the search": "curves.json"
        if model.prior is not None
        else "none: `elastictok fit-curves` makes one",
    }
    table = "\n".join(f"| {name} | {value} |" for name, value in rows.items())
    return f"""---
library_name: elastictok
pipeline_tag: feature-extraction
tags:
- video
- image
- tokenizer
- {config.bottleneck_type}
---

# {repo_id.split("/")[-1]}

An [ElasticTok](https://arxiv.org/abs/2410.08368) tokenizer: it turns images and video into as few tokens as their content needs.

| | |
|---|---|
{table}

```python
from elastic import ElasticTokenizer

tokenizer = ElasticTokenizer.from_pretrained("{repo_id}")
tokens = tokenizer.encode("clip.mp4", psnr=25)
frames = tokenizer.decode(tokens)  # uint8 [frames, height, width, 3]
```
{measured(run) if run is not None else ""}"""


def measured(run: str | os.PathLike) -> str:
    """The part of a card with the last numbers that a training run recorded, in Markdown.

    Raises:
      ValueError: the folder has no records.
    """
    file = pathlib.Path(run) / "metrics.jsonl"
    if not file.is_file():
        raise ValueError(
            f"run={os.fspath(run)!r} has no metrics.jsonl; give the folder that training wrote into (--logger.output_dir)."
        )
    rows = "\n".join(
        f"| {name} | {value:.6g} |" for name, value in json_file.last_numbers(file).items()
    )
    return f"""
## Training

The last record of each number of the run (`metrics.jsonl`):

| Number | Value |
|---|---|
{rows}
"""

"""A data set of tokens as a repository of the Hugging Face Hub: the shards, what is beside them, and a card made from the summary."""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from elastic.io.names import check_repository
from elastic.pipeline.dataset_plan import PLAN
from elastic.pipeline.dataset_summary import BAD, PLOT, SUMMARY
from elastic.tokens import TokenShards

CARD = "README.md"
_SIZES = (  # as the Hub names them
    (1e3, "n<1K"),
    (1e4, "1K<n<10K"),
    (1e5, "10K<n<100K"),
    (1e6, "100K<n<1M"),
    (1e7, "1M<n<10M"),
    (math.inf, "n>10M"),
)
# The plan stays here: it names the files of this machine, and a run goes on where its files are.
_UPLOADED = ("*.parquet", "shard-*.json", SUMMARY, PLOT, BAD)


def push_dataset(
    folder: Path,
    repo_id: str,
    *,
    private: bool = False,
    token: str | None = None,
    revision: str | None = None,
) -> str:
    """Uploads a finished data set, for `datasets.load_dataset(repo_id)`; gives the address of the commit.

    What the repository has already is not sent again. A card that somebody has written stays.

    Args:
      folder: the output folder of a finished run.
      repo_id: 'owner/name'; the repository is made if there is none.
      private: whether a new repository is private.
      token: of the account; None: the one of `hf auth login`.
      revision: a branch; None: the main one.

    Raises:
      ValueError: the name is no repository's, or the run is not finished.
    """
    from huggingface_hub import HfApi

    check_repository(repo_id)
    if not (folder / SUMMARY).is_file():
        raise ValueError(
            f"{folder} has no {SUMMARY}: the run is not finished. The same command goes on with it, then push again."
        )
    card = dataset_card(json.loads((folder / SUMMARY).read_bytes()), TokenShards(folder), repo_id)
    api = HfApi(token=token)
    api.create_repo(repo_id, repo_type="dataset", private=private, exist_ok=True)
    commit = api.upload_folder(
        repo_id=repo_id,
        repo_type="dataset",
        folder_path=folder,
        allow_patterns=list(_UPLOADED),
        ignore_patterns=[PLAN, ".*"],
        revision=revision,
        commit_message=f"Upload tokens of {folder.name}",
    )
    if not api.file_exists(repo_id, CARD, repo_type="dataset", revision=revision):
        commit = api.upload_file(
            path_or_fileobj=card.encode(),
            path_in_repo=CARD,
            repo_id=repo_id,
            repo_type="dataset",
            revision=revision,
            commit_message="Card made from the summary",
        )
    return str(commit)


def dataset_card(summary: Mapping[str, Any], shards: TokenShards, repo_id: str) -> str:
    """The card of a data set in Markdown: what it holds, with which model and options it was made, and the lines that read it."""
    totals, model, header = summary["totals"], summary["model"], shards.header
    kind = (
        f"discrete (FSQ): {header['codebook_size']:,} codes"
        if header["bottleneck_type"] == "fsq"
        else f"continuous (VAE): {header['vector_width']} numbers a token"
    )
    mean = f"{totals['mean_tokens']:.1f} of {model['tokens_per_block']}"
    rows = {
        "Clips": f"{totals['clips']:,}, of which {totals['images']:,} images; {totals['frames']:,} frames",
        "Tokens": f"{totals['tokens']:,} in {totals['blocks']:,} blocks, {mean} in the mean",
        "Kind": kind,
        "Model": f"{model['model_id']}, config {model['config_hash']}",
        "Files that could not be read": f"{totals['bad_files']:,}"
        + f", listed in {BAD}" * (totals["bad_files"] > 0),
    }
    if summary["options"].keys() & {"threshold", "psnr"}:
        rows["Blocks that met the threshold"] = f"{totals['share_met']:.1%}"
    table = "\n".join(f"| {name} | {value} |" for name, value in rows.items())
    options = "\n".join(f"| `{name}` | {value} |" for name, value in summary["options"].items())
    category = next(name for limit, name in _SIZES if totals["clips"] < limit)
    return f"""---
tags:
- elastictok
- video
- tokens
- {header["bottleneck_type"]}
size_categories:
- {category}
configs:
- config_name: default
  data_files: "*.parquet"
---

# {repo_id.split("/")[-1]}

Images and video as tokens of an [ElasticTok](https://arxiv.org/abs/2410.08368) model: one row a clip, in blocks of
{header["frames_per_block"]} frames, each with as many tokens as its content needs.

![Tokens of a block, PSNR of a block, tokens per second of video]({PLOT})

| | |
|---|---|
{table}

```python
from datasets import load_dataset

rows = load_dataset("{repo_id}", split="train", streaming=True)
row = next(iter(rows))  # id, num_frames, rate, counts (tokens of each block), tokens, losses, ...
```

With `elastictok`, clips and their decoded frames:

```python
from elastic import ElasticTokenizer, TokenShards
from huggingface_hub import snapshot_download

shards = TokenShards(snapshot_download("{repo_id}", repo_type="dataset"))
frames = ElasticTokenizer.from_pretrained("{model["model_id"]}").decode(shards[0])
```

## Options

| | |
|---|---|
{options}
"""

"""Shards in the hands of other programs: Polars, DuckDB and Hugging Face datasets read the rows that pyarrow reads.

None of them is a requirement. `bash scripts/run_tests.sh --extras` installs them.
"""

import numpy as np
import pyarrow.parquet as pq
import pytest
from shard_cases import SIZES, make_rows, make_tiled_rows

from elastic.tokens import write_shard


@pytest.fixture(scope="module", params=[*SIZES, "tiles"])
def shard(request, tmp_path_factory):
    """A shard's path and its columns as lists; 'tiles': of frames of several sizes."""
    path = tmp_path_factory.mktemp("shard") / "a.parquet"
    tiled = request.param == "tiles"
    rows = make_tiled_rows(64_000) if tiled else make_rows(SIZES[request.param], clips=7)
    write_shard(path, rows)
    return str(path), pq.read_table(path).to_pydict()


def assert_same(found, expected):
    assert list(found) == list(expected)
    for name, column in expected.items():
        for a, b in zip(found[name], column, strict=True):
            # Some give arrays in place of lists; what is not a number is not equal to itself.
            np.testing.assert_equal(np.asarray(a, dtype=object).tolist(), np.asarray(b, dtype=object).tolist())  # fmt: skip


def test_polars_reads_a_shard(shard):
    polars = pytest.importorskip("polars", reason="polars is not installed")
    path, expected = shard
    assert_same(polars.read_parquet(path).to_dict(as_series=False), expected)


def test_duckdb_reads_a_shard(shard):
    duckdb = pytest.importorskip("duckdb", reason="duckdb is not installed")
    path, expected = shard
    found = duckdb.read_parquet(path).to_arrow_table().to_pydict()
    assert_same(found, expected)


def test_datasets_reads_a_shard(shard, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    datasets = pytest.importorskip("datasets", reason="datasets is not installed")
    path, expected = shard
    found = datasets.load_dataset(
        "parquet", data_files=path, split="train", cache_dir=str(tmp_path)
    )
    assert_same(found.to_dict(), expected)

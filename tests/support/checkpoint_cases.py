"""The model and the parameters that tests of checkpoints share."""

import functools
from pathlib import Path

from elastic.checkpoints import load_params
from elastic.config import ElasticTokConfig
from elastic.io.tree import flatten


def golden_config(case: str, *, scan_layers: bool = True) -> ElasticTokConfig:
    fsq = case == "fsq"
    return ElasticTokConfig(
        hidden_size=64, intermediate_size=96, num_attention_heads=2, num_encoder_layers=2,
        num_decoder_layers=2, max_toks=32, min_toks=4, max_sequence_length=128,
        frames_per_block=2 if fsq else 4, patch_size=(1, 8, 8) if fsq else (2, 8, 8),
        bottleneck_type=case, scan_layers=scan_layers,
    )  # fmt: skip


FSQ, FSQ_NUMBERED = golden_config("fsq"), golden_config("fsq", scan_layers=False)


def assert_same(found, expected):
    """Equal names in equal order, equal dtypes, equal bits."""
    found, expected = flatten(found), flatten(expected)
    assert list(found) == list(expected)
    for path, leaf in expected.items():
        assert found[path].dtype == leaf.dtype and found[path].shape == leaf.shape, path
        assert found[path].tobytes() == leaf.tobytes(), path


@functools.cache
def file_tree() -> dict:
    return load_params(f"params::{Path(__file__).parents[1]}/golden/fsq/ckpt/params_scan_fp32", FSQ)

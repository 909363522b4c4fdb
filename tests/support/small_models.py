"""The small models that the released system trained and ran, and the files that it ran them on (tests/golden/README.md)."""

import json
import pathlib

import jax
import numpy as np

from elastic import media
from elastic.checkpoints import load_params
from elastic.config import ElasticTokConfig
from elastic.distributed.mesh import make_mesh
from elastic.tokenizer import ElasticTokenizer

CLIP, PHOTO = "clip_160x120_30fps_97f.mp4", "img_101x67.png"
SIZES = dict(
    hidden_size=64, intermediate_size=96, num_attention_heads=2, num_encoder_layers=2, num_decoder_layers=2,
    rms_norm_eps=1e-5, min_toks=4, max_toks=32, max_sequence_length=128,
)  # fmt: skip
CASES = {
    "fsq": SIZES | dict(bottleneck_type="fsq", patch_size=(1, 8, 8), frames_per_block=2, theta=5e7),
    "vae": SIZES | dict(bottleneck_type="vae", patch_size=(2, 8, 8), frames_per_block=4, theta=5e6),
}


def load_tokenizers(golden: pathlib.Path) -> dict[str, ElasticTokenizer]:
    """{case: tokenizer}, each with the released context: four blocks, then an empty cache."""
    return {
        case: ElasticTokenizer.from_pretrained(
            f"params::{golden}/{case}/ckpt/params_scan_fp32",
            config=ElasticTokConfig(**sizes),
            context="restart",
        )
        for case, sizes in CASES.items()
    }


def load_tokenizer(golden: pathlib.Path, case: str, **options) -> ElasticTokenizer:
    """The tokenizer of one case with its golden parameters, on one device: its programs compile faster."""
    folder = golden / case
    released = json.loads((folder / "meta.json").read_text())["config"]
    config = ElasticTokConfig.from_json_dict(released | {"bottleneck_type": case})
    params = load_params(f"params::{folder}/ckpt/params_scan_fp32", config)
    mesh = make_mesh("1,1,1,1", jax.devices()[:1])
    return ElasticTokenizer(config, params, mesh=mesh, **options)


def read_frames(golden: pathlib.Path, num_frames: int, *, resolution: int) -> np.ndarray:
    """The first frames of the clip, uint8 [num_frames, resolution, resolution, 3]."""
    with media.open_clip(golden / "media" / CLIP, resolution=resolution) as reader:
        return reader.read()[:num_frames]

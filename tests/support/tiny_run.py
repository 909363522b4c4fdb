"""A run small enough to be started again and again, in this process or in others: clips, model, options."""

import json
import pathlib
from typing import Any

import numpy as np

from elastic import media
from elastic.config import ElasticTokConfig
from elastic.data.config import DataConfig
from elastic.training.config import LogConfig, OptimizerConfig, SaveConfig, TrainConfig
from elastic.training.throughput import CLOCK

MODELS = {
    kind: ElasticTokConfig(
        hidden_size=32, intermediate_size=32, num_encoder_layers=1, num_decoder_layers=1, num_attention_heads=2,
        frames_per_block=2, patch_size=(2, 8, 8), min_toks=2, max_toks=16, max_sequence_length=32, theta=1e4,
        bottleneck_type=kind, lpips_loss_ratio=0.0,
    )
    for kind in ("fsq", "vae")
}  # fmt: skip


def make_clips(folder: pathlib.Path) -> pathlib.Path:
    """Clips of 40 x 40 pixels: a ramp that moves, and a dot; 8 and 7 frames, so that one block is padded."""
    ramp = np.linspace(0, 255, 40).astype(np.uint8)
    pan = [np.broadcast_to(np.roll(ramp, k)[:, None], (40, 40, 3)).copy() for k in range(8)]
    media.write_video(folder / "pan.mp4", pan, 24)
    dot = np.full((7, 40, 40, 3), 30, np.uint8)
    for k, frame in enumerate(dot):
        frame[10:20, 3 * k : 3 * k + 10] = (250, 180, 20)
    media.write_video(folder / "dot.mp4", list(dot), 24)
    return folder


def settings(clips: pathlib.Path, folder: pathlib.Path, **options: Any) -> TrainConfig:
    """Six steps on one device, a record each, a checkpoint after the third."""
    options = dict(options)
    save = SaveConfig(**(dict(freq=3, float_dtype="fp32") | options.pop("save", {})))
    log = LogConfig(**(dict(freq=1, tensorboard=False) | options.pop("log", {})))
    data = DataConfig(**(dict(path=str(clips), batch_size=2, workers=0) | options.pop("data", {})))
    fixed = dict(
        optimizer=OptimizerConfig(lr=3e-3, end_lr=1e-3, lr_warmup_steps=2, lr_decay_steps=30),
        output_dir=str(folder),
        mesh_dim="1,1,-1,1",
        total_steps=6,
    )
    return TrainConfig(data=data, save=save, log=log, **(fixed | options))


def records(folder: pathlib.Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl."""
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def numbers(folder: pathlib.Path) -> list[dict[str, Any]]:
    """The same without what the clock says."""
    return [
        {name: value for name, value in record.items() if name not in CLOCK}
        for record in records(folder)
    ]

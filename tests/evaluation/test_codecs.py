"""Classical codecs: within the bits, all frames in order, as good as they should be."""

import os
import sys

import numpy as np
import pytest

from elastic.evaluation import codecs
from elastic.evaluation.codecs import CODECS, CodecAt, _comment_bytes, _open
from elastic.metrics import psnr


@pytest.fixture(scope="module")
def frames():
    """A bright bar that moves over a gradient: 6 frames of 64 x 64 pixels."""
    clip = np.zeros((6, 64, 64, 3), np.uint8)
    clip[:] = np.linspace(20, 200, 64, dtype=np.uint8)[None, None, :, None]
    for k, frame in enumerate(clip):
        frame[:, 8 * k : 8 * k + 8] = (230, 60, 90)
    return clip


@pytest.mark.parametrize("name", CODECS)
def test_the_finest_quality_within_the_bits_is_taken(name, frames):
    codec = CodecAt(name, frames, 24)
    finest = codec.within(1 << 40)
    assert finest.frames.shape == frames.shape
    least = 30 if name == "av1" else 40  # AV1 halves the planes of colour
    assert all(psnr(a, b) > least for a, b in zip(frames, finest.frames, strict=True))
    coarsest = codec.within(0)
    assert coarsest.bits > 0  # nothing fits, so the coarsest stands for it
    budget = (coarsest.bits + finest.bits) // 2
    within = codec.within(budget)
    assert coarsest.bits <= within.bits <= budget
    finer = within.quality + np.sign(finest.quality - coarsest.quality)
    assert codec._code(int(finer)).bits > budget
    assert psnr(frames, coarsest.frames) < psnr(frames, finest.frames)


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells how threads are scheduled")
def test_an_encoder_leaves_the_priority_of_all_threads_as_it_was(frames, monkeypatch):
    """As root SVT-AV1 asks for real-time priority, and all other work of the machine would wait."""
    opened = []

    def open_and_look(encoder):
        _open(encoder)
        opened.append({os.sched_getscheduler(int(name)) for name in os.listdir("/proc/self/task")})

    usual = os.sched_getscheduler(0)
    monkeypatch.setattr(codecs, "_open", open_and_look)
    CodecAt("av1", frames, 24).within(0)
    assert opened and set().union(*opened) == {usual}
    assert os.sched_getscheduler(0) == usual


def test_a_comment_of_the_encoder_is_no_payload():
    packet = b"\0\0\0\1\x67abc" + b"\0\0\1\x06" + b"settings" + b"\0\0\1\x65picture"
    assert _comment_bytes(packet, frozenset({0x06})) == 3 + 1 + 8
    assert _comment_bytes(packet, frozenset()) == 0

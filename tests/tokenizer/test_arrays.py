"""What people hold -> frames: one clip as many kinds of arrays is the same clip, and what is none is refused with the way out."""

import re

import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from elastic.tokenizer.arrays import as_frames, is_array

CLIP = np.random.default_rng(0).integers(0, 256, (2, 5, 7, 3), np.uint8)
UNIT = CLIP.astype(np.float32) / 255


class Exported:
    """A clip of another library, which only speaks DLPack."""

    def __init__(self, array):
        self._array, self.dtype = array, f"other.{array.dtype}"

    def detach(self):
        return self

    def cpu(self):
        return self

    def __dlpack__(self, **options):
        return self._array.__dlpack__(**options)

    def __dlpack_device__(self):
        return self._array.__dlpack_device__()


@pytest.mark.parametrize(
    ("array", "options"),
    [
        (CLIP, {}),
        (CLIP, dict(layout="THWC")),
        (jnp.asarray(CLIP), {}),
        (Exported(CLIP), {}),
        (CLIP[None], {}),
        (np.moveaxis(CLIP, -1, 1), {}),
        (np.moveaxis(CLIP, -1, 1), dict(layout="TCHW")),
        (np.moveaxis(CLIP, -1, 0), {}),
        (np.moveaxis(CLIP, -1, 1)[None], {}),
        (np.moveaxis(CLIP, -1, 0)[None], dict(layout="BCTHW")),
        (UNIT, dict(value_range=(0, 1))),
        (UNIT.astype(np.float64), dict(value_range=(0.0, 1.0))),
        (UNIT * 2 - 1, dict(value_range=(-1, 1))),
        (jnp.asarray(UNIT), dict(value_range=(0, 1))),
        (np.moveaxis(UNIT, -1, 1), dict(value_range=(0, 1), layout="TCHW")),
        (np.asfortranarray(CLIP), {}),
        (np.clip(UNIT, 0, 1) * 1.001, dict(value_range=(0, 1))),  # what resizing overshoots
    ],
    ids=(
        "uint8 named jax dlpack batch channels-first channels-first-named channels-before-frames batch-channels-first torch-video "
        "unit float64 signed jax-floats channels-first-floats fortran overshoot"
    ).split(),
)
def test_one_clip_in_many_arrays_is_the_same_clip(array, options):
    assert is_array(array)
    found = as_frames(array, **options)
    assert found.dtype == np.uint8
    np.testing.assert_array_equal(found, CLIP)


@pytest.mark.parametrize(
    ("dtype", "value_range", "apart"), [("float16", (0, 1), 1), ("bfloat16", (-1, 1), 2)]
)
def test_short_floats_are_as_near_as_their_type(dtype, value_range, apart):
    floats = UNIT if value_range[0] == 0 else UNIT * 2 - 1
    found = as_frames(jnp.asarray(floats, dtype), value_range=value_range)
    assert np.abs(found.astype(int) - CLIP).max() <= apart


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "L", "P"])
def test_a_picture_of_pillow_is_its_colours(mode):
    picture = Image.fromarray(CLIP[0]).convert(mode)
    assert is_array(picture)
    np.testing.assert_array_equal(as_frames(picture), np.asarray(picture.convert("RGB")))


def test_a_torch_tensor_is_taken_with_gradients_and_without_torch_being_imported_here():
    torch = pytest.importorskip(
        "torch", reason="torch is not installed; no part of the package needs it"
    )
    tensor = torch.tensor(UNIT, requires_grad=True)
    np.testing.assert_array_equal(as_frames(tensor, value_range=(0, 1)), CLIP)
    np.testing.assert_array_equal(as_frames(torch.from_numpy(CLIP).permute(0, 3, 1, 2)), CLIP)
    with pytest.raises(ValueError, match=r"give frames\.float\(\)"):
        as_frames(tensor.to(torch.bfloat16), value_range=(0, 1))


@pytest.mark.parametrize(
    ("array", "options", "message"),
    [
        (UNIT, {}, "say what floats mean: value_range=(0, 1) or value_range=(-1, 1). As uint8: (frames * 255).round().astype(np.uint8)."),
        (UNIT, dict(value_range=(0, 255)), "value_range=(0, 255) must be (0, 1) or (-1, 1)."),
        (UNIT * 2 - 1, dict(value_range=(0, 1)), "; use value_range=(-1, 1)."),
        (UNIT * 255, dict(value_range=(0, 1)), "use frames.astype(np.uint8), as these look like levels"),
        (UNIT * np.nan, dict(value_range=(0, 1)), "but the frames go from nan to nan; use np.clip."),
        (CLIP, dict(value_range=(0, 1)), "value_range=(0, 1) is for floats, and the frames are uint8; leave it out."),
        (CLIP.astype(np.int64), {}, "levels from 0 to 255 become it by frames.astype(np.uint8)."),
        (CLIP > 9, {}, "by np.uint8(255) * frames."),
        (CLIP[..., 0], {}, "must be uint8 [frames, height, width, 3], or a picture [height, width, 3]; of grey frames make three channels: "
         "np.repeat(frames[..., None], 3, axis=-1)."),
        (CLIP[..., :1], {}, "np.repeat(frames, 3, axis=-1)."),
        (np.zeros((2, 5, 7, 4), np.uint8), {}, "drop the alpha channel: frames[..., :3]."),
        (np.zeros((2, 5, 7, 9), np.uint8), {}, "give the axes: layout='TCHW'"),
        (np.stack([CLIP, CLIP]), {}, "is a batch of 2 clips; give encode_batch(frames, ...), or one clip: frames[0]."),
        (np.zeros((3, 3, 5, 7), np.uint8), {}, "has two axes of 3; say which are the channels"),
        (CLIP, dict(layout="TCHW"), "layout='TCHW' has 4 axes with 3 channels; the array has shape (2, 5, 7, 3)."),
        (CLIP, dict(layout="NHWC"), "layout='NHWC' must be one of THWC, TCHW,"),
        (np.float32(1), dict(value_range=(0, 1)), "must be uint8 [frames, height, width, 3]"),
    ],
)  # fmt: skip
def test_what_is_no_clip_is_refused_with_the_line_that_converts_it(array, options, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        as_frames(array, **options)


@pytest.mark.parametrize("other", ["clip.mp4", [CLIP[0]], iter(CLIP), 3, None])
def test_paths_and_iterables_are_no_arrays(other):
    assert not is_array(other)

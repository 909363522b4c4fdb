"""Options of the training data."""

import dataclasses
import math

from elastic.config import ElasticTokConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Flags `--train_dataset.vision_dataset.*`.

    Attributes:
      path: the folder of images and videos, local or in a bucket (gs://...); folders inside it count too.
      ext: endings to take, such as 'mp4' or 'jpg,png'; '' takes all that can be read.
      batch_size: sequences in a step, over all devices of all hosts.
      seq_length: tokens of a sequence, whole blocks; 0: the model's max_sequence_length.
      fps: frames per second taken from a video.
      seed: draws the order of the data, crops and motion.
      workers: processes of each host that decode; 0: threads of the training process do.
      max_prefetch: batches prepared ahead.
      max_frames: frames used of a video, its first ones; 0: all.
      chunk_size: files that are shuffled among each other; 16 or more such chunks are read at a time.
        More of them mix better, and need a larger cache lest a file be decoded repeatedly.
      image_blocks: blocks that an image becomes: one is still, more show a moving crop of it, drawn
        anew in each epoch. It is also how images are weighed against videos.
      random_crop: draw crop and mirroring of every piece anew in each epoch, and for a video's also a
        shift by less than a block. Otherwise files are shown as inference sees them.
      cache_gigabytes: memory of each worker for decoded frames; those used longest ago are dropped first.
      cache_path: a folder on a local disk where decoded frames are kept for all workers, epochs and runs, uncompressed;
        '' is none. For many epochs of a few thousand clips, where decoding would hold up a fast device.

    Raises:
      ValueError: an option is out of its range.
    """

    path: str
    ext: str = ""
    batch_size: int = 2
    seq_length: int = 0
    fps: float = 24.0
    seed: int = 0
    workers: int = 2
    max_prefetch: int = 4
    max_frames: int = 0
    chunk_size: int = 8
    image_blocks: int = 1
    random_crop: bool = False
    cache_gigabytes: float = 4.0
    cache_path: str = ""

    def __post_init__(self):
        if not self.path:
            raise ValueError("path is empty; name the folder of images and videos.")
        for name in ("batch_size", "max_prefetch", "chunk_size", "image_blocks"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be 1 or more.")
        for name in ("seq_length", "seed", "workers", "max_frames", "cache_gigabytes"):
            if not getattr(self, name) >= 0:  # nan is refused too
                raise ValueError(f"{name}={getattr(self, name)} must be 0 or more.")
        if not 0 < self.fps < math.inf:
            raise ValueError(f"fps={self.fps} must be above 0 and finite.")


def sequence_length(data: DataConfig, model: ElasticTokConfig) -> int:
    """Tokens of a training sequence.

    Raises:
      ValueError: they are not a whole number of blocks.
    """
    length = data.seq_length or model.max_sequence_length
    num_blocks, rest = divmod(length, model.tokens_per_block)
    if rest:
        raise ValueError(
            f"seq_length={length} is not a whole number of blocks of {model.tokens_per_block} "
            f"tokens; use {max(1, num_blocks) * model.tokens_per_block}."
        )
    return length

"""Options of the training data."""

import dataclasses

from elastic.io.options import REQUIRED, at_least, check_options, finite_above, option
from elastic.io.read_options import FITS, exact_color_option, reader_option


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Which files a run is trained on, and how sequences are made of them: flags `--train_dataset.vision_dataset.*`.

    Raises:
      ValueError: an option is out of its range.
    """

    path: str = option(
        REQUIRED,
        "the folder of images and videos, with the folders in it; a bucket (gs://...) where its fsspec package is installed; tar shards "
        "(clips-{000..009}.tar), Parquet files, hf_dataset::OWNER/NAME or hf_stream::OWNER/NAME, a list (.txt, .csv, .jsonl); several, "
        "also mixed by weights: A=0.7,B=0.3",
    )
    ext: str = option("", "endings to take, such as mp4 or jpg,png; '' takes all")
    batch_size: int = option(
        2, "sequences in a step, over all devices of all hosts", check=at_least(1)
    )
    seq_length: int = option(
        0,
        "tokens of a sequence, whole blocks; 0: the model's max_sequence_length",
        check=at_least(0),
    )
    fps: float = option(24.0, "frames per second taken from a video", check=finite_above(0))
    reader: str = reader_option()
    exact_color: bool = exact_color_option()
    fit: str = option(
        "crop",
        "what is shown of a frame that is not square, as in tokenizing: crop its middle; pad all of it; stretch all of it; tile: squares "
        "at random places of the whole frame, half of them at its own size, the others at any scale up to its short side",
        choices=FITS,
    )
    # A small model trains on tiles of the frames that it is to see later.
    short_side: int = option(
        0,
        "fit=tile: rows or columns, whichever are fewer, that larger frames are scaled to before tiles are cut; 0: four tiles",
        check=at_least(0),
    )
    seed: int = option(0, "draws the order of the files, crops and motion", check=at_least(0))
    workers: int = option(
        2, "processes of a host that decode; 0: threads of the trainer", check=at_least(0)
    )
    max_prefetch: int = option(4, "batches prepared ahead", check=at_least(1))
    max_frames: int = option(0, "frames used of a video, its first ones; 0: all", check=at_least(0))
    # Larger chunks mix better, and need a larger cache: otherwise a file is decoded several times.
    chunk_size: int = option(
        8,
        "files that are shuffled among each other; 16 or more such chunks are read at a time",
        check=at_least(1),
    )
    # The number of blocks is also the weight of an image against a video.
    image_blocks: int = option(
        1, "blocks made of an image; more than 1 pan and zoom over it", check=at_least(1)
    )
    # A video's piece is also shifted in time, by less than a block. All is drawn anew in each epoch.
    random_crop: bool = option(
        False, "crop and mirror by chance, instead of the middle that inference sees"
    )
    cache_gigabytes: float = option(
        4.0,
        "memory of each process for decoded frames; the frames unused for longest are dropped first",
        check=at_least(0),
    )
    # For many epochs of a few thousand clips, where decoding would hold up a fast device.
    cache_path: str = option(
        "",
        "folder on a local disk where decoded frames are kept for all workers, epochs and runs, uncompressed; '' is none",
    )

    def __post_init__(self):
        if not self.path:
            raise ValueError("path is empty; name the folder of images and videos.")
        check_options(self)
        if self.short_side and self.fit != "tile":
            raise ValueError(
                f"short_side={self.short_side} is for tiles: add fit=tile, or leave it out."
            )

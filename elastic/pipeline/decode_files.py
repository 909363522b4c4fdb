"""Decodes token files into videos and pictures."""

import itertools
import os
from pathlib import Path

from tqdm import tqdm

from elastic import media
from elastic.checkpoints.named_models import shipped_folder
from elastic.config import ElasticTokConfig
from elastic.io.progress import hide_bar
from elastic.media.writer import WRITABLE_VIDEO_SUFFIXES
from elastic.pipeline.result_folder import PART, UNFINISHED
from elastic.tokenizer import ElasticTokenizer
from elastic.tokens import TokenFileError, TokenizedClip, read_token_stream
from elastic.tokens.any_file import load_clip


class TokenPart:
    """The token file of a run that is under way or was interrupted: its header.

    Attributes:
      path: the file.
      is_image, rate, window_blocks, model_id, config_hash: as in `TokenizedClip`.

    Raises:
      TokenFileError: the file is not a token stream.
    """

    def __init__(self, path: str | os.PathLike):
        self.path = Path(path)
        header, _ = read_token_stream(self.path)
        try:
            self.is_image, self.rate = bool(header["is_image"]), float(header["rate"])
            self.window_blocks = int(header["window_blocks"])
            self.model_id, self.config_hash = str(header["model_id"]), str(header["config_hash"])
        except (KeyError, TypeError, ValueError) as error:
            raise TokenFileError(f"{path} has a header that lacks {error}.") from error

    def __str__(self) -> str:
        return str(self.path)


def open_tokens(path: str | os.PathLike) -> TokenizedClip | TokenPart:
    """Opens a finished token file (.npz), a shard of one clip (.parquet), or the file of an unfinished run (.part).

    Raises:
      TokenFileError: the file is none of these, or a shard has several clips.
      OSError: the file cannot be read.
    """
    clip = None if Path(path).suffix == ".part" else load_clip(path)
    return TokenPart(path) if clip is None else clip


def default_output(path: str | os.PathLike, tokens: TokenizedClip | TokenPart) -> Path:
    """Where a token file is decoded to when no file is named: `decoded.mp4` or `decoded.png` beside it.

    A name that runs do not give stays in the output's: `cat.npz` becomes `cat.decoded.mp4`. The folder of unfinished files goes when its
    run ends, so the output is written beside that folder.
    """
    path = Path(path)
    named = "" if path.stem == Path(PART).stem else f"{path.stem}."
    folder = path.parent.parent if path.parent.name == UNFINISHED else path.parent
    return folder / f"{named}decoded{'.png' if tokens.is_image else '.mp4'}"


def model_of(tokens: TokenizedClip | TokenPart) -> str:
    """The local checkpoint that a token file names. A name in a file never starts a download.

    Raises:
      ValueError: there is no such local checkpoint.
    """
    if Path(tokens.model_id).exists():
        return tokens.model_id
    shipped = shipped_folder(tokens.model_id)
    if shipped is None:
        raise ValueError(
            f"The tokens were made by {tokens.model_id!r}, which is not here; name the model with "
            "--load_checkpoint (hf::OWNER/NAME fetches one)."
        )
    return str(shipped)


def check_same_model(
    tokens: TokenizedClip | TokenPart, config: ElasticTokConfig, spec: str
) -> None:
    """Refuses a model whose config differs from the config of the model that made the tokens. Called before weights are loaded."""
    if tokens.config_hash != config.config_hash():
        raise ValueError(
            f"The tokens were made by {tokens.model_id!r} (config {tokens.config_hash}), but {spec!r} "
            f"is another model (config {config.config_hash()}); give the one that made them, with "
            "the --load_elastic_config and --update_elastic_config of that run."
        )


def decode_to_file(
    tokenizer: ElasticTokenizer,
    tokens: TokenizedClip | TokenPart,
    path: str | os.PathLike,
    *,
    follow: bool = False,
    progress: bool = True,
    batch: int = 1,
) -> None:
    """Decodes tokens block by block into a video file, or the tokens of a picture into an image file.

    If this fails, no file is left behind.

    Args:
      tokenizer: the model that made the tokens.
      tokens: a tokenized clip, or the token file of an unfinished run.
      path: the video or image file.
      follow: wait for further blocks of a run that is under way.
      progress: show a progress bar.
      batch: tiles of a block that go through the model at once.

    Raises:
      ValueError: another model made the tokens, there is no block yet, or the suffix of `path` does not fit.
      OSError: the file cannot be written.
    """
    path = Path(path)
    check_decoded_name(path, tokens)
    if isinstance(tokens, TokenPart):
        blocks = tokenizer.decode_stream(tokens.path, follow=follow, batch=batch)
        total = None
    else:
        blocks, total = tokenizer.decode_stream(tokens, batch=batch), tokens.num_blocks
    first = next(blocks, None)  # raises if another model made the tokens, before a file is opened
    if first is None:
        raise ValueError(f"{tokens} has no block yet; decode it later, or wait with --follow.")
    if tokens.is_image:
        media.write_image(path, first[0])
        return
    with (
        media.VideoWriter(path, tokens.rate) as video,
        tqdm(total=total, desc=path.name, unit="block", disable=hide_bar(progress)) as bar,
    ):
        for block in itertools.chain([first], blocks):
            for frame in block:
                video.write(frame)
            bar.update()


def check_decoded_name(path: str | os.PathLike, tokens: TokenizedClip | TokenPart) -> None:
    """Refuses a video suffix for the tokens of a picture, and any other suffix for the tokens of a video."""
    suffix = Path(path).suffix.lower()
    video = suffix in WRITABLE_VIDEO_SUFFIXES
    if video == tokens.is_image:
        what, way = ("a picture", ".png") if tokens.is_image else ("a video", ".mp4")
        raise media.MediaError(
            f"The tokens are of {what}; {str(path)!r} does not end like one, use {way}."
        )

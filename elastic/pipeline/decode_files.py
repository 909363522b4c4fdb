"""Token files to videos."""

import os
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
from tqdm import tqdm

from elastic import media
from elastic.config import ElasticTokConfig
from elastic.media.writer import WRITABLE_VIDEO_SUFFIXES
from elastic.tokenizer import ElasticTokenizer
from elastic.tokens import TokenFileError, TokenizedClip, read_token_stream


class TokenPart:
    """The growing token file of a run that is under way, or was interrupted.

    Attributes:
      path: of the file.
      is_image, rate, window_blocks, model_id, config_hash: as in `TokenizedClip`.

    Raises:
      TokenFileError: it is no such file.
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
    """A token file, whole or growing.

    Raises:
      TokenFileError: it is neither.
      OSError: it cannot be read.
    """
    return TokenPart(path) if Path(path).suffix == ".part" else TokenizedClip.load(path)


def model_of(tokens: TokenizedClip | TokenPart) -> str:
    """The checkpoint that a token file names, if it lies here.

    Raises:
      ValueError: it does not. Nothing is downloaded because a file says so.
    """
    if not Path(tokens.model_id).exists():
        raise ValueError(
            f"The tokens were made by {tokens.model_id!r}, which is not here; name the model with "
            "--load_checkpoint (hf::OWNER/NAME fetches one)."
        )
    return tokens.model_id


def check_same_model(
    tokens: TokenizedClip | TokenPart, config: ElasticTokConfig, spec: str
) -> None:
    """Refuses a model of another shape than the one that made the tokens, before it is loaded."""
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
) -> None:
    """Decodes tokens block by block into a video, or a picture into an image file.

    Args:
      tokens: a record, or the growing file of a run that is under way.
      follow: of the latter, wait for the blocks that are still to come.

    Raises:
      ValueError: another model made the tokens, or the ending of `path` does not fit.
      OSError: the file cannot be written. Nothing is left behind in either case.
    """
    path = Path(path)
    check_decoded_name(path, tokens)
    if isinstance(tokens, TokenPart):
        blocks, total = tokenizer.decode_stream(tokens.path, follow=follow), None
    else:
        blocks, total = tokenizer.decode_stream(tokens), len(tokens.blocks)
    first = next(blocks, None)  # another model is refused here, before a file is begun
    if first is None:
        raise ValueError(f"{tokens} has no block yet; decode it later, or wait with --follow.")
    if tokens.is_image:
        media.write_image(path, first[0])
        return
    with (
        media.VideoWriter(path, tokens.rate) as video,
        tqdm(total=total, desc=path.name, unit="block", disable=not progress) as bar,
    ):
        for block in _chain(first, blocks):
            for frame in block:
                video.write(frame)
            bar.update()


def check_decoded_name(path: str | os.PathLike, tokens: TokenizedClip | TokenPart) -> None:
    """Refuses a video's name for a picture, and the other way round."""
    suffix = Path(path).suffix.lower()
    video = suffix in WRITABLE_VIDEO_SUFFIXES
    if video == tokens.is_image:
        what, way = ("a picture", ".png") if tokens.is_image else ("a video", ".mp4")
        raise media.MediaError(
            f"The tokens are of {what}; {str(path)!r} does not end like one, use {way}."
        )


def _chain(first: np.ndarray, rest: Iterable[np.ndarray]) -> Iterator[np.ndarray]:
    yield first
    yield from rest

"""`ElasticTokenizer`: clips to tokens and back."""

import copy
import dataclasses
import logging
import os
import pathlib
import time
from collections.abc import Iterable, Iterator
from typing import Any, Literal, NamedTuple, cast

import jax
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Bool, UInt8

from elastic import checkpoint, media
from elastic import mesh as meshes
from elastic.codec import Codec, Committed, Past, Trial
from elastic.config import ElasticTokConfig, parse_dtype
from elastic.curves import Memory
from elastic.ops import bits
from elastic.patches import pad_block, patchify, unpatchify
from elastic.search import Search, make_search
from elastic.sharding import param_shardings
from elastic.tokens import BlockTokens, TokenizedClip

log = logging.getLogger(__name__)

_KEEP_BYTES = 2 << 30  # trials larger than this are not kept: committing then costs one more pass
Source = str | os.PathLike | np.ndarray


class BlockResult(NamedTuple):
    """One block, tokenized."""

    frames: UInt8[
        np.ndarray, "n rows columns 3"
    ]  # the original at the model's resolution; real frames only
    reconstruction: UInt8[np.ndarray, "n rows columns 3"]
    tokens: BlockTokens
    passes: int  # runs of encoder and decoder over this block
    seconds: float
    tried: dict[int, float]  # every count evaluated, with its loss


class Reconstruction(NamedTuple):
    """A clip that went through the model and back."""

    frames: UInt8[np.ndarray, "n rows columns 3"]
    tokens: TokenizedClip


class Encoding:
    """A clip being tokenized: iterate over it for one `BlockResult` after the other, then ask for `tokens()`.

    Frames are read, tokenized and handed out block by block; nothing but the tokens is held.
    """

    def __init__(self, tokenizer: "ElasticTokenizer", clip: "_Clip", search: dict[str, Any]):
        self._tokenizer, self._clip, self._search = tokenizer, clip, search
        self._blocks: list[BlockTokens] = []
        self._finished = False
        self.is_image, self.rate, self.num_frames, self.source = (
            clip.is_image,
            clip.rate,
            clip.num_frames,
            clip.source,
        )
        self.num_blocks = -(-clip.num_frames // tokenizer.config.frames_per_block)
        make_search(
            **search
        )  # what cannot be searched for is refused before the first frame is read

    def __iter__(self) -> Iterator[BlockResult]:
        self._blocks = []
        for result in self._tokenizer.tokenize_blocks(
            self._clip.blocks(self._tokenizer.config.frames_per_block), self._search
        ):
            self._blocks.append(result.tokens)
            yield result
        self._finished = True

    def tokens(self) -> TokenizedClip:
        """The token record of the whole clip.

        Raises:
          ValueError: not all blocks have been tokenized yet.
        """
        if not self._finished:
            raise ValueError(
                f"{len(self._blocks)} of {self.num_blocks} blocks are tokenized; iterate to the end first."
            )
        tokenizer, config = self._tokenizer, self._tokenizer.config
        return TokenizedClip(
            blocks=tuple(self._blocks),
            bottleneck_type=config.bottleneck_type,
            codebook_size=config.codebook_size if config.bottleneck_type == "fsq" else None,
            tokens_per_block=config.tokens_per_block,
            frames_per_block=config.frames_per_block,
            num_frames=self.num_frames,
            is_image=self.is_image,
            resolution=config.resolution,
            source=self.source,
            rate=float(self.rate),
            model_id=tokenizer.model_id,
            config_hash=config.config_hash(),
            threshold=self._search["threshold"],
            search=self._search["name"],
            window_blocks=tokenizer.window_blocks,
            context=tokenizer.context,
        )


class ElasticTokenizer:
    """A model ready to tokenize: `encode`, `decode`, `reconstruct`.

    Args:
      config: the model.
      params: its parameter tree; kept in the type it has and cast where it is used.
      dtype: 'fp32' or 'bf16': type of products' operands and of the cached past; sums are float32.
      mesh: where the arrays lie; None: `mesh_dim='!1,1,-1,1'` over all devices.
      window_blocks: blocks in one context, the current one included; None: `max_sequence_length` of the config.
      context: 'carry' lets the window slide, 'restart' empties it whenever it is full, as the released code does.
      search_width: counts of a block tried in one call.
      model_id: what token files call the model.
    """

    def __init__(
        self,
        config: ElasticTokConfig,
        params: dict[str, Any],
        *,
        dtype: str = "fp32",
        mesh: Mesh | None = None,
        window_blocks: int | None = None,
        context: str = "carry",
        search_width: int = 1,
        model_id: str = "unnamed",
    ):
        if context not in ("carry", "restart"):
            raise ValueError(f"context={context!r} must be 'carry' or 'restart'.")
        self.config, self.model_id, self.search_width = config, model_id, search_width
        self.context: Literal["carry", "restart"] = cast(Any, context)
        self.window_blocks = (
            config.max_sequence_length // config.tokens_per_block
            if window_blocks is None
            else window_blocks
        )
        self.mesh = meshes.make_mesh() if mesh is None else mesh
        self.codec = Codec(
            config, dtype=parse_dtype(dtype), mesh=self.mesh, window_blocks=self.window_blocks
        )
        # As the codec's programs take them.
        self.weights = jax.device_put(self.codec.stored(params), param_shardings(self.mesh, params))

    def with_params(
        self, params: dict[str, Any], *, mask_type: str | None = None, model_id: str | None = None
    ) -> "ElasticTokenizer":
        """The same tokenizer with other weights: both share the compiled programs, which two made anew would not."""
        other = copy.copy(self)
        other.config = self.config.replace(mask_type=mask_type or self.config.mask_type)
        other.model_id = model_id or self.model_id
        other.weights = jax.device_put(
            self.codec.stored(params), param_shardings(self.mesh, params)
        )
        return other

    @property
    def params(self) -> dict[str, Any]:
        """The parameter tree, in the types it was given in."""
        return jax.tree.map(bits.show, self.weights)

    @classmethod
    def from_pretrained(
        cls,
        path_or_repo: str | os.PathLike,
        *,
        config: ElasticTokConfig | None = None,
        mesh_dim: str = "!1,1,-1,1",
        model_id: str | None = None,
        **options: Any,
    ) -> "ElasticTokenizer":
        """Loads a model from a folder, a Hugging Face repository or a file such as 'params::FILE'.

        Args:
          config: needed where no config.json lies beside the weights.
          options: those of the class.

        Raises:
          ValueError: the weights cannot be found or read, or are of another model.
        """
        spec = os.fspath(path_or_repo)
        config = config or checkpoint.load_config(spec)
        if config is None:
            raise ValueError(
                f"{spec!r} has no config.json beside it; give `config=` (on the command line --load_elastic_config)."
            )
        params = checkpoint.load_params(spec, config)
        name = spec.rsplit("::", 1)[-1].rstrip("/")
        return cls(
            config, params, mesh=meshes.make_mesh(mesh_dim), model_id=model_id or name, **options
        )

    def encode(self, source: Source, **options: Any) -> TokenizedClip:
        """Tokens of a clip: a path, uint8 frames [frames, height, width, 3], or a picture [height, width, 3].

        Give `threshold` (the largest mean squared error of a block, pixels in [-1, 1]) or `num_tokens` (the same for each block). For
        the other options see `encode_stream`.
        """
        return self.reconstruct(source, **options).tokens

    def reconstruct(self, source: Source, **options: Any) -> Reconstruction:
        """Encodes and decodes a clip in one go; arguments as for `encode`."""
        encoding = self.encode_stream(source, **options)
        frames = np.concatenate([result.reconstruction for result in encoding])
        return Reconstruction(frames, encoding.tokens())

    def encode_stream(
        self,
        source: Source,
        *,
        threshold: float | None = None,
        num_tokens: int | None = None,
        search: str | None = None,
        rate: float | None = 24.0,
        max_frames: int | None = None,
        fallback_fraction: float = 1.0,
        max_fraction: float = 1.0,
        num_counts: int = 100,
    ) -> Encoding:
        """As `encode`, block by block.

        Args:
          search: 'binary', 'predict', 'linear' or 'fixed'; None: 'fixed' with `num_tokens`, else 'binary'.
          rate: frames per second to read from a file, and the rate of an array; None keeps a file's own.
          max_frames: read no more frames than this.
          fallback_fraction: share of a block's tokens kept when no count meets the threshold.
          max_fraction: share of a block's tokens that may be tried.
          num_counts: counts of the linear search.

        Raises:
          ValueError: the source cannot be read, or the options contradict each other.
        """
        if threshold is None and num_tokens is None:
            raise ValueError(
                "Give threshold= (an error to stay under) or num_tokens= (the same number for each block)."
            )
        options = dict(
            name=search or ("binary" if num_tokens is None else "fixed"),
            min_kept=min(self.config.min_toks, num_tokens or self.config.min_toks),
            max_kept=self.config.max_toks,
            threshold=threshold,
            num_tokens=num_tokens,
            fallback_fraction=fallback_fraction,
            max_fraction=max_fraction,
            num_counts=num_counts,
            width=self.search_width if num_tokens is None else 1,
        )
        return Encoding(self, _Clip.open(source, self.config.resolution, rate, max_frames), options)

    def tokenize_blocks(
        self, blocks: Iterable[UInt8[np.ndarray, "n rows columns 3"]], search: dict[str, Any]
    ) -> Iterator[BlockResult]:
        """One result after the other; `search` are the arguments of `make_search`. Only the last block may be short."""
        past = self.codec.new_past()
        memory = Memory()  # of this clip alone, so that its tokens do not depend on other clips
        for number, frames in enumerate(blocks):
            started = time.perf_counter()
            if self.context == "restart" and number % self.window_blocks == 0:
                past = self.codec.new_past()
            past, committed, block = _tokenize_block(
                self.codec, self.weights, past, frames, make_search(memory=memory, **search)
            )
            pixels = np.asarray(committed.pixels[0])
            pixels = unpatchify(pixels, self.config.patch_size, *frames.shape[1:3])
            tokens = np.asarray(committed.tokens[0])[: block.result.num_kept]
            yield BlockResult(
                frames=frames,
                reconstruction=np.asarray(pixels)[: len(frames)],
                tokens=BlockTokens(
                    num_kept=block.result.num_kept,
                    loss=block.result.loss,
                    met_threshold=block.result.met,
                    **{"indices" if self.config.bottleneck_type == "fsq" else "vectors": tokens},
                ),
                passes=block.passes,
                seconds=time.perf_counter() - started,
                tried=block.result.tried,
            )

    def decode(self, tokens: TokenizedClip) -> UInt8[np.ndarray, "frames rows columns 3"]:
        """The frames of a token record; a picture is a clip of one frame."""
        return np.concatenate(list(self.decode_stream(tokens)))

    def decode_stream(
        self, tokens: TokenizedClip
    ) -> Iterator[UInt8[np.ndarray, "n rows columns 3"]]:
        """The frames of a token record, block by block, the last one trimmed to its true length.

        Raises:
          ValueError: the tokens were made by a model of another shape.
        """
        config = self.config
        if tokens.config_hash != config.config_hash():
            raise ValueError(
                f"These tokens were made by {tokens.model_id!r} (config {tokens.config_hash}), this model is {self.model_id!r} "
                f"(config {config.config_hash()}); load the model that made them."
            )
        codec = self.codec
        if tokens.window_blocks != codec.window_blocks:
            codec = Codec(
                config, dtype=codec.dtype, mesh=self.mesh, window_blocks=tokens.window_blocks
            )
        past = codec.new_decoder_past()
        left = tokens.num_frames
        for number, block in enumerate(tokens.blocks):
            if tokens.context == "restart" and number % tokens.window_blocks == 0:
                past = codec.new_decoder_past()
            full = np.zeros(
                (1, config.tokens_per_block, *block.values.shape[1:]), block.values.dtype
            )
            full[0, : block.num_kept] = block.values
            past, pixels = codec.decode(
                self.weights, past, full, np.array([block.num_kept], np.int32)
            )
            size = (tokens.resolution, tokens.resolution)
            frames = np.asarray(unpatchify(np.asarray(pixels[0]), config.patch_size, *size))
            yield frames[:left]
            left -= config.frames_per_block


@dataclasses.dataclass(frozen=True)
class _Clip:
    """A clip at the model's resolution, from a file or an array."""

    reader: media.ClipReader | None
    frames: np.ndarray | None
    is_image: bool
    rate: float
    num_frames: int
    source: tuple[int, int]

    @classmethod
    def open(
        cls, source: Source, resolution: int, rate: float | None, max_frames: int | None
    ) -> "_Clip":
        if not isinstance(source, np.ndarray):
            reader = media.open_clip(
                pathlib.Path(source), resolution=resolution, rate=rate, max_frames=max_frames
            )
            info = reader.info
            return cls(
                reader,
                None,
                info.kind == "image",
                reader.rate,
                reader.num_frames,
                (info.width, info.height),
            )
        if (
            source.dtype != np.uint8
            or source.ndim not in (3, 4)
            or source.shape[-1] != 3
            or 0 in source.shape
        ):
            raise ValueError(
                f"A clip of type {source.dtype} and shape {source.shape} must be uint8 [frames, height, width, 3], or [height, width, 3]."
            )
        is_image = source.ndim == 3
        frames = (source[None] if is_image else source)[:max_frames]
        size = (frames.shape[2], frames.shape[1])
        if frames.shape[1:3] != (resolution, resolution):
            frames = np.stack([media.fit_frame(frame, resolution) for frame in frames])
        return cls(
            None, frames, is_image, 0.0 if is_image else float(rate or 24.0), len(frames), size
        )

    def blocks(self, frames_per_block: int) -> Iterator[np.ndarray]:
        if self.reader is not None:
            with self.reader:
                yield from self.reader.blocks(frames_per_block)
        elif self.frames is not None:
            for start in range(0, len(self.frames), frames_per_block):
                yield self.frames[start : start + frames_per_block]


class _Found(NamedTuple):
    """What the search of one block gave."""

    result: Any  # SearchResult
    passes: int


def _tokenize_block(
    codec: Codec, params: dict[str, Any], past: Past, frames: np.ndarray, search: Search
) -> tuple[Past, Committed, _Found]:
    """Searches a block's count and commits it.

    The trial of the count that will be chosen is kept, so that nothing runs twice; only where trials are too large for that, or the
    choice falls back on a count tried long ago, the commit runs its one pass again.
    """
    config = codec.config
    patches = patchify(pad_block(frames, config.frames_per_block), config.patch_size)[None]
    shown = _shown(config, len(frames))
    width = search.options.width
    keep = codec.trial_bytes(2 * width) <= _KEEP_BYTES
    held: dict[int, tuple[Trial, int]] = {}
    passes = 0

    def attempt(counts: list[int]) -> Trial:
        nonlocal passes
        passes += len(counts)
        padded = np.array(
            [counts + counts[-1:] * (width - len(counts))], np.int32
        )  # one compiled shape
        return codec.try_counts(params, past, patches, padded, shown=shown, keep=keep)

    while (counts := search.propose()) is not None:
        trial = attempt(counts)
        # Held against the threshold: the larger of both errors, so that decoded 8-bit frames keep the promise too.
        losses = np.maximum(trial.losses, trial.pixel_losses)[0, : len(counts)].tolist()
        search.observe(counts, losses)
        if keep:
            newest = {count: (trial, k) for k, count in enumerate(counts)}
            best = search.best()
            held = (
                {count: kept for count, kept in (held | newest).items() if count == best}
                if best is not None
                else newest
            )
    result = search.result()
    if result.num_kept not in held:
        keep = True
        held[result.num_kept] = (attempt([result.num_kept]), 0)
    trial, k = held[result.num_kept]
    past, committed = codec.commit(past, trial, np.array([k], np.int32))
    return past, committed, _Found(result, passes)


def _shown(config: ElasticTokConfig, num_frames: int) -> Bool[np.ndarray, "l p"]:
    """Which numbers of a block's patches belong to its first `num_frames` frames."""
    real = np.arange(config.frames_per_block) < num_frames
    size = (config.frames_per_block, config.resolution, config.resolution, 3)
    return np.asarray(patchify(np.broadcast_to(real[:, None, None, None], size), config.patch_size))

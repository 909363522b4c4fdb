"""`ElasticTokenizer`: clips to tokens and back."""

import copy
import dataclasses
import logging
import os
import pathlib
from collections.abc import Iterable, Iterator
from typing import Any, Literal, NamedTuple, cast

import jax
import numpy as np
from jax.sharding import Mesh
from jaxtyping import UInt8

from elastic import checkpoint, media
from elastic import mesh as meshes
from elastic.blocks import BlockResult, Metric, make_metric, tokenize_block
from elastic.budgeting import (
    Budget,
    check_targets,
    spend,
    threshold_of_psnr,
    tokens_of_bitrate,
)
from elastic.codec import Codec
from elastic.config import ElasticTokConfig, parse_dtype
from elastic.curves import Memory
from elastic.ops import bits
from elastic.patches import unpatchify
from elastic.search import SearchOptions, make_search
from elastic.sharding import param_shardings
from elastic.tokens import BlockTokens, TokenizedClip

log = logging.getLogger(__name__)

Source = str | os.PathLike | np.ndarray


class Reconstruction(NamedTuple):
    """A clip that went through the model and back."""

    frames: UInt8[np.ndarray, "n rows columns 3"]
    tokens: TokenizedClip


class Encoding:
    """A clip being tokenized: iterate over it for one `BlockResult` after the other, then ask for `tokens()`.

    Frames are read, tokenized and handed out block by block; nothing but the tokens is held.
    """

    def __init__(
        self,
        tokenizer: "ElasticTokenizer",
        clip: "_Clip",
        search: dict[str, Any],
        budget: Budget | None = None,
        metric: str | Metric = "mse",
    ):
        self._tokenizer, self._clip, self._search = tokenizer, clip, search
        self._budget = budget
        self._metric_name, self._metric = make_metric(metric)
        self._blocks: list[BlockTokens] = []
        self._finished = False
        self.is_image, self.rate, self.num_frames, self.source = (
            clip.is_image,
            clip.rate,
            clip.num_frames,
            clip.source,
        )
        self.num_blocks = -(-clip.num_frames // tokenizer.config.frames_per_block)
        if budget is None:  # what cannot be searched for is refused before the first frame is read
            make_search(**search)

    def __iter__(self) -> Iterator[BlockResult]:
        self._blocks = []
        tokenizer = self._tokenizer
        blocks = self._clip.blocks(tokenizer.config.frames_per_block)
        if self._budget is None:
            results = tokenizer.tokenize_blocks(blocks, self._search, metric=self._metric)
        else:
            results = spend(
                tokenizer.codec,
                tokenizer.weights,
                blocks,
                self._budget,
                width=tokenizer.search_width,
                restart=tokenizer.context == "restart",
                metric=self._metric,
            )
        for result in results:
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
            search=self._search_name(),
            window_blocks=tokenizer.window_blocks,
            context=tokenizer.context,
        )

    def _search_name(self) -> str:
        """What the token file says of how counts were found; losses other than squared errors are named."""
        search = self._search["name"] if self._budget is None else "budget"
        return search if self._metric is None else f"{search}:{self._metric_name}"


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

        Give one target: `threshold` (the largest mean squared error of a block, pixels in [-1, 1]) or `psnr` (the same in dB),
        `num_tokens` (the same for each block), or `avg_tokens` or `bitrate` (a budget, spent where it lowers the clip's error most). For
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
        psnr: float | None = None,
        num_tokens: int | None = None,
        avg_tokens: float | None = None,
        bitrate: float | None = None,
        metric: str | Metric = "mse",
        delay_blocks: int = 64,
        budget_counts: int = 16,
        search: str | None = None,
        rate: float | None = 24.0,
        max_frames: int | None = None,
        fallback_fraction: float = 1.0,
        max_fraction: float = 1.0,
        num_counts: int = 100,
    ) -> Encoding:
        """As `encode`, block by block.

        Args:
          psnr: decibels that every block reaches; 4 / 10^(psnr / 10) as a threshold.
          avg_tokens: tokens of a block in the mean, at most; `bitrate` is the same in kbit of tokens per second.
          metric: what a block's loss is, and `threshold` limits: 'mse', 'lpips' (mean of the frames), or a function of original and
            reconstruction (uint8, real frames only) that gives 0 or above, less being better.
          delay_blocks: with a budget, blocks that are held and split it; what comes later is not foreseen.
          budget_counts: with a budget, counts of each block that are measured to decide.
          search: 'binary', 'predict', 'linear' or 'fixed'; None: 'fixed' with `num_tokens`, else 'binary'.
          rate: frames per second to read from a file, and the rate of an array; None keeps a file's own.
          max_frames: read no more frames than this.
          fallback_fraction: share of a block's tokens kept when no count meets the threshold.
          max_fraction: share of a block's tokens that may be tried.
          num_counts: counts of the linear search.

        Raises:
          ValueError: the source cannot be read, or the options contradict each other.
        """
        clip = _Clip.open(source, self.config.resolution, rate, max_frames)
        targets = dict(
            threshold=threshold,
            psnr=psnr,
            num_tokens=num_tokens,
            avg_tokens=avg_tokens,
            bitrate=bitrate,
        )
        check_targets(targets, search)
        if psnr is not None and metric != "mse":
            raise ValueError(f"psnr={psnr} is of squared errors; give threshold= with {metric=}.")
        if psnr is not None:
            threshold = threshold_of_psnr(psnr)
        if bitrate is not None:
            avg_tokens = tokens_of_bitrate(bitrate, clip.rate, self.config)
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
        budget = None
        if avg_tokens is not None:
            budget = Budget(
                avg_tokens=avg_tokens,
                smallest=self.config.min_toks,
                largest=SearchOptions(
                    min_kept=self.config.min_toks,
                    max_kept=self.config.max_toks,
                    max_fraction=max_fraction,
                ).largest,
                delay_blocks=delay_blocks,
                num_counts=budget_counts,
            )
        return Encoding(self, clip, options, budget, metric)

    def tokenize_blocks(
        self,
        blocks: Iterable[UInt8[np.ndarray, "n rows columns 3"]],
        search: dict[str, Any],
        *,
        metric: Metric | None = None,
    ) -> Iterator[BlockResult]:
        """One result after the other; `search` are the arguments of `make_search`. Only the last block may be short."""
        past = self.codec.new_past()
        memory = Memory()  # of this clip alone, so that its tokens do not depend on other clips
        for number, frames in enumerate(blocks):
            if self.context == "restart" and number % self.window_blocks == 0:
                past = self.codec.new_past()
            past, result = tokenize_block(
                self.codec,
                self.weights,
                past,
                frames,
                make_search(memory=memory, **search),
                metric=metric,
            )
            yield result

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

"""`ElasticTokenizer`: clips to tokens and back."""

import copy
import functools
import itertools
import math
import os
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Literal, NamedTuple, cast

import jax
import numpy as np
from jax.sharding import Mesh
from jaxtyping import UInt8

from elastic import checkpoints
from elastic.config import ElasticTokConfig, parse_dtype
from elastic.distributed import mesh as meshes
from elastic.distributed.sharding import param_shardings
from elastic.media import MediaError
from elastic.metrics import Metric, make_metric
from elastic.ops import bf16_bits
from elastic.patches import unpatchify
from elastic.search import CurvePrior, SearchOptions, load_prior
from elastic.tokenizer.block_codec import Codec
from elastic.tokenizer.clip_source import ClipLike, open_clip
from elastic.tokenizer.session import EncodeSession, TokenizerContext, tokenize_side_by_side
from elastic.tokenizer.targets import check_targets, threshold_of_psnr, tokens_of_bitrate
from elastic.tokenizer.two_pass import Budget
from elastic.tokens import BlockTokens, TokenizedClip, read_token_stream
from elastic.tokens.same_weights import are_apart


class Reconstruction(NamedTuple):
    """A clip that went through the model and back."""

    frames: UInt8[np.ndarray, "n rows columns 3"]
    tokens: TokenizedClip


class ElasticTokenizer:
    """A model ready to tokenize: `encode`, `decode`, `reconstruct`.

    Args:
      config: the model.
      params: its parameter tree; kept in the type it has and cast where it is used.
      dtype: 'fp32' or 'bf16': type of products' operands and of the cache; sums are float32.
      mesh: where the arrays lie; None: `mesh_dim='!1,1,-1,1'` over all devices.
      window_blocks: blocks in one context, the current one included; None: `max_sequence_length` of the config.
      context: 'carry' lets the window slide, 'restart' empties it whenever it is full, as the released code does.
      search_width: counts of a block tried in one call.
      model_id: what token files call the model.
      prior: what guesses a clip's first counts for the search 'predict'; None: nothing.
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
        prior: CurvePrior | None = None,
    ):
        if context not in ("carry", "restart"):
            raise ValueError(f"context={context!r} must be 'carry' or 'restart'.")
        self.config, self.model_id, self.search_width = config, model_id, search_width
        self.prior = prior
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
        self._check_memory()
        # As the codec's programs take them.
        self.weights = jax.device_put(self.codec.stored(params), param_shardings(self.mesh, params))

    def with_params(
        self,
        params: dict[str, Any],
        *,
        mask_type: str | None = None,
        model_id: str | None = None,
        prior: CurvePrior | None = None,
    ) -> "ElasticTokenizer":
        """The same tokenizer with other weights, and their prior: both share the compiled programs, which two made anew would not."""
        other = copy.copy(self)
        other.__dict__.pop("_setting", None)
        other.config = self.config.replace(mask_type=mask_type or self.config.mask_type)
        other.model_id, other.prior = model_id or self.model_id, prior  # of these weights alone
        other.weights = jax.device_put(
            self.codec.stored(params), param_shardings(self.mesh, params)
        )
        return other

    @property
    def weights_digest(self) -> str:
        """SHA-256 of all parameters: what tells two models of one shape apart."""
        return self._setting.weights_digest

    @property
    def params(self) -> dict[str, Any]:
        """The parameter tree, in the types it was given in."""
        return jax.tree.map(bf16_bits.from_bits, self.weights)

    @classmethod
    def from_pretrained(
        cls,
        path_or_repo: str | os.PathLike,
        *,
        config: ElasticTokConfig | None = None,
        mesh_dim: str = "!1,1,-1,1",
        mesh: Mesh | None = None,
        model_id: str | None = None,
        **options: Any,
    ) -> "ElasticTokenizer":
        """Loads a model from a folder, a Hugging Face repository or a file such as 'params::FILE'.

        Args:
          config: needed where no config.json lies beside the weights.
          mesh_dim: how all devices are laid out; `mesh` says it of some.
          options: those of the class.

        Raises:
          ValueError: the weights cannot be found or read, or are of another model.
        """
        spec = os.fspath(path_or_repo)
        config = config or checkpoints.load_config(spec)
        if config is None:
            raise ValueError(
                f"{spec!r} has no config.json beside it; give `config=` (on the command line --load_elastic_config)."
            )
        params = checkpoints.load_params(spec, config)
        name = spec.rsplit("::", 1)[-1].rstrip("/")
        options = {"prior": load_prior(checkpoints.folder_of(spec))} | options
        mesh = meshes.make_mesh(mesh_dim) if mesh is None else mesh
        return cls(config, params, mesh=mesh, model_id=model_id or name, **options)

    def encode(self, source: ClipLike, **options: Any) -> TokenizedClip:
        """Tokens of a clip: a path, uint8 frames [frames, height, width, 3], or a picture [height, width, 3].

        Give one target: `threshold` (the largest mean squared error of a block, pixels in [-1, 1]) or `psnr` (the same in dB),
        `num_tokens` (the same for each block), or `avg_tokens` or `bitrate` (a budget, spent where it lowers the clip's error most). For
        the other options see `stream`.
        """
        encoding = self.stream(source, **options)
        for _ in encoding:  # the frames are not held
            pass
        return encoding.tokens()

    def reconstruct(self, source: ClipLike, **options: Any) -> Reconstruction:
        """Encodes and decodes a clip in one go; arguments as for `encode`."""
        encoding = self.stream(source, **options)
        frames = np.concatenate([result.reconstruction for result in encoding])
        return Reconstruction(frames, encoding.tokens())

    def encode_many(
        self,
        sources: Iterable[ClipLike],
        *,
        batch: int = 1,
        record: Callable[[int], str | os.PathLike] | None = None,
        **options: Any,
    ) -> Iterator[tuple[int, TokenizedClip | MediaError]]:
        """The tokens of several clips as they are finished, each with its number; of one that cannot be read, the error.

        Args:
          batch: clips that go through the model at once: as many as fill the device. Each has its own cache and its own search, and
            one that ends makes room for the next.
          record: names each clip's file of `stream`; what is there of another run is removed.
          options: those of `stream`, for every clip.

        Raises:
          ValueError: an option is wrong, or a budget is to be spent by more than one clip at once.
        """
        numbers: dict[EncodeSession, int] = {}
        bad: list[tuple[int, MediaError]] = []

        def opened() -> Iterator[EncodeSession]:
            for number, source in enumerate(sources):
                try:
                    encoding = self.stream(source, **options)
                    if record is not None and not encoding.has_budget:
                        encoding.open_fitting_record(
                            record(number), most_copied=math.inf if batch == 1 else 0
                        )
                except MediaError as error:
                    bad.append((number, error))
                    continue
                numbers[encoding] = number
                yield encoding

        for encoding, result in self.stream_many(opened(), batch=batch):
            yield from bad
            bad.clear()
            if isinstance(result, MediaError):
                yield numbers.pop(encoding), result
            elif result is None:
                yield numbers.pop(encoding), encoding.tokens()
        yield from bad

    def stream_many(
        self, encodings: Iterable[EncodeSession], *, batch: int = 1
    ) -> Iterator[tuple[EncodeSession, Any]]:
        """The blocks of several clips made by `stream`, as they are done; after a clip's last one None, or the error that ended it.

        Raises:
          ValueError: the mesh does not divide the batch, or a budget is to be spent by more than one clip at once.
        """
        shares = self.mesh.shape["dp"] * self.mesh.shape["fsdp"]
        if batch < 1 or (batch > 1 and batch % shares):
            raise ValueError(
                f"batch={batch} must be a multiple of dp * fsdp = {shares}: the devices share the clips."
            )
        encodings = iter(encodings)
        first = next(encodings, None)
        if first is None:
            return
        encodings = itertools.chain([first], encodings)
        if first.has_budget:
            if batch > 1:
                raise ValueError(
                    f"batch={batch}: a budget is spent clip by clip; leave out --batch, or give a threshold."
                )
            for encoding in encodings:
                try:
                    for result in encoding:
                        yield encoding, result
                except MediaError as error:
                    yield encoding, error
                else:
                    yield encoding, None
            return
        yield from tokenize_side_by_side(self._setting, encodings, batch=batch)

    def stream(
        self,
        source: ClipLike,
        *,
        threshold: float | None = None,
        psnr: float | None = None,
        num_tokens: int | None = None,
        avg_tokens: float | None = None,
        bitrate: float | None = None,
        metric: str | Metric = "mse",
        delay_blocks: int = 64,
        budget_counts: int = 24,
        search: str | None = None,
        rate: float | None = 24.0,
        max_frames: int | None = None,
        fallback_fraction: float = 1.0,
        max_fraction: float = 1.0,
        num_counts: int = 100,
        record: str | os.PathLike | None = None,
    ) -> EncodeSession:
        """As `encode`, block by block, in bounded memory: `for block in tokenizer.stream(reader, threshold=0.01)`.

        The source may also be a `ClipReader`, or any iterable of frames that come one by one, a camera's for instance.

        Args:
          psnr: decibels that every block reaches; 4 / 10^(psnr / 10) as a threshold.
          avg_tokens: tokens of a block in the mean, at most; `bitrate` is the same in kbit of tokens per second.
          metric: what a block's loss is, and `threshold` limits: 'mse', 'lpips' (mean of the frames), or a function of original and
            reconstruction (uint8, real frames only) that gives 0 or above, less being better.
          delay_blocks: with a budget, blocks that are held and split it; what comes later is not foreseen.
          budget_counts: with a budget, counts of each block that are measured to decide.
          search: 'predict', 'binary', 'linear' or 'fixed'; None: 'fixed' with `num_tokens`, else 'predict'.
          rate: frames per second to read from a file, and the rate of an array; None keeps a file's own.
          max_frames: read no more frames than this.
          fallback_fraction: share of a block's tokens kept when no count meets the threshold.
          max_fraction: share of a block's tokens that may be tried.
          num_counts: counts of the linear search.
          record: a file to which every block is added when it is done. A run that finds an unfinished one of the same clip and
            options goes on after it; `decode_stream` reads it, also while it grows.

        Raises:
          ValueError: the source cannot be read, or the options contradict each other.
        """
        clip = open_clip(source, self.config.resolution, rate=rate, max_frames=max_frames)
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
        options = dict(
            name=search or ("predict" if num_tokens is None else "fixed"),
            min_kept=self.config.min_toks if num_tokens is None else 1,
            max_kept=self.config.max_toks,
            threshold=threshold,
            num_tokens=num_tokens,
            fallback_fraction=fallback_fraction,
            max_fraction=max_fraction,
            num_counts=num_counts,
            width=self.search_width if num_tokens is None else 1,
        )

        def make_budget(mean: float) -> Budget:
            limits = SearchOptions(
                min_kept=self.config.min_toks,
                max_kept=self.config.max_toks,
                max_fraction=max_fraction,
            )
            return Budget(
                avg_tokens=mean,
                smallest=limits.min_kept,
                largest=limits.largest,
                delay_blocks=delay_blocks,
                num_counts=budget_counts,
            )

        budget = None if avg_tokens is None else make_budget(avg_tokens)
        if bitrate is not None:
            try:  # the same bitrate may be too low for one clip and right for another
                budget = make_budget(tokens_of_bitrate(bitrate, clip.rate, self.config))
            except ValueError as error:
                raise MediaError(f"{_name(source)} cannot have {bitrate=}: {error}") from error
        encoding = EncodeSession(
            self._setting, clip, options, budget=budget, metric=make_metric(metric)
        )
        if record is not None:
            encoding.open_record(record)
        return encoding

    def decode(self, tokens: TokenizedClip) -> UInt8[np.ndarray, "frames rows columns 3"]:
        """The frames of a token record; a picture is a clip of one frame."""
        return np.concatenate(list(self.decode_stream(tokens)))

    def decode_stream(
        self,
        tokens: TokenizedClip | str | os.PathLike,
        *,
        follow: bool = False,
        patience: float | None = None,
    ) -> Iterator[UInt8[np.ndarray, "n rows columns 3"]]:
        """The frames of a token record, block by block, the last one trimmed to its true length.

        Args:
          tokens: a record, or the file that `stream(record=...)` writes, finished or not.
          follow: of such a file, wait for the blocks that are still to come.
          patience: seconds to wait for one; None: for ever.

        Raises:
          ValueError: the tokens were made by a model of another shape, or the file cannot be read.
        """
        if isinstance(tokens, TokenizedClip):
            header, left = vars(tokens), tokens.num_frames
            per_block = tokens.frames_per_block
            lengths = (min(per_block, left - i * per_block) for i in range(len(tokens.blocks)))
            blocks: Iterable[tuple[BlockTokens, int]] = zip(tokens.blocks, lengths, strict=True)
        else:
            header, recorded = read_token_stream(tokens, follow=follow, patience=patience)
            blocks = ((block.tokens, block.num_frames) for block in recorded)
        return self._decode(header, blocks)

    def _decode(
        self, header: dict[str, Any], blocks: Iterable[tuple[BlockTokens, int]]
    ) -> Iterator[np.ndarray]:
        config, codec = self.config, self.codec
        self._check_maker(header)
        window = header["window_blocks"]
        if window != codec.window_blocks:
            codec = Codec(config, dtype=codec.dtype, mesh=self.mesh, window_blocks=window)
        cache = codec.new_decoder_cache()
        for number, (block, num_frames) in enumerate(blocks):
            if header["context"] == "restart" and number % window == 0:
                cache = codec.new_decoder_cache()
            full = np.zeros(
                (1, config.tokens_per_block, *block.values.shape[1:]), block.values.dtype
            )
            _check_values(block, number, config)
            full[0, : block.num_kept] = block.values
            cache, pixels = codec.decode(
                self.weights, cache, full, np.array([block.num_kept], np.int32)
            )
            size = (config.resolution, config.resolution)
            frames = np.asarray(unpatchify(np.asarray(pixels[0]), config.patch_size, *size))
            yield frames[:num_frames]

    def _check_maker(self, header: dict[str, Any]) -> None:
        """Refuses tokens of another model, or of other weights."""
        config, maker = self.config, f"These tokens were made by {header.get('model_id')!r}"
        if header.get("config_hash") != config.config_hash():
            raise ValueError(
                f"{maker} (config {header.get('config_hash')}), this model is "
                f"{self.model_id!r} (config {config.config_hash()}); load the model that made them."
            )
        weights = header.get("weights")
        if weights and are_apart(weights, self._setting.fingerprint):
            raise ValueError(
                f"{maker}, whose weights were others than those of {self.model_id!r} as it is now; load the model that made them."
            )
        for name in ("resolution", "tokens_per_block", "frames_per_block", "bottleneck_type"):
            if header.get(name) != getattr(config, name):
                raise ValueError(
                    f"These tokens say {name}={header.get(name)!r}, but their model has {getattr(config, name)!r}; "
                    "tokenize the clip again."
                )

    def _check_memory(self) -> None:
        """Refuses a cache that cannot fit, before it is allocated."""
        shards = 1 if meshes.platform_of(self.mesh) == "cpu" else self.codec.cache_shards()
        needed, limit = self.codec.cache_bytes() // shards, meshes.memory_limit(self.mesh)
        if limit is not None and needed > limit:
            most = 1 + int((self.window_blocks - 1) * limit / needed)
            raise ValueError(
                f"A cache of {self.window_blocks - 1} blocks takes {needed / 1e9:.1f} GB, and there are {limit / 1e9:.1f}; hold "
                f"fewer than {most} blocks (window_blocks=, on the command line --max_blocks_per_chunk), or split it over more devices."
            )

    @functools.cached_property
    def _setting(self) -> TokenizerContext:
        return TokenizerContext(self.codec, self.weights, self.model_id, self.context, self.prior)


def _check_values(block: BlockTokens, number: int, config: ElasticTokConfig) -> None:
    """Refuses tokens that the model has none of."""
    width, largest = block.values.shape[1:], None if block.indices is None else block.indices.max()
    if width and width != (config.code_dim,):
        raise ValueError(
            f"Block {number} holds vectors of {width[0]} numbers; the model's have {config.code_dim}."
        )
    if largest is not None and largest >= config.codebook_size:
        raise ValueError(
            f"Block {number} holds index {largest}; the model's codes end at {config.codebook_size - 1}."
        )


def _name(source: ClipLike) -> str:
    """What a message calls a clip."""
    return repr(os.fspath(source)) if isinstance(source, (str, os.PathLike)) else "The clip"

"""`ElasticTokenizer`: clips to tokens and back."""

import copy
import functools
import itertools
import logging
import math
import os
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from typing import Any, Literal, NamedTuple, TypeVar, Unpack, cast

import jax
import numpy as np
from jax.sharding import Mesh
from jaxtyping import UInt8

from elastic import checkpoints, media
from elastic.config import ElasticTokConfig, check_resolution, parse_dtype
from elastic.distributed import mesh as meshes
from elastic.distributed.sharding import param_shardings
from elastic.io.names import model_name, suggest_arguments
from elastic.io.read_options import read_arguments
from elastic.media import MediaError
from elastic.media.location import is_place
from elastic.metrics import Metric
from elastic.ops import bf16_bits
from elastic.search import CurvePrior, load_prior
from elastic.tiles import FrameLayout, crop_message
from elastic.tokenizer import array_batch, arrays, hub
from elastic.tokenizer.array_batch import TokenBatch
from elastic.tokenizer.block_codec import Codec
from elastic.tokenizer.clip_source import Ahead, ClipLike, open_clip
from elastic.tokenizer.decoder import blocks_of, check_maker, decode_blocks
from elastic.tokenizer.result import BlockResult
from elastic.tokenizer.scheduler import check_batch
from elastic.tokenizer.session import (
    EncodeSession,
    Progress,
    TokenizerContext,
    tokenize_side_by_side,
)
from elastic.tokenizer.targets import EncodeArguments, EncodeOptions
from elastic.tokenizer.two_pass import Budget
from elastic.tokens import TokenizedClip, layout_in, read_token_stream
from elastic.tokens.any_file import load_clip

log = logging.getLogger(__name__)
_T = TypeVar("_T")


class Reconstruction(NamedTuple):
    """A clip that went through the model and back."""

    frames: UInt8[np.ndarray, "n rows columns 3"]
    tokens: TokenizedClip


class ElasticTokenizer:
    """A model ready to tokenize: `encode`, `decode`, `reconstruct`.

    Args:
      config: the model.
      params: its parameter tree, kept in the type it has and cast where it is used; or a function that loads it, which is called
        when all options are checked.
      dtype: 'fp32' or 'bf16': type of products' operands and of the cache; sums are float32.
      mesh: where the arrays lie; None: `mesh_dim='!1,1,-1,1'` over all devices.
      window_blocks: blocks in one context, the current one included; None: `max_sequence_length` of the config.
      context: 'carry' lets the window slide, 'restart' empties it whenever it is full, as the released code does.
      search_width: counts of a block tried in one call.
      model_id: what token files call the model; of an absolute path, its last names (`elastic.io.names.model_name`).
      prior: what guesses a clip's first counts for the search 'predict'; None: nothing.
    """

    def __init__(
        self,
        config: ElasticTokConfig,
        params: dict[str, Any] | Callable[[], dict[str, Any]],
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
        if search_width < 1:
            raise ValueError(f"{search_width=} must be at least 1 count per call.")
        self.config, self.search_width = config, search_width
        self.model_id = model_name(model_id)
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
        params = params() if callable(params) else params
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
        other.__dict__.pop("_context", None)
        other.config = self.config.replace(mask_type=mask_type or self.config.mask_type)
        other.model_id = model_name(model_id or self.model_id)
        other.prior = prior  # of these weights alone
        other.weights = jax.device_put(
            self.codec.stored(params), param_shardings(self.mesh, params)
        )
        return other

    @property
    def weights_digest(self) -> str:
        """SHA-256 of all parameters: what tells two models of one shape apart."""
        return self._context.weights_digest

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
        load = functools.partial(checkpoints.load_params, spec, config)
        options = {"prior": load_prior(checkpoints.folder_of(spec))} | options
        mesh = meshes.make_mesh(mesh_dim) if mesh is None else mesh
        return cls(config, load, mesh=mesh, model_id=model_id or spec, **options)

    @suggest_arguments
    def encode(
        self,
        source: ClipLike,
        *,
        threshold: float | None = None,
        psnr: float | None = None,
        num_tokens: int | None = None,
        avg_tokens: float | None = None,
        bitrate: float | None = None,
        metric: str | Metric = EncodeOptions.metric,
        delay_blocks: int = EncodeOptions.delay_blocks,
        budget_counts: int = EncodeOptions.budget_counts,
        search: str | None = None,
        rate: float | None = EncodeOptions.rate,
        max_frames: int | None = None,
        reader: str = EncodeOptions.reader,
        exact_color: bool = EncodeOptions.exact_color,
        fit: str = EncodeOptions.fit,
        resolution: int | None = None,
        tile_overlap: int | None = None,
        fallback_fraction: float = EncodeOptions.fallback_fraction,
        max_fraction: float = EncodeOptions.max_fraction,
        num_counts: int = EncodeOptions.num_counts,
        search_tolerance: float = EncodeOptions.search_tolerance,
        value_range: tuple[float, float] | None = None,
        layout: str | None = None,
        batch: int = 1,
        progress: bool = False,
    ) -> TokenizedClip:
        """Tokens of a clip: a path, a URL, bytes, a file object, a picture of Pillow, or an array of NumPy, jax or torch.

        An array is uint8 [frames, height, width, 3], or a picture [height, width, 3]; floats need `value_range`, other axes `layout`.
        Give one target: `threshold` (the largest mean squared error of a block, pixels in [-1, 1]) or `psnr` (the same in dB),
        `num_tokens` (the same for each block), or `avg_tokens` or `bitrate` (a budget, spent where it lowers the clip's error most).
        The other arguments are those of `stream`, which documents them all.
        """
        options = EncodeOptions(
            threshold=threshold,
            psnr=psnr,
            num_tokens=num_tokens,
            avg_tokens=avg_tokens,
            bitrate=bitrate,
            metric=metric,
            delay_blocks=delay_blocks,
            budget_counts=budget_counts,
            search=search,
            rate=rate,
            max_frames=max_frames,
            reader=reader,
            exact_color=exact_color,
            fit=fit,
            resolution=resolution,
            tile_overlap=tile_overlap,
            fallback_fraction=fallback_fraction,
            max_fraction=max_fraction,
            num_counts=num_counts,
            search_tolerance=search_tolerance,
        )
        session = self.open_session(_converted(source, value_range, layout), options, batch=batch)
        for _ in _shown(session, progress):  # frames of a block are dropped when the next one comes
            pass
        return session.tokens()

    @suggest_arguments
    def reconstruct(
        self,
        source: ClipLike,
        *,
        value_range: tuple[float, float] | None = None,
        layout: str | None = None,
        batch: int = 1,
        progress: bool = False,
        **options: Unpack[EncodeArguments],
    ) -> Reconstruction:
        """Encodes and decodes a clip in one go; arguments as for `encode`."""
        clip = _converted(source, value_range, layout)
        session = self.open_session(clip, EncodeOptions(**options), batch=batch)
        frames = np.concatenate([result.reconstruction for result in _shown(session, progress)])
        return Reconstruction(frames, session.tokens())

    @suggest_arguments
    def stream(
        self,
        source: ClipLike,
        *,
        threshold: float | None = None,
        psnr: float | None = None,
        num_tokens: int | None = None,
        avg_tokens: float | None = None,
        bitrate: float | None = None,
        metric: str | Metric = EncodeOptions.metric,
        delay_blocks: int = EncodeOptions.delay_blocks,
        budget_counts: int = EncodeOptions.budget_counts,
        search: str | None = None,
        rate: float | None = EncodeOptions.rate,
        max_frames: int | None = None,
        reader: str = EncodeOptions.reader,
        exact_color: bool = EncodeOptions.exact_color,
        fit: str = EncodeOptions.fit,
        resolution: int | None = None,
        tile_overlap: int | None = None,
        fallback_fraction: float = EncodeOptions.fallback_fraction,
        max_fraction: float = EncodeOptions.max_fraction,
        num_counts: int = EncodeOptions.num_counts,
        search_tolerance: float = EncodeOptions.search_tolerance,
        record: str | os.PathLike | None = None,
        value_range: tuple[float, float] | None = None,
        layout: str | None = None,
        batch: int = 1,
    ) -> EncodeSession:
        """As `encode`, block by block, in bounded memory: `for block in tokenizer.stream(reader, threshold=0.01)`.

        Give exactly one of `threshold`, `psnr`, `num_tokens`, `avg_tokens` and `bitrate`.

        Args:
          source: a clip as for `encode`, a `ClipReader`, or any iterable of frames that arrive one by one, such as a camera's.
          threshold: the largest mean squared error of a block, pixels in [-1, 1].
          psnr: the PSNR in dB that every block reaches: a threshold of 4 / 10^(psnr / 10).
          num_tokens: tokens of every block.
          avg_tokens: mean tokens of a block, at most.
          bitrate: the same in kbit of tokens per second.
          metric: the loss of a block, which `threshold` limits: 'mse', 'lpips' (mean over the frames), or a function of original
            and reconstruction (uint8 [n, rows, columns, 3], real frames only) whose value is 0 or above, less being better.
          delay_blocks: with a budget, the number of blocks that are held in memory and share it; later blocks are not foreseen.
          budget_counts: with a budget, the number of counts of each block that are measured.
          search: 'predict', 'binary', 'linear' or 'fixed'; None: 'fixed' with `num_tokens`, else 'predict'.
          rate: frames per second to read from a file, and the rate of an array; None keeps a file's own.
          max_frames: read no more frames than this; None: all.
          reader: who decodes a video file: 'pyav', or 'decord' where it is installed.
          exact_color: convert the colours of every video file with correct rounding.
          fit: what becomes of frames that are not square: 'crop' takes the middle; 'pad' takes all, with the border of the frame
            repeated around it; 'stretch' squeezes all into a square; 'tile' covers all with squares that overlap, each a clip of its
            own. Decoding gives the shape back.
          resolution: with 'tile', the short side in pixels that frames are scaled to; 0: the clip's own; None: the model's.
          tile_overlap: with 'tile', pixels that neighbouring tiles share at least; None: an eighth of a tile.
          fallback_fraction: share of a block's tokens kept where no count meets the threshold.
          max_fraction: share of a block's tokens that may be tried.
          num_counts: counts that the search 'linear' spreads over the range.
          search_tolerance: share of a clip's tokens that the search 'predict' may keep beyond need, to save passes; 0: none.
          record: a file that holds the tokens of every block as soon as it is tokenized. A second call with the same arguments
            resumes after its last block; it must find the same tokens.
          value_range: what the floats of an array mean, (0, 1) or (-1, 1): it is never guessed. None for uint8.
          layout: the axes of an array, such as 'TCHW' (T frames, C channels, H rows, W columns); None: channels last, or first
            where the last axis cannot be them.
          batch: with 'tile', the tiles that go through the model at once: as many as fill the device.

        Raises:
          ValueError: the source cannot be read, or the options contradict each other.
          TypeError: an argument is unknown; the message suggests a known one.
        """
        options = EncodeOptions(
            threshold=threshold,
            psnr=psnr,
            num_tokens=num_tokens,
            avg_tokens=avg_tokens,
            bitrate=bitrate,
            metric=metric,
            delay_blocks=delay_blocks,
            budget_counts=budget_counts,
            search=search,
            rate=rate,
            max_frames=max_frames,
            reader=reader,
            exact_color=exact_color,
            fit=fit,
            resolution=resolution,
            tile_overlap=tile_overlap,
            fallback_fraction=fallback_fraction,
            max_fraction=max_fraction,
            num_counts=num_counts,
            search_tolerance=search_tolerance,
        )
        session = self.open_session(_converted(source, value_range, layout), options, batch=batch)
        if record is not None:
            session.open_resume_log(record)
        return session

    def open_session(
        self, source: ClipLike, options: EncodeOptions, *, batch: int = 1
    ) -> EncodeSession:
        """As `stream`, with the options as one record.

        Args:
          source: the clip.
          options: what is read of it, and how its tokens are chosen.
          batch: tiles that go through the model at once where the session is iterated over.

        Raises:
          ValueError: the source cannot be read, or the options do not fit the model.
        """
        if options.fit != "tile":
            check_resolution(options.resolution or 0, self.config)
        else:
            check_batch(batch, self.mesh)
        clip = open_clip(
            source,
            self.config.resolution,
            rate=options.rate,
            max_frames=options.max_frames,
            **read_arguments(options),
        )
        if clip.layout.fit == "crop":
            _tell_crop(clip.source, self.config.resolution)
        if clip.layout.num_tiles > 1:
            frames = self.config.frames_per_block
            blocks = None if clip.num_frames is None else -(-clip.num_frames // frames)
            per_tile = self._check_tiles(_name(source), clip.layout, blocks, batch=batch)
            _tell_tiles(clip.layout, per_tile)
        try:
            budget = Budget.of(options, self.config, rate=clip.rate, tiles=clip.layout.num_tiles)
        except ValueError as error:
            if options.bitrate is None:
                raise
            # The same bitrate may be too low for one clip and right for another.
            raise MediaError(
                f"{_name(source)} cannot have bitrate={options.bitrate}: {error}"
            ) from error
        return EncodeSession(self._context, clip, options, budget=budget, batch=batch)

    @suggest_arguments
    def encode_many(
        self,
        sources: Iterable[ClipLike],
        *,
        batch: int = 1,
        record: Callable[[int], str | os.PathLike] | None = None,
        **options: Unpack[EncodeArguments],
    ) -> Iterator[tuple[int, TokenizedClip | MediaError]]:
        """The tokens of several clips as they are finished, each with its number; for a clip that cannot be read, the error.

        Args:
          sources: the clips; one is opened when its turn comes.
          batch: clips, or tiles of clips, that go through the model at once: as many as fill the device. Each has its own cache and
            its own search, and the next clip takes the place of one that ends.
          record: names each clip's file of `stream`; a file of another run is replaced.
          options: those of `stream`, for every clip.

        Raises:
          ValueError: an option is wrong, or a budget is to be spent by more than one clip at once.
        """
        return self.encode_each(sources, EncodeOptions(**options), batch=batch, record=record)

    def encode_each(
        self,
        sources: Iterable[ClipLike],
        options: EncodeOptions,
        *,
        batch: int = 1,
        record: Callable[[int], str | os.PathLike] | None = None,
        early: bool = False,
    ) -> Iterator[tuple[int, TokenizedClip | MediaError]]:
        """As `encode_many`, with the options as one record.

        With `early`, the next source is taken, opened and read in a thread while the model is still at those before.
        """
        numbers: dict[EncodeSession, int] = {}
        unreadable: deque[tuple[int, MediaError]] = deque()

        def opened() -> Generator[EncodeSession]:
            for number, source in enumerate(sources):
                try:
                    session = self.open_session(source, options)
                    if record is not None and not session.has_budget:
                        session.open_or_replace_resume_log(
                            record(number), max_snapshot_block=math.inf if batch == 1 else 0
                        )
                except MediaError as error:
                    unreadable.append((number, error))
                    continue
                numbers[session] = number
                if early:
                    session.read_ahead()
                yield session

        sessions = Ahead(opened(), 1) if early else opened()
        try:
            for session, result in self.stream_many(sessions, batch=batch):
                while unreadable:
                    yield unreadable.popleft()
                if isinstance(result, MediaError):
                    yield numbers.pop(session), result
                elif result is None:
                    yield numbers.pop(session), session.tokens()
            yield from unreadable
        finally:
            sessions.close()
            for session in numbers:  # opened early, and not begun
                session.close()

    def stream_many(
        self, sessions: Iterable[EncodeSession], *, batch: int = 1
    ) -> Iterator[Progress]:
        """The blocks of several clips as they are done; after a clip's last block None, or the error that ended it.

        Args:
          sessions: the clips, as `stream` gives them.
          batch: clips, or tiles of clips, that go through the model at once.

        Raises:
          ValueError: the mesh does not divide the batch, or a budget is to be spent by more than one clip at once.
        """
        check_batch(batch, self.mesh)
        sessions = iter(sessions)
        first = next(sessions, None)
        if first is None:
            return
        check_batch(batch, self.mesh, has_budget=first.has_budget)
        sessions = itertools.chain([first], sessions)
        if not first.has_budget:
            yield from tokenize_side_by_side(self._context, sessions, batch=batch)
            return
        for session in sessions:
            try:
                for result in session:
                    yield session, result
            except MediaError as error:
                yield session, error
            else:
                yield session, None

    @suggest_arguments
    def encode_batch(
        self,
        videos: Any,
        *,
        batch: int | None = None,
        value_range: tuple[float, float] | None = None,
        layout: str | None = None,
        **options: Unpack[EncodeArguments],
    ) -> TokenBatch:
        """The tokens of several clips of one length, as arrays: padded ids, mask and counts.

        Args:
          videos: an array [clips, frames, height, width, 3], or a list of arrays.
          batch: clips that go through the model at once; None: all.
          value_range, layout: as for `stream`.
          options: those of `stream`, for every clip.

        Raises:
          ValueError: the clips differ in length, or an option is wrong.
        """
        fit = options.get("fit", "crop")
        if fit != "crop":
            raise ValueError(
                f"{fit=} needs a record of the frames' shape, which a batch of arrays has not; call encode_many, or use fit='crop'."
            )
        clips = array_batch.clips_of(videos, value_range=value_range, layout=layout)
        found: dict[int, TokenizedClip] = {}
        for number, tokens in self.encode_many(clips, batch=batch or len(clips), **options):
            if isinstance(tokens, MediaError):
                raise tokens
            found[number] = tokens
        return TokenBatch.of([found[number] for number in range(len(clips))])

    def decode_batch(
        self, ids: Any, counts: Any, *, num_frames: int | None = None
    ) -> UInt8[np.ndarray, "clips frames rows columns 3"]:
        """The frames of a batch of tokens, all clips at once; `encode_batch` gives such a batch.

        Args:
          ids: int [clips, blocks, tokens_per_block] (FSQ), or float32 vectors [clips, blocks, tokens_per_block, d] (VAE), of NumPy,
            jax or torch. What stands after a block's tokens is not read.
          counts: int [clips, blocks], the tokens of each block.
          num_frames: frames of each clip; None: whole blocks.

        Raises:
          ValueError: the arrays do not fit each other or the model.
        """
        return array_batch.decode_batch(
            self.codec, self.weights, ids, counts, num_frames=num_frames
        )

    def save_pretrained(self, folder: str | os.PathLike, *, float_dtype: Any = None) -> None:
        """Writes config.json, model.safetensors, and curves.json if there is a prior, for `from_pretrained(folder)`.

        Args:
          folder: is made if it is missing.
          float_dtype: type of the floats: 'fp32', 'bf16', 'fp16' or 'fp8'; None keeps theirs.
        """
        hub.save_pretrained(self._saved, folder, float_dtype=float_dtype)

    @suggest_arguments
    def push_to_hub(
        self,
        repo_id: str,
        *,
        private: bool = False,
        token: str | None = None,
        revision: str | None = None,
        commit_message: str | None = None,
        float_dtype: Any = None,
        run: str | os.PathLike | None = None,
        card: str | None = None,
    ) -> str:
        """Uploads the model to Hugging Face, for `from_pretrained(repo_id)`; gives the address of the commit.

        Args:
          repo_id: 'owner/name'; the repository is made if there is none.
          private: whether a new repository is private.
          token: of the account; None: the one of `hf auth login`.
          revision: a branch; None: the main one.
          commit_message: None: one that names the model.
          float_dtype: as for `save_pretrained`.
          run: the folder of the training run, whose last measurements go into the card; None: no measurements.
          card: text of the card; None: one made from the model and the run, unless the repository has a card, which stays.

        Raises:
          ValueError: the name is no repository's, or there is no such run.
        """
        return hub.push_to_hub(
            self._saved,
            repo_id,
            private=private,
            token=token,
            revision=revision,
            commit_message=commit_message,
            float_dtype=float_dtype,
            run=run,
            card=card,
        )

    def decode(
        self, tokens: TokenizedClip | str | os.PathLike, *, progress: bool = False, batch: int = 1
    ) -> UInt8[np.ndarray, "frames rows columns 3"]:
        """The frames of a token record or of its file; a picture is a clip of one frame.

        Args:
          tokens: a record, or a file: tokens.npz, tokens.part, or a shard of one clip.
          progress: show a bar.
          batch: tiles of a block that go through the model at once.
        """
        if not isinstance(tokens, TokenizedClip):
            tokens = load_clip(tokens) or tokens
        total = tokens.num_blocks if isinstance(tokens, TokenizedClip) else None
        blocks = self.decode_stream(tokens, batch=batch)
        return np.concatenate(list(_bar(blocks, progress, total)))

    def decode_stream(
        self,
        tokens: TokenizedClip | str | os.PathLike,
        *,
        follow: bool = False,
        patience: float | None = None,
        batch: int = 1,
    ) -> Iterator[UInt8[np.ndarray, "n rows columns 3"]]:
        """The frames of a token record, block by block, the last one trimmed to its true length.

        Args:
          tokens: a record, a file as for `decode`, or the one that `stream(record=...)` writes, finished or not.
          follow: of such a file, wait for the blocks that are still to come.
          patience: seconds to wait for one; None: for ever.
          batch: tiles of a block that go through the model at once.

        Raises:
          ValueError: the tokens were made by a model of another shape, or the file cannot be read.
        """
        if not isinstance(tokens, TokenizedClip) and not follow:
            tokens = load_clip(tokens) or tokens
        if isinstance(tokens, TokenizedClip):
            header, blocks = vars(tokens), blocks_of(tokens)
            num_blocks = tokens.num_blocks
        else:
            header, recorded = read_token_stream(tokens, follow=follow, patience=patience)
            blocks = ((block.tokens, block.num_frames) for block in recorded)
            frames = header.get("num_frames")  # None where they arrived one by one
            num_blocks = -(-frames // self.config.frames_per_block) if frames else None
        layout = layout_in(header)
        if layout.num_tiles > 1:
            self._check_tiles("The clip", layout, num_blocks, batch=batch, decoding=True)
        check_maker(
            header,
            self.config,
            model_id=self.model_id,
            fingerprint=self._context.fingerprint,
        )
        yield from decode_blocks(
            self.codec,
            self.weights,
            blocks,
            window_blocks=header["window_blocks"],
            context=header["context"],
            num_blocks=num_blocks,
            layout=layout,
            batch=batch,
        )

    @property
    def _saved(self) -> hub.Model:
        return hub.Model(self.config, self.params, self.prior, self.model_id)

    def __repr__(self) -> str:
        config = self.config
        return (
            f"ElasticTokenizer({self.model_id!r}: {config.bottleneck_type}, {config.min_toks} to {config.max_toks} tokens per block "
            f"of {config.frames_per_block} frames at {config.resolution}x{config.resolution}, {self.window_blocks} blocks of context, "
            f"{self.codec.dtype})"
        )

    def _check_tiles(
        self,
        name: str,
        layout: FrameLayout,
        num_blocks: int | None,
        *,
        batch: int,
        decoding: bool = False,
    ) -> int:
        """The bytes of a tile's KV cache. Caches of all tiles that cannot fit are refused before the first one is allocated.

        Args:
          name: what a message calls the clip.
          layout: has the tiles.
          num_blocks: blocks of the clip; None: not known.
          batch: tiles that go through the model at once.
          decoding: whether the decoder alone has a cache.
        """
        config = self.config
        per_tile = self.codec.cached_blocks(num_blocks) * self.codec.trial_bytes()
        if decoding:
            layers = config.num_decoder_layers, config.num_encoder_layers
            per_tile = per_tile * layers[0] // sum(layers)
        caches = -(-layout.num_tiles // batch) * batch  # one program takes as many at once
        shards = 1 if meshes.platform_of(self.mesh) == "cpu" else self.codec.cache_shards()
        needed, limit = caches * per_tile, meshes.memory_limit(self.mesh)
        if limit is not None and needed > limit * shards:
            raise MediaError(
                f"{name} has {layout.num_tiles} tiles, whose caches take {per_tile / 1e6:,.1f} MB each, {needed / 1e9:.1f} GB in all, "
                f"and there are {limit * shards / 1e9:.1f}; give a smaller resolution=, hold fewer blocks (window_blocks=, on the "
                "command line --max_blocks_per_chunk), or split them over more devices."
            )
        return per_tile

    @functools.cached_property
    def _context(self) -> TokenizerContext:
        return TokenizerContext(
            codec=self.codec,
            weights=self.weights,
            model_id=self.model_id,
            when_full=self.context,
            search_width=self.search_width,
            prior=self.prior,
        )


def _converted(
    source: ClipLike, value_range: tuple[float, float] | None, layout: str | None
) -> ClipLike:
    """The source with arrays as uint8 frames."""
    if value_range is None and layout is None:
        return source
    if arrays.is_array(source):
        return arrays.as_frames(source, value_range=value_range, layout=layout)
    if is_place(source) or not isinstance(source, Iterable):
        raise ValueError(
            f"value_range= and layout= are for arrays; {_name(source)} is none. Leave them out."
        )
    return arrays.as_live_frames(source, value_range=value_range, layout=layout)


def _shown(session: EncodeSession, progress: bool) -> Iterator[BlockResult]:
    """The blocks of a session, under a bar if one is asked for."""
    return _bar(session, progress, session.num_blocks)


def _bar(items: Iterable[_T], progress: bool, total: int | None) -> Iterator[_T]:
    if not progress:
        return iter(items)
    from tqdm.auto import tqdm

    return iter(tqdm(items, total=total, unit="block"))


@functools.cache
def _tell_crop(source: tuple[int, int], resolution: int) -> None:
    """Says once for each size what is left of a frame that is not square."""
    message = crop_message(source, resolution)
    if message is not None:
        log.info("%s", message)


@functools.cache
def _tell_tiles(layout: FrameLayout, bytes_per_tile: int) -> None:
    """Says once for each layout what becomes of a frame."""
    total = layout.num_tiles * bytes_per_tile
    caches = f"; their KV caches take {total / 1e6:,.0f} MB ({bytes_per_tile / 1e6:,.1f} MB a tile)"
    log.info(
        "%dx%d: %d tiles of %dx%d (%d by %d)%s",
        *layout.frame,
        layout.num_tiles,
        layout.tile,
        layout.tile,
        len(layout.lefts),
        len(layout.tops),
        caches if total else "",
    )


def _name(source: ClipLike) -> str:
    """What a message calls a clip."""
    if isinstance(source, media.ClipLocation):
        return repr(str(source))
    return repr(os.fspath(source)) if isinstance(source, (str, os.PathLike)) else "The clip"

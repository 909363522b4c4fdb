"""Every option of the model, its default and its check; presets.

`ElasticTokConfig` keeps the field names of the released system: users type them in
`--update_elastic_config`, and `config.json` files hold them. Derived numbers are properties.
"""

import dataclasses
import difflib
import hashlib
import json
import logging
import math
import os
import pathlib
import typing
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal

from elastic.io.literals import parse_dict

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

log = logging.getLogger(__name__)

# Names of jax.checkpoint policies that `remat_*` accepts; '' switches rematerialization off.
REMAT_POLICIES = (
    "",
    "everything_saveable",
    "nothing_saveable",
    "dots_saveable",
    "checkpoint_dots",
    "dots_with_no_batch_dims_saveable",
    "checkpoint_dots_with_no_batch_dims",
)
_MODEL_TYPE = "elastic_tok"  # what transformers calls a model of this kind
_OLD_NAMES = {"mask_mode": "mask_type"}
_IGNORED = ("mesh_dim", "return_feats")


@dataclasses.dataclass(frozen=True, kw_only=True)
class ElasticTokConfig:
    """The shape of an ElasticTok model and how it is computed.

    Raises:
      ValueError: an option is unknown (the message suggests the nearest known name), has the wrong
        type, or contradicts another one.
    """

    # The transformer.
    hidden_size: int = 1024
    intermediate_size: int = 2048
    num_encoder_layers: int = 10
    num_decoder_layers: int = 10
    num_attention_heads: int = 8
    rms_norm_eps: float = 1e-5
    initializer_range: float = 0.02
    theta: float = 5e7  # base of the rotary angles
    max_sequence_length: int = 16384  # tokens of one training sequence
    # Blocks and tokens.
    frames_per_block: int = 4
    patch_size: tuple[int, int, int] = (1, 8, 8)  # frames, rows, columns
    min_toks: int = 256
    max_toks: int = 4096  # tokens per block; fixes the resolution
    mask_type: str = "elastic"  # or 'fixed_F': keep the share F of every block
    condition_encoder: bool = (
        True  # the encoder sees which tokens will be kept; False: it runs once for all counts
    )
    # Options that the released models do not have.
    condition_decoder: bool = False  # the decoder sees which tokens are kept
    # Of the patches of a slice; 'adaptive': the groups of patches that have more to say send more tokens.
    token_order: Literal["raster", "coarse_to_fine", "adaptive"] = "raster"
    rope: Literal["1d", "3d"] = "1d"  # positions: the token's number, or its time, row and column
    rope_split: tuple[
        int, ...
    ] = ()  # '3d': channel pairs for time, rows, columns; (): 1/4, 3/8, 3/8
    rope_bases: tuple[int, ...] = (1000, 100, 100)  # '3d': takes the place of theta
    lapped_input: bool = False  # every token sees twice its patch
    lapped_output: bool = False  # every token paints twice its patch; neighbours blend
    patch_group: int = 1  # tokens of a square of patches that code it together, one after another
    haar_groups: bool = False  # two by two groups code the Haar transform of what they show
    num_group_layers: int = 0  # with groups: layers of the decoder over the groups of a block
    bounded_output: bool = True  # pixels are a tanh; False: they are clipped to become levels
    # The bottleneck.
    bottleneck_type: Literal["fsq", "vae"] = "fsq"
    fsq_quant_levels: tuple[int, ...] = (8, 8, 8, 5, 5, 5)
    vae_bottleneck_dim: int = 8
    lpips_loss_ratio: float = 0.1
    # For whom uses the weights: largest errors of a block that suit them. The first is the usual one.
    recommended_thresholds: tuple[float, ...] = ()
    # How it is computed; none of these changes a number beyond rounding.
    attention_implementation: str = ""  # '' picks the best for the device
    ring_layout: Literal["balanced", "plain"] = "balanced"  # how a sequence lies on sp
    use_flash_attention: bool = True
    scan_attention: bool = True
    scan_query_chunk_size: int = 1024
    scan_key_chunk_size: int = 512
    scan_mlp: bool = False
    scan_mlp_chunk_size: int = 8192
    remat_attention: str = ""
    remat_mlp: str = ""
    remat_block: str = ""
    scan_layers: bool = True
    param_scan_axis: int = 0
    # Fields of the released system (`_IGNORED`) that may be given and are not kept.
    mesh_dim: dataclasses.InitVar[Any] = None
    return_feats: dataclasses.InitVar[Any] = None

    if not TYPE_CHECKING:  # editors complete the options from the fields

        def __new__(cls, **options):
            """Refuses unknown options before `__init__` does, with a suggestion."""
            unknown = [key for key in options if key not in (*option_names(), *_IGNORED)]
            if unknown:
                raise ValueError("; ".join(_unknown_option(key) for key in unknown))
            return super().__new__(cls)

    def __post_init__(self, mesh_dim: Any, return_feats: Any) -> None:
        del mesh_dim, return_feats
        for name in option_names():  # a frozen record is set this way
            object.__setattr__(self, name, _typed(name, getattr(self, name)))
        self._check()

    def _check(self) -> None:
        positive = (
            "hidden_size intermediate_size num_encoder_layers num_decoder_layers num_attention_heads rms_norm_eps theta "
            "max_sequence_length frames_per_block min_toks max_toks patch_group vae_bottleneck_dim scan_query_chunk_size "
            "scan_key_chunk_size scan_mlp_chunk_size"
        )
        for name in positive.split():
            _require(
                0 < getattr(self, name) < math.inf,
                f"{name}={getattr(self, name)} must be a finite number above 0.",
            )
        for name in ("initializer_range", "lpips_loss_ratio"):
            _require(
                0 <= getattr(self, name) < math.inf,
                f"{name}={getattr(self, name)} must be a finite number, 0 or above.",
            )
        _require(
            len(self.patch_size) == 3 and min(self.patch_size) > 0,
            f"patch_size={self.patch_size} must be three sizes above 0.",
        )
        _require(
            self.hidden_size % (2 * self.num_attention_heads) == 0,
            f"hidden_size={self.hidden_size} must be a multiple of twice num_attention_heads={self.num_attention_heads}: "
            "RoPE rotates pairs of channels.",
        )
        _require(
            self.min_toks <= self.max_toks,
            f"min_toks={self.min_toks} must not exceed max_toks={self.max_toks}.",
        )
        _require(
            self.max_sequence_length % self.max_toks == 0,
            f"max_sequence_length={self.max_sequence_length} must be a whole number of blocks of max_toks={self.max_toks}; "
            f"use {max(1, self.max_sequence_length // self.max_toks) * self.max_toks}.",
        )
        _require(
            self.param_scan_axis == 0,
            f"param_scan_axis={self.param_scan_axis}: layers are stacked on axis 0 only.",
        )
        for name in ("remat_attention", "remat_mlp", "remat_block"):
            _require(
                getattr(self, name) in REMAT_POLICIES,
                f"{name}={getattr(self, name)!r} must be one of {REMAT_POLICIES}.",
            )
        _require(
            all(0 < threshold < math.inf for threshold in self.recommended_thresholds),
            f"recommended_thresholds={self.recommended_thresholds} must be finite numbers above 0.",
        )
        levels = self.fsq_quant_levels
        _require(
            len(levels) > 0 and min(levels) >= 2,
            f"fsq_quant_levels={levels} must all be 2 or more.",
        )
        _require(
            self.codebook_size < 2**31,
            f"fsq_quant_levels={levels} name {self.codebook_size} codes; at most 2**31 - 1 have an index.",
        )
        _ = self.keep_fraction
        _ = self.resolution
        self._check_places()

    def _check_places(self) -> None:
        """The options that say where in the frame a token is, and what it shows."""
        _require(
            len(self.rope_bases) == 3 and min(self.rope_bases) > 1,
            f"rope_bases={self.rope_bases} must be three numbers above 1: of time, rows and columns.",
        )
        pairs = self.rope_pairs
        _require(
            len(pairs) == 3 and min(pairs) >= 0 and sum(pairs) == self.head_dim // 2,
            f"rope_split={pairs} must be three numbers of channel pairs, 0 or above, with the sum {self.head_dim // 2}: "
            f"half of hidden_size={self.hidden_size} / num_attention_heads={self.num_attention_heads}.",
        )
        for name, does in (("lapped_input", "seen"), ("lapped_output", "painted")):
            _require(
                not getattr(self, name) or self.patch_size[1] % 2 == self.patch_size[2] % 2 == 0,
                f"{name}=True needs patches of even rows and columns, not patch_size={self.patch_size}: "
                f"half of a neighbour's patch is {does}.",
            )
        _ = self.group_shape
        _require(
            self.patch_group == 1 or (self.token_order != "raster" and self.condition_decoder),
            f"patch_group={self.patch_group} needs token_order='coarse_to_fine' or 'adaptive', and condition_decoder=True.",
        )
        _require(
            self.token_order != "adaptive" or (self.patch_group > 1 and not self.condition_encoder),
            "token_order='adaptive' needs groups of patches (patch_group above 1) and condition_encoder=False: the order "
            "follows from codes, so an encoder cannot know which tokens will be kept.",
        )
        for name in ("haar_groups", "num_group_layers"):
            _require(
                self.patch_group > 1 or not getattr(self, name),
                f"{name}={getattr(self, name)} needs groups of patches: patch_group above 1.",
            )
        _require(
            self.num_group_layers >= 0,
            f"num_group_layers={self.num_group_layers} must be 0 or above.",
        )
        _require(
            not self.haar_groups or all(size % 2 == 0 for size in self.grid_shape),
            f"haar_groups=True needs an even number of groups in a row and in a column, not {self.grid_shape}.",
        )

    @property
    def resolution(self) -> int:
        """Rows (and columns) of a frame in pixels: the one that gives `max_toks` tokens per block."""
        pt, ph, pw = self.patch_size
        _require(
            self.frames_per_block % pt == 0,
            f"frames_per_block={self.frames_per_block} must be a multiple of patch_size[0]={pt}.",
        )
        per_frame, rest = divmod(self.max_toks, self.frames_per_block // pt)
        side = math.isqrt(per_frame * ph * pw)
        _require(
            rest == 0 and side * side == per_frame * ph * pw and side % ph == 0 and side % pw == 0,
            f"max_toks={self.max_toks} is no square frame of whole patches with frames_per_block={self.frames_per_block} and "
            f"patch_size={self.patch_size}; a frame of side S has (frames / {pt}) * (S / {ph}) * (S / {pw}) tokens.",
        )
        return side

    @property
    def tokens_per_block(self) -> int:
        """Tokens of one block, one per patch (`max_toks`)."""
        return self.max_toks

    @property
    def slices_per_block(self) -> int:
        """Layers of patches in time: a *slice* is all patches of the same frames."""
        return self.frames_per_block // self.patch_size[0]

    @property
    def slice_shape(self) -> tuple[int, int]:
        """Rows and columns of patches in a slice."""
        return self.resolution // self.patch_size[1], self.resolution // self.patch_size[2]

    @property
    def group_shape(self) -> tuple[int, int]:
        """Rows and columns of patches in a group of `patch_group` patches; a group is square in pixels."""
        if self.patch_group == 1:
            return 1, 1
        _, ph, pw = self.patch_size
        side = math.isqrt(self.patch_group * ph * pw)
        shape = side // ph, side // pw
        _require(
            shape[0] * ph == shape[1] * pw == side
            and math.prod(shape) == self.patch_group
            and all(size & (size - 1) == 0 for size in shape)
            and self.resolution % side == 0,
            f"patch_group={self.patch_group} patches of patch_size={self.patch_size} are no square whose sides have a "
            f"power of two of patches and divide the frame's {self.resolution} pixels.",
        )
        return shape

    @property
    def grid_shape(self) -> tuple[int, int]:
        """Rows and columns of groups of patches in a slice; without groups `slice_shape`."""
        (down, right), (rows, columns) = self.slice_shape, self.group_shape
        return down // rows, right // columns

    @property
    def num_stages(self) -> int:
        """The number of tokens that code one picture in turn: the tokens of a group; with `haar_groups` those of four groups."""
        return self.patch_group * (4 if self.haar_groups else 1)

    @property
    def group_size(self) -> tuple[int, int, int]:
        """Frames, rows and columns of a group of patches in pixels; without groups the patch size."""
        frames, rows, columns = self.patch_size
        down, right = self.group_shape
        return frames, down * rows, right * columns

    @property
    def layers(self) -> str:
        """Layers of the encoder and of the decoder, as people write them: '10 + 10'."""
        of_groups = f" + {self.num_group_layers} over groups" if self.num_group_layers else ""
        return f"{self.num_encoder_layers} + {self.num_decoder_layers}{of_groups}"

    @property
    def rope_pairs(self) -> tuple[int, ...]:
        """Channel pairs of a head that `rope='3d'` rotates by time, by row and by column."""
        half = self.head_dim // 2
        spatial = half * 3 // 8
        return self.rope_split or (half - 2 * spatial, spatial, spatial)

    @property
    def patch_dim(self) -> int:
        """Numbers in one patch."""
        return math.prod(self.patch_size) * 3

    @property
    def head_dim(self) -> int:
        """Channels of one attention head."""
        return self.hidden_size // self.num_attention_heads

    @property
    def codebook_size(self) -> int:
        """Number of FSQ codes."""
        return math.prod(self.fsq_quant_levels)

    @property
    def code_dim(self) -> int:
        """Channels of a code: FSQ levels, or VAE latent channels."""
        return (
            len(self.fsq_quant_levels) if self.bottleneck_type == "fsq" else self.vae_bottleneck_dim
        )

    @property
    def keep_fraction(self) -> float | None:
        """The share of a block that `mask_type='fixed_F'` keeps; None for 'elastic'."""
        if self.mask_type == "elastic":
            return None
        kind, _, number = self.mask_type.partition("_")
        try:
            fraction = float(number)
        except ValueError:
            fraction = math.nan
        _require(
            kind == "fixed" and 0 < fraction <= 1,
            f"mask_type={self.mask_type!r} must be 'elastic', or 'fixed_F' with a share 0 < F <= 1, e.g. 'fixed_0.5'.",
        )
        return fraction

    def to_json_dict(self) -> dict[str, Any]:
        """The options as plain JSON values."""
        return {
            name: list(v) if isinstance(v := getattr(self, name), tuple) else v
            for name in option_names()
        }

    @classmethod
    def from_json_dict(cls, values: Mapping[str, Any]) -> "ElasticTokConfig":
        """The inverse of `to_json_dict`; fields that the released system and transformers add are ignored."""
        return cls(
            **{key: value for key, value in values.items() if key not in _OLD_TRANSFORMERS_FIELDS}
        )

    def config_hash(self) -> str:
        """16 hex digits that identify the shape of the model; options of computation do not count."""
        shape = {
            name: value for name, value in self.to_json_dict().items() if name in _SHAPE_OPTIONS
        }
        # Left out where they have their default, so that models older than an option keep their hash.
        defaults = {field.name: field.default for field in dataclasses.fields(self)}
        shape |= {
            name: v for name in _LATER_SHAPE_OPTIONS if (v := getattr(self, name)) != defaults[name]
        }
        return hashlib.sha256(json.dumps(shape, sort_keys=True).encode()).hexdigest()[:16]

    def replace(self, **changes: Any) -> "ElasticTokConfig":
        """A copy with some options changed. All checks are repeated; old spellings give a warning."""
        values = {name: getattr(self, name) for name in option_names()}
        for key, value in changes.items():
            name = _OLD_NAMES.get(key, key)
            if name != key:
                log.warning("Option %r is an old spelling of %r.", key, name)
            if name not in values:
                raise ValueError(_unknown_option(key))
            values[name] = value
        return ElasticTokConfig(**values)

    def to_transformers(self) -> "PreTrainedConfig":
        """The same options as a configuration of Hugging Face transformers.

        For `push_to_hub` and `save_pretrained`; `load_config` reads the config.json that these write.
        transformers is imported here and nowhere else, because its import takes half a second.
        """
        # Only its configuration class is used, so its notice that PyTorch is missing is no news.
        os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
        logging.getLogger("transformers").addFilter(
            lambda record: "PyTorch was not found" not in record.getMessage()
        )
        from transformers import PreTrainedConfig

        base = type("ElasticTokPreTrainedConfig", (PreTrainedConfig,), {"model_type": _MODEL_TYPE})
        return base(**self.to_json_dict())


def option_names() -> list[str]:
    """The names of all options, in the order of their definition."""
    return [field.name for field in dataclasses.fields(ElasticTokConfig)]


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ValueError(message)


def _unknown_option(key: str) -> str:
    close = difflib.get_close_matches(key, [*option_names(), *_OLD_NAMES], n=1)
    return f"ElasticTokConfig has no option {key!r}." + (
        f" Did you mean {_OLD_NAMES.get(close[0], close[0])!r}?" if close else ""
    )


def _typed(name: str, value: Any) -> Any:
    """`value` in the type that option `name` declares: a list becomes a tuple, an integer a float where one is declared."""
    hint = ElasticTokConfig.__annotations__[name]
    if typing.get_origin(hint) is tuple:
        value = tuple(value) if isinstance(value, list) else value
        kind = typing.get_args(hint)[0]
        if isinstance(value, tuple) and kind is float:
            value = tuple(float(item) if type(item) is int else item for item in value)
        fits = isinstance(value, tuple) and all(type(item) is kind for item in value)
    elif typing.get_origin(hint) is Literal:
        fits = value in typing.get_args(hint)
    else:
        value = float(value) if hint is float and type(value) is int else value
        fits = type(value) is hint
    expected = (
        hint.__name__
        if isinstance(hint, type) and typing.get_origin(hint) is None
        else str(hint).replace("typing.", "")
    )
    _require(fits, f"{name}={value!r} must be of type {expected}.")
    return value


# Fields that transformers writes into every config.json; none of them concerns this model.
_OLD_TRANSFORMERS_FIELDS = frozenset(
    """_attn_implementation_autoset _name_or_path add_cross_attention architectures bad_words_ids begin_suppress_tokens bos_token_id
    chunk_size_feed_forward cross_attention_hidden_size decoder_start_token_id diversity_penalty do_sample dtype early_stopping
    encoder_no_repeat_ngram_size eos_token_id exponential_decay_length_penalty finetuning_task forced_bos_token_id forced_eos_token_id
    id2label is_decoder is_encoder_decoder label2id length_penalty max_length min_length model_type no_repeat_ngram_size
    num_beam_groups num_beams num_return_sequences output_attentions output_hidden_states output_scores pad_token_id prefix problem_type
    pruned_heads remove_invalid_values repetition_penalty return_dict return_dict_in_generate sep_token_id suppress_tokens
    task_specific_params temperature tf_legacy_loss tie_encoder_decoder tie_word_embeddings tokenizer_class top_k top_p torch_dtype
    torchscript transformers_version typical_p use_bfloat16 mesh_dim return_feats""".split()
)
_SHAPE_OPTIONS = frozenset(
    """hidden_size intermediate_size num_encoder_layers num_decoder_layers num_attention_heads rms_norm_eps theta frames_per_block
    patch_size max_toks bottleneck_type fsq_quant_levels vae_bottleneck_dim""".split()
)
_LATER_SHAPE_OPTIONS = (
    "condition_encoder", "condition_decoder", "token_order", "rope", "rope_split", "rope_bases", "lapped_output", "patch_group",
    "bounded_output", "lapped_input", "haar_groups", "num_group_layers",
)  # fmt: skip

_SMALL = dict(
    hidden_size=192, intermediate_size=512, num_encoder_layers=1, num_decoder_layers=1, num_group_layers=3,
    num_attention_heads=3, theta=1e4, lpips_loss_ratio=0.0, token_order="adaptive", rope="3d",
    condition_encoder=False, condition_decoder=True, haar_groups=True, lapped_input=True, lapped_output=True, bounded_output=False,
)  # fmt: skip
_RELEASED = dict(
    recommended_thresholds=(0.003,),
    use_flash_attention=True, scan_attention=True, scan_query_chunk_size=512, scan_key_chunk_size=512, scan_mlp=True,
    scan_mlp_chunk_size=8192, remat_mlp="nothing_saveable",
)  # fmt: skip
PRESETS: dict[str, dict[str, Any]] = {
    # The released models have this size: 210 M parameters, 256 x 256 pixels. ElasticTok-FSQ has the defaults.
    "200m": dict(recommended_thresholds=(0.003,)),
    # A model for trying things out, also of the released code.
    "debug": dict(
        hidden_size=256, intermediate_size=256, num_encoder_layers=2, num_decoder_layers=2, num_attention_heads=2, rms_norm_eps=1e-6,
    ),
    # The released models by name, with the options of computation of the released commands.
    "ElasticTok-FSQ": dict(_RELEASED, min_toks=256, max_toks=4096),
    "ElasticTok-VAE": dict(
        _RELEASED, min_toks=128, max_toks=2048, patch_size=(2, 8, 8), bottleneck_type="vae", vae_bottleneck_dim=8, theta=5e6,
        max_sequence_length=8192,
    ),
    # The models shipped in example/: 128 x 128 pixels.
    "small-fsq": {
        **_SMALL, "bottleneck_type": "fsq", "frames_per_block": 16, "patch_size": (16, 2, 2), "patch_group": 16, "max_toks": 4096,
        "min_toks": 256, "max_sequence_length": 8192, "fsq_quant_levels": (25, 17, 11, 9, 9, 7, 7, 5, 5, 3),
        "recommended_thresholds": (0.005, 0.01, 0.0025),
    },
    "small-vae": {
        **_SMALL, "bottleneck_type": "vae", "patch_size": (4, 4, 8), "patch_group": 8, "max_toks": 512, "min_toks": 32,
        "max_sequence_length": 1024,
        "recommended_thresholds": (0.005, 0.01, 0.02),
    },
}  # fmt: skip


_DTYPES = {
    "fp32": "float32",
    "float32": "float32",
    "bf16": "bfloat16",
    "bfloat16": "bfloat16",
}


def parse_dtype(name: str) -> str:
    """NumPy's name of the dtype that `--dtype` names.

    Raises:
      ValueError: it is not a supported one.
    """
    if name not in _DTYPES:
        raise ValueError(f"dtype={name!r} must be one of {', '.join(_DTYPES)}.")
    return _DTYPES[name]


def load_config(source: str) -> ElasticTokConfig:
    """The config that `source` names: a preset, a config.json file, or a folder with one.

    Raises:
      ValueError: there is no such preset or file, or the file holds no config.
    """
    if source in PRESETS:
        return ElasticTokConfig(**PRESETS[source])
    name = source.removeprefix("json::")
    if source.startswith("pickle::"):
        raise ValueError(
            f"{source!r}: pickle files are not read, they can run code; save the config as JSON and give 'json::FILE'."
        )
    path = pathlib.Path(name)
    path = path / "config.json" if path.is_dir() else path
    if not path.is_file():
        close = difflib.get_close_matches(source, PRESETS, n=1)
        hint = f" Did you mean {close[0]!r}?" if close else ""
        raise ValueError(
            f"{source!r} is neither a preset ({', '.join(PRESETS)}) nor a config.json file or a folder with one.{hint}"
        )
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        raise ValueError(f"{path} is not a JSON file: {error}.") from error
    if not isinstance(values, dict):
        raise ValueError(f"{path} holds a {type(values).__name__}; a config.json holds an object.")
    return ElasticTokConfig.from_json_dict(values)


def update_config(config: ElasticTokConfig, text: str) -> ElasticTokConfig:
    """`config` changed by a string such as "dict(min_toks=256, patch_size=(1, 8, 8))"; '' changes nothing."""
    return config.replace(**parse_dict(text)) if text.strip() else config


def check_resolution(resolution: int, config: ElasticTokConfig) -> None:
    """Checks that a resolution is the model's; 0 means that none was given.

    Raises:
      ValueError: it is another one.
    """
    if resolution not in (0, config.resolution):
        raise ValueError(
            f"resolution={resolution}, but the frames of this model have {config.resolution} rows: "
            f"max_toks={config.max_toks}, patch_size={config.patch_size} and "
            f"frames_per_block={config.frames_per_block} decide. Leave it out, or change these."
        )

"""Options: presets, checks, suggestions, and strings that are read and never run."""

import json
import logging

import pytest
import released

from elastic.config import (
    PRESETS,
    REMAT_POLICIES,
    ElasticTokConfig,
    load_config,
    option_names,
    update_config,
)
from elastic.io.literals import parse_dict

# Rows of pixels, tokens per block, numbers in a patch, channels of a head.
SIZES = {
    "200m": (256, 4096, 192, 128),
    "debug": (256, 4096, 192, 128),
    "ElasticTok-FSQ": (256, 4096, 192, 128),
    "ElasticTok-VAE": (256, 2048, 384, 128),
    "small-fsq": (128, 4096, 192, 64),
    "small-vae": (128, 512, 384, 64),
}


@pytest.mark.parametrize("preset", PRESETS)
def test_every_preset_loads(preset):
    config = load_config(preset)
    sizes = config.resolution, config.tokens_per_block, config.patch_dim, config.head_dim
    assert sizes == SIZES[preset]
    assert config.codebook_size == (1_391_630_625 if preset == "small-fsq" else 64_000)
    assert ElasticTokConfig.from_json_dict(json.loads(json.dumps(config.to_json_dict()))) == config


def test_the_documented_settings_of_the_released_vae_fit_its_preset():
    text = (
        "dict(mask_mode='elastic',min_toks=128,max_toks=2048,frames_per_block=4,theta=5000000,"
        "patch_size=(2,8,8),bottleneck_type='vae',vae_bottleneck_dim=8)"
    )
    config = update_config(load_config("200m"), text)
    assert (config.resolution, config.code_dim, config.theta) == (256, 8, 5e6)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(frame_per_block=4), "no option 'frame_per_block'. Did you mean 'frames_per_block'?"),
        (dict(xyz=1), "no option 'xyz'.$"),
        (dict(hidden_size="big"), "hidden_size='big' must be of type int"),
        (dict(scan_layers=1), "scan_layers=1 must be of type bool"),
        (dict(patch_size=(1, 8.0, 8)), r"must be of type tuple\[int, int, int\]"),
        (dict(patch_size=(8, 8)), "must be three sizes above 0"),
        (dict(theta=0), "theta=0.0 must be a finite number above 0"),
        (dict(theta=float("inf")), "theta=inf must be a finite number above 0"),
        (dict(lpips_loss_ratio=float("nan")), "lpips_loss_ratio=nan must be a finite number"),
        (dict(bottleneck_type="vq"), "'vq' must be of type Literal"),
        (dict(num_attention_heads=3), "a multiple of twice num_attention_heads=3"),
        (dict(min_toks=5000), "min_toks=5000 must not exceed max_toks=4096"),
        (dict(max_sequence_length=10_000), "whole number of blocks of max_toks=4096; use 8192"),
        (dict(max_toks=4000, max_sequence_length=4000), "max_toks=4000 is no square frame"),
        (dict(frames_per_block=3, patch_size=(2, 8, 8)), "must be a multiple of patch_size"),
        (dict(remat_block="nothing"), "remat_block='nothing' must be one of"),
        (dict(param_scan_axis=1), "layers are stacked on axis 0 only"),
        (dict(fsq_quant_levels=(8, 1)), "must all be 2 or more"),
        (dict(fsq_quant_levels=()), "must all be 2 or more"),
        (dict(fsq_quant_levels=(64,) * 6), "have an index"),
        (dict(mask_type="fixed_1.5"), "with a share 0 < F <= 1"),
        (dict(mask_type="fixed_half"), "must be 'elastic', or 'fixed_F'"),
    ],
    ids=str,
)
def test_a_wrong_option_is_refused_with_the_rule(changes, message):
    for make in (load_config("200m").replace, ElasticTokConfig):
        with pytest.raises(ValueError, match=message):
            make(**changes)


def test_an_old_spelling_is_understood_with_a_warning(caplog):
    """Difference 7 in elastic/README.md: the released scripts pass `mask_mode`, which the released code ignores."""
    with caplog.at_level(logging.WARNING, "elastic.config"):
        config = update_config(load_config("200m"), "dict(mask_mode='fixed_0.25')")
    assert config.keep_fraction == 0.25
    assert "'mask_mode' is an old spelling of 'mask_type'" in caplog.text


@pytest.mark.parametrize("text", ["dict(min_toks=8, theta=1)", "{'min_toks': 8, 'theta': 1}"])
def test_options_are_read_from_either_spelling_of_a_dict(text):
    config = update_config(load_config("200m"), text)
    assert config == load_config("200m").replace(min_toks=8, theta=1.0)
    assert update_config(config, " ") is config


@pytest.mark.parametrize(
    "text",
    [
        "dict(min_toks=open('ran', 'w').write('x'))",
        "dict(**{'min_toks': open('ran', 'w')})",
        "open('ran', 'w')",
        "dict(min_toks=[open('ran', 'w') for _ in 'x'])",
        "dict([('min_toks', 8)])",
        "{open('ran', 'w'): 1}",
        "{1: 2}",
        "[8]",
        "dict(min_toks=8",
        "dict(min_toks=8, min_toks=9)",
        "{'min_toks': 8, 'min_toks': 9}",
        "{**{'min_toks': 8}}",
        "dict(min_toks=2**8)",
        "(" * 10_000,
        "import os",
        "dict(min_toks=(8)(9))",
    ],
)
def test_only_literals_are_read_and_nothing_is_run(text, tmp_path, monkeypatch):
    """Difference 7 in elastic/README.md: no `eval`."""
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="is not a dict of literals, such as"):
        parse_dict(text)
    assert not list(tmp_path.iterdir())


def test_a_config_file_or_its_folder_is_a_source(tmp_path):
    config = load_config("debug").replace(min_toks=7)
    file = tmp_path / "config.json"
    file.write_text(json.dumps(config.to_json_dict() | {"model_type": "elastic_tok"}))
    for source in (tmp_path, file, f"json::{file}"):
        assert load_config(str(source)) == config


@pytest.mark.parametrize("case", released.CASES)
def test_a_config_that_the_released_system_wrote_is_read(case):
    config = ElasticTokConfig.from_json_dict(released.meta(case)["config"])
    assert (config.bottleneck_type, config.resolution, config.hidden_size) == (case, 32, 64)


def test_what_is_no_config_is_refused_with_a_way_out(tmp_path):
    (tmp_path / "list.json").write_text("[1]")
    (tmp_path / "bytes.json").write_bytes(b"\x80\xff")
    (tmp_path / "typo.json").write_text('{"hiden_size": 8}')
    for source, message in {
        "200M": "neither a preset .* Did you mean '200m'",
        "pickle::/x/metadata.pkl": "pickle files are not read",
        "nowhere.json": "neither a preset",
        str(tmp_path): "neither a preset",
        str(tmp_path / "list.json"): "holds a list",
        str(tmp_path / "bytes.json"): "is not a JSON file",
        str(tmp_path / "typo.json"): "Did you mean 'hidden_size'",
    }.items():
        with pytest.raises(ValueError, match=message):
            load_config(source)


def test_the_hash_names_the_numbers_and_not_how_they_are_computed():
    config = load_config("200m")
    # Written into token files: it may not change while the numbers do not.
    assert config.config_hash() == "b93a4635ccfd1c51"
    same = dict(
        scan_layers=False, scan_mlp=True, remat_block="nothing_saveable", scan_attention=False,
        min_toks=5, mask_type="fixed_0.5", max_sequence_length=8192, theta=50_000_000,
    )  # fmt: skip
    assert config.replace(**same).config_hash() == config.config_hash()
    for change in (dict(theta=5e6), dict(hidden_size=512), dict(patch_size=(2, 8, 4))):
        assert config.replace(**change).config_hash() != config.config_hash()


def test_equal_configs_are_one_key():
    one, other = load_config("debug"), load_config("debug")
    assert one == other and hash(one) == hash(other) and len({one, other}) == 1
    assert one != one.replace(min_toks=9) and one != "debug"


def test_every_option_is_stored():
    """Difference 7 in elastic/README.md: the released class forgets `vae_bottleneck_dim`."""
    config = ElasticTokConfig(vae_bottleneck_dim=5, bottleneck_type="vae")
    assert config.code_dim == 5
    assert list(config.to_json_dict()) == option_names()


def test_transformers_reads_and_writes_the_same_options(tmp_path):
    from transformers import PreTrainedConfig

    config = load_config("small-vae")
    theirs = config.to_transformers()
    assert isinstance(theirs, PreTrainedConfig) and theirs.model_type == "elastic_tok"
    theirs.save_pretrained(tmp_path)
    assert load_config(str(tmp_path)) == config
    assert ElasticTokConfig.from_json_dict(theirs.to_dict()) == config


def test_a_config_cannot_be_changed_in_place():
    with pytest.raises(AttributeError):
        load_config("debug").min_toks = 7


def test_every_name_of_a_remat_policy_is_one_of_jax():
    import jax

    assert all(hasattr(jax.checkpoint_policies, name) for name in REMAT_POLICIES if name)


def test_fields_of_the_released_configuration_that_do_nothing_may_be_given():
    config = ElasticTokConfig(hidden_size=512, mesh_dim="1,1,-1,1", return_feats=True)
    assert config == ElasticTokConfig(hidden_size=512)
    assert config.to_json_dict() == ElasticTokConfig(hidden_size=512).to_json_dict()
    assert config.replace(hidden_size=256).hidden_size == 256

"""Evaluation: numbers that using the tokenizer gives too, curves that hold, and a script that writes all or nothing."""

import csv
import dataclasses
import json
import math

import jax
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from elastic import checkpoints, media, metrics
from elastic.cli import app
from elastic.config import ElasticTokConfig
from elastic.distributed.mesh import make_mesh
from elastic.evaluation import tables
from elastic.evaluation.codecs import CodecAt
from elastic.evaluation.evaluate import EvaluationConfig, _all_counts, evaluate
from elastic.evaluation.records import Block, Condition, ConditionResult, Evaluation
from elastic.io.tree import unflatten
from elastic.metrics.frechet import frechet_distance
from elastic.metrics.lpips import lpips_of_frames
from elastic.metrics.lpips_weights import SHAPES
from elastic.model import token_masks
from elastic.search import geometric_counts
from elastic.tokenizer import ElasticTokenizer
from scripts import evaluate as script

CONFIG = ElasticTokConfig(
    hidden_size=64, intermediate_size=96, num_attention_heads=2, num_encoder_layers=2, num_decoder_layers=2,
    rms_norm_eps=1e-5, theta=5e7, frames_per_block=2, patch_size=(1, 8, 8), min_toks=4, max_toks=32, max_sequence_length=96,
)  # fmt: skip
THRESHOLD = 0.515  # met by some blocks and not by others


@pytest.fixture(scope="module")
def tokenizer(golden):
    params = checkpoints.load_params(f"params::{golden}/fsq/ckpt/params_scan_fp32", CONFIG)
    return ElasticTokenizer(CONFIG, params, mesh=make_mesh("1,1,1,1", jax.devices()[:1]))


@pytest.fixture(scope="module")
def clips(golden, tmp_path_factory):
    """Seven frames of three blocks and a short one, five in a folder below, and a picture."""
    folder = tmp_path_factory.mktemp("clips")
    with media.open_clip(
        golden / "media" / "clip_160x120_30fps_97f.mp4", resolution=48, rate=None
    ) as reader:
        frames = reader.read()
    (folder / "more").mkdir()
    media.write_video(folder / "a.mp4", frames[:56:8], 24)
    media.write_video(folder / "more" / "a.mp4", frames[30:55:5], 24)
    Image.open(golden / "media" / "img_101x67.png").save(folder / "z.png")
    return folder


@pytest.fixture(scope="module")
def measured(tokenizer, clips):
    config = EvaluationConfig(
        thresholds=(THRESHOLD, 0.5), num_tokens=(8, 1.0), searches=("binary", "linear"), num_counts=0, pictures=2,
        codecs=("x264", "jpeg"),
    )  # fmt: skip
    return evaluate(tokenizer, media.find_media(clips), config, progress=False)


# --- Numbers -----------------------------------------------------------------------------------


def test_every_run_gives_what_the_tokenizer_gives(tokenizer, clips, measured):
    assert measured.clips == {"a.mp4": 7, "more/a.mp4": 5, "z.png": 1} and not measured.skipped
    assert [tuple(result.condition) for result in measured.results] == [
        ("fixed", None, 8), ("fixed", None, 32), ("binary", THRESHOLD, None),
        ("binary", 0.5, None), ("linear", THRESHOLD, None), ("linear", 0.5, None),
    ]  # fmt: skip
    for result in measured.results:
        condition = result.condition
        options = dict(
            search=condition.search, threshold=condition.threshold, num_tokens=condition.num_tokens
        )
        originals, frames, blocks, bits = [], [], [], 0
        for file in media.find_media(clips):
            made = tokenizer.reconstruct(file, **options, num_counts=1000)
            with media.open_clip(file, resolution=CONFIG.resolution) as reader:
                originals.append(reader.read())
            frames.append(made.frames)
            blocks += made.tokens.blocks
            bits += made.tokens.num_bits
        assert [b.num_kept for b in result.blocks] == [b.num_kept for b in blocks]
        assert [b.loss for b in result.blocks] == [b.loss for b in blocks]
        if condition.threshold:
            assert [b.met for b in result.blocks] == [b.met_threshold for b in blocks]
        assert result.mean_tokens == np.mean([b.num_kept for b in blocks])
        whole = metrics.psnr(np.concatenate(originals), np.concatenate(frames))
        assert result.psnr == pytest.approx(whole)
        each = [metrics.psnr(a, b) for a, b in zip(originals, frames, strict=True)]
        assert result.psnr_of_clips == pytest.approx(np.mean(each))
        assert result.bits_per_pixel == pytest.approx(bits / (13 * 32 * 32))


def test_a_codec_has_the_bits_of_each_count_and_its_own_quality(clips, measured):
    assert [(r.codec, r.num_tokens) for r in measured.codecs] == [
        ("x264", 8), ("x264", 32), ("jpeg", 8), ("jpeg", 32),
    ]  # fmt: skip
    for result in measured.codecs:
        originals, frames, bits, within = [], [], 0, []
        for file in media.find_media(clips):
            with media.open_clip(file, resolution=CONFIG.resolution) as reader:
                originals.append(reader.read())
                rate = reader.rate
            # Of the blocks of the model's own run at this count.
            fixed = measured.result(Condition("fixed", num_tokens=result.num_tokens))
            name = str(file.relative_to(clips))
            kept = sum(block.num_kept for block in fixed.blocks if block.clip == name)
            per_token = math.log2(math.prod(CONFIG.fsq_quant_levels))
            coded = CodecAt(result.codec, originals[-1], rate).within(round(kept * per_token))
            frames.append(coded.frames)
            bits += coded.bits
            within.append(coded.bits <= kept * per_token)
        assert result.bits_per_pixel == pytest.approx(bits / (13 * 32 * 32), rel=1e-2)
        whole = metrics.psnr(np.concatenate(originals), np.concatenate(frames))
        assert result.psnr == pytest.approx(whole, abs=0.1)
        assert result.clips_within == np.mean(within)
        assert result.ssim is not None


def test_a_ladder_is_a_frame_at_every_count(measured):
    assert [ladder.clip for ladder in measured.ladders] == ["a.mp4", "more/a.mp4"]
    for ladder in measured.ladders:
        assert [rung.num_tokens for rung in ladder.rungs] == [8, 32]
        for rung in ladder.rungs:
            assert rung.psnr == metrics.psnr(ladder.original, rung.reconstruction)


@pytest.mark.slow
def test_ssim_and_lpips_are_means_over_frames_spread_over_each_clip(tokenizer, clips):
    draw = np.random.default_rng(0)
    weights = unflatten({
        path: draw.normal(0, 0.1, shape).astype(np.float32) ** (2 if "NetLin" in path[0] else 1)
        for path, shape in SHAPES.items()
    })  # fmt: skip
    config = EvaluationConfig(
        thresholds=(THRESHOLD,), num_tokens=(16,), metrics=("ssim", "lpips"), metric_frames=3, searches=("binary", "linear"),
    )  # fmt: skip
    found = evaluate(
        tokenizer, media.find_media(clips), config, lpips_weights=weights, progress=False
    )
    pairs = []
    for file, chosen in zip(media.find_media(clips), ([0, 3, 6], [0, 2, 4], [0]), strict=True):
        with media.open_clip(file, resolution=CONFIG.resolution) as reader:
            original = reader.read()[chosen]
        pairs.append((original, tokenizer.reconstruct(file, num_tokens=16).frames[chosen]))
    originals, frames = (np.concatenate(side) for side in zip(*pairs, strict=True))
    (fixed,) = found.fixed()
    assert fixed.ssim == pytest.approx(np.mean(metrics.ssim(originals, frames)))
    expected = np.mean(lpips_of_frames(weights, originals, frames))
    assert expected > 0 and fixed.lpips == pytest.approx(expected, rel=1e-4)
    assert found.under(THRESHOLD, "binary").lpips is not None
    assert found.under(THRESHOLD, "linear").lpips is None  # run to be timed
    assert found.scalars()["eval/lpips@16"] == fixed.lpips


def test_frechet_distances_are_those_of_all_windows_and_of_the_measured_frames(tokenizer, golden):
    file = golden / "media" / "clip_160x120_30fps_97f.mp4"
    config = EvaluationConfig(
        thresholds=(), num_tokens=(16,), metrics=("fvd", "fid"), metric_frames=3, max_frames=37, codecs=("x264",), fps=None,
    )  # fmt: skip
    calls = []

    def seen(clips):  # a network of its own: brightness by column
        calls.append(clips.shape)
        return clips.mean(axis=tuple(k for k in range(1, clips.ndim) if k != clips.ndim - 2))

    with pytest.raises(
        ValueError, match=r"networks=\{'fvd': load_network\('fvd', FILE\)\}, or --fvd_weights=FILE"
    ):
        evaluate(tokenizer, [file], config, progress=False)
    found = evaluate(tokenizer, [file], config, networks={"fvd": seen, "fid": seen}, progress=False)
    with media.open_clip(file, resolution=CONFIG.resolution, rate=None, max_frames=37) as reader:
        original = reader.read()
    frames = tokenizer.reconstruct(file, num_tokens=16, rate=None, max_frames=37).frames
    windows = [clip[:32].reshape(2, 16, *clip.shape[1:]) for clip in (original, frames)]
    (fixed,) = found.fixed()
    assert fixed.fvd == pytest.approx(frechet_distance(*map(seen, windows))) and fixed.fvd > 0
    assert fixed.fid == pytest.approx(frechet_distance(*(seen(clip[[0, 18, 36]]) for clip in (original, frames))))  # fmt: skip
    assert found.codecs[0].fvd is not None and found.codecs[0].fvd != fixed.fvd
    # Two windows of the originals are looked at once, and those of the model and of the codec.
    assert calls.count((1, 16, 32, 32, 3)) == 6


def test_logs_get_thresholds_by_value_and_counts_by_number(measured):
    scalars = measured.scalars()
    assert scalars[f"eval/mean_tokens@{THRESHOLD}"] == measured.under(THRESHOLD).mean_tokens
    assert scalars["eval/psnr@32"] == measured.fixed()[1].psnr
    assert 0 < scalars[f"eval/share_met@{THRESHOLD}"] < 1
    assert scalars[f"eval/passes_per_block@{THRESHOLD}"] > 1
    assert all(isinstance(value, float) for value in scalars.values())


def test_pictures_show_the_first_clips_under_every_threshold(measured):
    pictures = measured.pictures()
    assert list(pictures) == [
        f"eval/{clip}@{t}" for clip in ("a.mp4", "more/a.mp4") for t in (THRESHOLD, 0.5)
    ]
    for picture in pictures.values():
        assert picture.dtype == np.uint8 and picture.shape == (*picture.shape[:2], 3)
        assert picture.std() > 10


def test_no_search_finds_fewer_tokens_in_the_first_block_than_the_ground_truth(measured):
    """Later blocks have a cache that the counts before them made, so that only the first is comparable one by one."""
    for threshold in measured.config.thresholds:
        ours, truth = (measured.under(threshold, s).blocks for s in ("binary", "linear"))
        for a, b in zip(ours, truth, strict=True):
            assert a.index != b.index or a.index > 0 or a.num_kept >= b.num_kept
        assert measured.above_optimum(threshold, "linear") == 0


@given(smallest=st.integers(1, 40), more=st.integers(0, 200))
def test_all_counts_leave_out_none(smallest, more):
    config = dataclasses.make_dataclass("Shape", "min_toks max_toks".split())(
        smallest, smallest + more
    )
    found = geometric_counts(config.min_toks, config.max_toks, _all_counts(config))
    assert found == list(range(smallest, smallest + more + 1))


# --- Curves ------------------------------------------------------------------------------------


def made_up(needed, threshold=0.1, model=CONFIG):
    """An evaluation whose one condition needed so many tokens of each block; None: all were not enough."""
    blocks = tuple(
        Block("clip", k, 32 if n is None else n, 0.2 if n is None else 0.1, n is not None, 3, 1.0, {})
        for k, n in enumerate(needed)
    )  # fmt: skip
    result = ConditionResult(
        condition=Condition("binary", threshold),
        blocks=blocks,
        mse=0.1,
        psnr_of_clips=16.0,
        bits_per_pixel=1.0,
    )
    return Evaluation(
        config=EvaluationConfig(thresholds=(threshold,), searches=("binary",)), model=model, model_id="made up",
        clips={"clip": 2 * len(needed)}, skipped={}, results=(result,), shown=(),
    )  # fmt: skip


@given(st.lists(st.none() | st.integers(4, 32), min_size=1, max_size=30))
def test_a_higher_cap_lets_more_blocks_meet_the_threshold_with_more_tokens(needed):
    evaluation = made_up(needed)
    points = evaluation.curve(0.1)
    assert points == sorted(points)
    assert sorted(p.share_met for p in points) == [p.share_met for p in points]
    assert sorted(p.mean_tokens for p in points) == [p.mean_tokens for p in points]
    for cap, share, mean in points:  # what each block does under the cap
        kept = [cap if n is None or n > cap else n for n in needed]
        assert share == np.mean([n is not None and n <= cap for n in needed])
        assert mean == pytest.approx(np.mean(kept))
    # Without a cap it is the run itself.
    assert points[-1].share_met == evaluation.results[0].share_met(0.1)
    assert points[-1].mean_tokens == pytest.approx(evaluation.results[0].mean_tokens)


# --- Models ------------------------------------------------------------------------------------


@pytest.mark.parametrize("share", [0.5, 0.01])
def test_a_model_of_one_count_is_evaluated_at_it_alone(tokenizer, clips, share):
    baseline = tokenizer.with_params(tokenizer.params, mask_type=f"fixed_{share}")
    config = EvaluationConfig(thresholds=(THRESHOLD, 0.5), num_tokens=(8, 16), pictures=1)
    found = evaluate(baseline, [clips / "a.mp4"], config, progress=False)
    (trained,) = token_masks.sample_num_kept(
        jax.random.key(0), (1,), min_kept=4, max_kept=32, keep_fraction=share
    )
    assert [tuple(result.condition) for result in found.results] == [("fixed", None, int(trained))]
    for threshold in config.thresholds:
        (point,) = found.curve(threshold)
        share_met = np.mean([block.loss <= threshold for block in found.results[0].blocks])
        assert point == (int(trained), share_met, int(trained))
        assert found.scalars()[f"eval/share_met@{threshold}"] == share_met
    assert list(found.pictures()) == [f"eval/a.mp4@{int(trained)}"]


def test_other_weights_compile_nothing_and_give_what_a_new_tokenizer_gives(
    tokenizer, clips, caplog
):
    config = EvaluationConfig(thresholds=(THRESHOLD,), num_tokens=(16,))
    files = [clips / "a.mp4", clips / "z.png"]
    first = evaluate(tokenizer, files, config, progress=False)
    other = jax.tree.map(lambda x: x * 1.01, tokenizer.params)
    again = tokenizer.with_params(other, model_id="step 2")
    caplog.clear()
    with jax.log_compiles():
        second = evaluate(again, files, config, progress=False)
    compiled = [r.getMessage() for r in caplog.records if r.getMessage().startswith("Compiling")]
    assert compiled == []
    assert second.model_id == "step 2" and tokenizer.model_id == "unnamed"
    assert second.scalars() != first.scalars()
    new = ElasticTokenizer(CONFIG, other, mesh=tokenizer.mesh)
    assert evaluate(new, files, config, progress=False).scalars() == second.scalars()


def test_wider_searches_give_the_same_and_one_count_costs_one_pass(tokenizer, clips, golden):
    wide = ElasticTokenizer(CONFIG, tokenizer.params, mesh=tokenizer.mesh, search_width=3)
    config = EvaluationConfig(
        thresholds=(THRESHOLD,), num_tokens=(16,), searches=("linear",), exact_color=True
    )
    narrow, found = (
        evaluate(t, [clips / "a.mp4"], config, progress=False) for t in (tokenizer, wide)
    )
    for a, b in zip(narrow.results, found.results, strict=True):
        assert [block.num_kept for block in a.blocks] == [block.num_kept for block in b.blocks]
    assert found.fixed()[0].passes_per_block == 1
    # Of the frames that the config asks for.
    made = tokenizer.encode(clips / "a.mp4", num_tokens=16, exact_color=True)
    other = tokenizer.encode(clips / "a.mp4", num_tokens=16)
    losses = [block.loss for block in found.fixed()[0].blocks]
    assert losses == [block.loss for block in made.blocks]
    assert losses != [block.loss for block in other.blocks]


# --- Files that are no good --------------------------------------------------------------------


def test_files_that_cannot_be_read_are_named_and_in_no_number(tokenizer, clips, tmp_path, caplog):
    (tmp_path / "text.mp4").write_text("not a film")
    data = bytearray((clips / "a.mp4").read_bytes())
    data[len(data) // 3 : -2000] = bytes(len(data) - 2000 - len(data) // 3)
    (tmp_path / "torn.mp4").write_bytes(data)  # opens, and breaks in the middle
    good = tmp_path / "z.png"
    good.write_bytes((clips / "z.png").read_bytes())
    config = EvaluationConfig(thresholds=(THRESHOLD,), num_tokens=(16,))
    found = evaluate(tokenizer, media.find_media(tmp_path), config, progress=False)
    assert list(found.clips) == ["z.png"] and "text.mp4" in found.skipped
    assert "text.mp4" in caplog.text
    alone = evaluate(tokenizer, [good], config, progress=False)
    assert alone.scalars() == found.scalars()
    with pytest.raises(ValueError, match=r"None of 1 files could be read.*text\.mp4"):
        evaluate(tokenizer, [tmp_path / "text.mp4"], config, progress=False)


def test_a_clip_that_breaks_midway_is_left_out_whole(tokenizer, clips, monkeypatch):
    open_session, calls = tokenizer.open_session, []

    class Breaking:
        def __getattr__(self, name):
            return getattr(tokenizer, name)

        def open_session(self, source, options):
            session = open_session(source, options)
            calls.append(source)
            if len(calls) == 2:  # the second run over the first clip
                monkeypatch.setattr(type(session), "__iter__", broken)
            else:
                monkeypatch.undo()
            return session

    def broken(self):
        raise media.MediaError("a.mp4 breaks off")
        yield

    config = EvaluationConfig(thresholds=(THRESHOLD,), num_tokens=(16,))
    files = [clips / "a.mp4", clips / "z.png"]
    found = evaluate(Breaking(), files, config, progress=False)  # type: ignore[arg-type]
    assert list(found.clips) == ["z.png"] and found.skipped == {"a.mp4": "a.mp4 breaks off"}
    assert {block.clip for result in found.results for block in result.blocks} == {"z.png"}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(thresholds=(0.0,)), "threshold=0.0 must be a finite error above 0"),
        (dict(num_tokens=(1.5,)), "num_tokens=1.5 must be a count of 1 or more, or a share"),
        (dict(searches=("fixed",)), "fixed counts are num_tokens="),
        (dict(searches=("binery",)), r"searches=\['binery'\] must be among"),
        (dict(metrics=("vmaf",)), r"metrics=\['vmaf'\] must be among"),
        (dict(codecs=("mpeg2",)), r"codecs=\['mpeg2'\] must be among"),
        (dict(num_counts=1), "num_counts=1 must be 2 or more, or 0 for all"),
        (dict(num_tokens=(64,)), "must be at most the 32 tokens of a block"),
    ],
)
def test_options_that_cannot_be_served_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        EvaluationConfig(**options).counts(CONFIG)


# --- The script --------------------------------------------------------------------------------


def run(*flags):
    return app.run(script.EVALUATE, script.evaluate, flags)


@pytest.fixture(scope="module")
def models(tokenizer, tmp_path_factory):
    """An elastic model and a baseline of the same shape, each in a folder."""
    folder = tmp_path_factory.mktemp("models")
    checkpoints.save_pretrained(folder / "elastic", CONFIG, tokenizer.params)
    half = CONFIG.replace(mask_type="fixed_0.5")
    checkpoints.save_pretrained(folder / "half", half, tokenizer.params)
    return f"{folder}/elastic,baseline={folder}/half"


def test_the_script_compares_models_and_searches(clips, models, tmp_path, capsys):
    out = tmp_path / "not there yet"
    command = [
        f"--input_path={clips}", f"--output_folder={out}", f"--models={models}", "--mesh_dim=1,1,1,-1",
        f"--thresholds={THRESHOLD},0.5", "--num_tokens=8,1.0", "--max_frames=4", "--metrics=ssim",
        "--codec=jpeg",
    ]  # fmt: skip
    assert run(*command, "--searches=binary,linear", "--num_counts=5") == 0
    assert sorted(file.name for file in out.iterdir()) == sorted(tables.RESULTS)
    shown = capsys.readouterr().out
    assert "Searches:" in shown and "the bits of 16 tokens of baseline" in shown
    (line,) = [
        line for line in shown.splitlines() if line.startswith("elastic") and "  8 tokens" in line
    ]
    assert line.count("%") == 2 and f"met {THRESHOLD} (" in shown  # a column for each threshold

    def read(name):
        with open(out / name, newline="", encoding="utf-8") as file:
            return list(csv.DictReader(file))

    blocks, summary, searches = (read(f"{name}.csv") for name in ("blocks", "summary", "searches"))
    assert list(blocks[0]) == (
        "model clip block search threshold num_tokens kept loss met passes drafts seconds".split()
    )
    # 2 + 2 + 1 blocks; 2 counts and 2 searches under 2 thresholds, and the one run of the baseline.
    assert len(blocks) == 5 * (2 + 2 * 2 + 1)
    assert {row["kept"] for row in blocks if row["model"] == "baseline"} == {"16"}
    assert list(summary[0]) == (
        "model mask_type search threshold num_tokens blocks share_met mean_tokens bits_per_pixel psnr psnr_of_clips ssim lpips dists "
        "fvd fid passes_per_block drafts_per_block seconds_per_block".split()
    )
    coded = [row for row in summary if row["search"] == "jpeg"]
    assert [row["num_tokens"] for row in coded] == ["8", "32", "16"]
    summary = [row for row in summary if row not in coded]
    assert len(summary) == 2 * (2 + 2 + 1)
    for row in summary:
        mine = [
            float(b["loss"]) <= float(row["threshold"])
            for b in blocks
            if all(b[key] == row[key] for key in ("model", "search", "num_tokens"))
            and b["threshold"] in ("", row["threshold"])
        ]
        assert float(row["share_met"]) == pytest.approx(np.mean(mine))
    assert list(searches[0]) == (
        "model threshold search passes_per_block drafts_per_block seconds_per_block mean_tokens mean_tokens_above_optimum share_met".split()
    )
    assert {row["model"] for row in searches} == {"elastic"} and len(searches) == 4
    curves = read("curves.csv")
    assert list(curves[0]) == "model threshold cap share_met mean_tokens".split()
    assert [row["mean_tokens"] for row in curves if row["model"] == "baseline"] == ["16.0"] * 2
    everything = json.loads((out / "evaluation.json").read_text())
    assert list(everything["models"]) == ["elastic", "baseline"]
    assert [(d["model"], d["against"]) for d in everything["deltas"]] == [
        ("elastic", "jpeg"), ("baseline", "elastic"), ("baseline", "jpeg"),
    ]  # fmt: skip
    assert [len(ladder["rungs"]) for ladder in everything["ladders"]] == [2, 2, 1, 1]
    tried = [
        pair
        for result in everything["models"]["elastic"]["runs"]
        for b in result["blocks"]
        for pair in b["tried"]
    ]
    assert all(1 <= count <= 32 and math.isfinite(loss) for count, loss in tried)
    with Image.open(out / "evaluation.png") as figure:
        assert figure.size[0] > 1000

    assert run(*command) == 0  # one search: the comparison of the last time goes
    assert not (out / "searches.csv").exists()
    assert [path.name for path in tmp_path.iterdir()] == [out.name]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--models=elastic=nowhere"], "nowhere"),
        (["--models=a/b,c/b"], "two are called 'b'"),
        (["--thresholds=0.1,x"], "'x' is not a number"),
        (["--num_tokens=64"], "must be at most the 32 tokens"),
        (["--input_path=nowhere.mp4"], "There is no file 'nowhere.mp4'"),
        (["--searches=fixed"], "fixed counts are num_tokens="),
    ],
)
def test_what_cannot_work_is_refused_before_a_model_is_measured(
    clips, models, tmp_path, capsys, flags, message
):
    command = [f"--input_path={clips}", f"--output_folder={tmp_path}/out", f"--models={models}"]
    assert run(*command, *flags) == 1
    assert message in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_an_error_while_writing_leaves_the_folder_as_it_was(measured, tmp_path, monkeypatch):
    tables.write(tmp_path, {"earlier": measured})
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}

    def stop(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(tables, "plot", stop)
    with pytest.raises(OSError, match=f"No space left on device: '{tmp_path}'"):
        tables.write(tmp_path, {"elastic": measured})
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before

"""The scripts end to end, with the small models of the released system's golden files."""

import io
import pathlib
import re
import subprocess
import sys

import numpy as np
import pytest
from commands import infer, names
from PIL import Image
from report_cases import read_report
from small_models import CASES, CLIP, PHOTO

from elastic import checkpoints, media
from elastic.io import progress
from elastic.io.atomic import locked
from elastic.media import folders
from elastic.metrics import mse_of_psnr, psnr_of_mse
from elastic.pipeline import decode_files, load_model, result_folder
from elastic.pipeline import tokenize_files as runs
from elastic.tokenizer import EncodeOptions, resume
from elastic.tokens import TokenizedClip, npz_file

ROOT = pathlib.Path(__file__).resolve().parents[2]
EARLIER = npz_file.pack({})  # what tells the results of an earlier run from files of the user
REPORT = '{"clip": {}, "totals": {}}'


@pytest.fixture
def no_weights(monkeypatch):
    """Loading weights fails: what is refused before does not get there."""

    def load(*_: object, **__: object) -> None:
        raise AssertionError("The weights were loaded.")

    monkeypatch.setattr(checkpoints, "load_params", load)


def test_the_documented_command_writes_its_results(documented):
    folder, _ = documented
    assert names(folder) == ["plot.png", "report.json", "tokens.npz", "viz.mp4"]
    tokens = TokenizedClip.load(folder / "tokens.npz")
    assert (tokens.num_frames, len(tokens.blocks), tokens.threshold) == (11, 6, 0.522)
    assert (tokens.window_blocks, tokens.context, tokens.rate) == (4, "carry", 4.0)
    report = read_report(folder)
    assert report["totals"]["tokens"] == tokens.num_tokens
    assert [block["kept"] for block in report["blocks"]] == tokens.counts.tolist()
    assert all(block["passes"] >= 1 and block["seconds"] > 0 for block in report["blocks"])
    # The blocks' PSNR make up the clip's, each by its frames: 2 in all blocks but the last.
    psnr, frames = np.array([block["psnr"] for block in report["blocks"]]), [2] * 5 + [1]
    assert report["totals"]["psnr"] == pytest.approx(
        psnr_of_mse(np.average([mse_of_psnr(one) for one in psnr], weights=frames))
    )
    worst = report["totals"]["worst_block"]
    assert psnr[worst] == psnr.min() == report["totals"]["worst_block_psnr"]
    seconds = tokens.num_frames / tokens.rate
    assert report["totals"]["kbit_per_second"] == tokens.num_bits / seconds / 1000
    assert report["asked"]["threshold"] == 0.522 and report["file"]["rate"] == 30
    with media.open_clip(folder / "viz.mp4", resolution=64, rate=None) as video:
        assert (video.num_frames, video.rate) == (11, 4.0)
    # Neither file tells where on this machine the model lies, and the results are no media to tokenize.
    assert tokens.model_id == report["clip"]["model_id"]
    assert not pathlib.Path(tokens.model_id).is_absolute()
    assert tokens.model_id.endswith("ckpt/params_scan_fp32")
    assert media.find_media(folder) == []
    assert {*result_folder.RESULTS} & {*folders.results_among(names(folder))} == {
        "plot.png",
        "viz.mp4",
    }


@pytest.mark.parametrize(
    "make", [lambda path: path.touch(), lambda path: path.write_text("no film")]
)
def test_a_broken_file_is_one_line_and_leaves_nothing(golden, tmp_path, capsys, make):
    source = tmp_path / "film.mp4"
    make(source)
    command = [
        f"--input_path={source}",
        f"--output_folder={tmp_path}/new/out",
        f"--load_checkpoint=params::{golden}/vae/ckpt/params_scan_fp32",
        f"--update_elastic_config={CASES['vae']}",
        "--load_elastic_config=debug",
        "--threshold=0.5",
    ]
    assert infer(*command) == 1
    *_, last = capsys.readouterr().err.splitlines()
    assert last.startswith("scripts/inference.py: error: ") and "film.mp4" in last
    assert names(tmp_path) == ["film.mp4"]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--resolution=64"], "resolution=64, but the frames of this model have 32 rows"),
        (["--threshold=-1"], "threshold=-1.0 must be a finite number"),
        (["--search_alg=fixed"], "A fixed search needs num_tokens"),
        (["--search_alg=binary", "--n_codes=8"], "--n_codes=8 belongs to the fixed search"),
        (["--mesh_dim=1,1,3,1"], "mesh_dim='1,1,3,1' asks for 3 devices"),
        (["--input_path=nowhere.mp4"], "There is no file 'nowhere.mp4'"),
        (["--load_elastic_config="], "has no config.json beside it"),
        (["--search_width=0"], "--search_width=0 must be at least 1 count per call"),
        (["--max_blocks_per_chunk=-1"], "--max_blocks_per_chunk=-1 must be 1 or more"),
        (["--max_prop_codes=0.05"], "--max_prop_codes=0.05 of max_kept=32 allows"),
        (["--batch=0"], "batch=0 must be a multiple of dp * fsdp = 1"),
    ],
)
@pytest.mark.usefixtures("no_weights")
def test_options_that_cannot_be_served_are_refused(golden, tmp_path, capsys, flags, message):
    command = [
        f"--input_path={golden}/media/{PHOTO}",
        f"--output_folder={tmp_path}/out",
        f"--load_checkpoint=params::{golden}/fsq/ckpt/params_scan_fp32",
        f"--update_elastic_config={CASES['fsq']}",
        "--load_elastic_config=debug",
        "--threshold=0.5",
    ]
    assert infer(*command, *flags) == 1
    assert message in capsys.readouterr().err.splitlines()[-1]
    assert names(tmp_path) == []


def test_a_process_ends_an_error_in_one_line_and_exit_code_1(tmp_path):
    (tmp_path / "notes.mp4").write_text("not a film")
    done = subprocess.run(
        [sys.executable, ROOT / "scripts" / "inference.py", f"--input_path={tmp_path}/notes.mp4",
         f"--output_folder={tmp_path}/out", "--load_checkpoint=params::none", "--load_elastic_config=debug", "--threshold=1"],
        cwd=tmp_path, capture_output=True, text=True,
    )  # fmt: skip
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == "scripts/inference.py: error: There is no checkpoint 'none'.\n"
    assert names(tmp_path) == ["notes.mp4"]


def test_a_bar_moves_within_a_block_and_never_back():
    text = io.StringIO()
    with runs.tqdm(total=6, bar_format=runs._BAR, file=text, miniters=0, mininterval=0) as bar:
        for done in (0.25, 0.75, 1, 0.5, 2):
            runs._advance(bar, done)
    shown = re.findall(r"[0-9.]+/6", text.getvalue())
    assert shown[-1] == "2.0/6" and {"0.2/6", "0.8/6", "1.0/6"} <= {*shown}
    assert shown == sorted(shown)


def test_where_no_bar_is_shown_the_log_says_how_far_it_is(
    tokenizers, golden, tmp_path, caplog, monkeypatch
):
    monkeypatch.setattr(progress, "_SECONDS", 0.0)
    options = EncodeOptions(num_tokens=8, rate=4.0, max_frames=4)
    with caplog.at_level("INFO", logger="elastic"):
        runs.tokenize_file(tokenizers["fsq"], golden / "media" / CLIP, tmp_path / "a", options)
        runs.tokenize_file(
            tokenizers["fsq"], golden / "media" / CLIP, tmp_path / "b", options, progress=False
        )
    told = [line for line in caplog.messages if line.endswith("blocks are done.")]
    assert told[-1] == f"{CLIP}: 2 of 2 blocks are done."
    assert len(told) == len(set(told))  # the second run said nothing


def test_an_image_is_one_block_and_gives_a_picture(tokenizers, golden, tmp_path):
    tokenizer = tokenizers["fsq"]
    (tmp_path / "viz.mp4").write_text("of an earlier run")
    (tmp_path / "report.json").write_text(REPORT)
    (tmp_path / "notes.txt").write_text("of the user")
    run = runs.tokenize_file(
        tokenizer, golden / "media" / PHOTO, tmp_path, EncodeOptions(threshold=0.6), progress=False
    )
    assert names(tmp_path) == ["notes.txt", "plot.png", "report.json", "tokens.npz", "viz.png"]
    assert "(an image, 32x32)" in runs.summary(run)
    assert read_report(tmp_path)["totals"]["kbit_per_second"] is None
    tokens = TokenizedClip.load(tmp_path / "tokens.npz")
    assert tokens.is_image and len(tokens.blocks) == 1
    decode_files.decode_to_file(tokenizer, tokens, tmp_path / "again.png", progress=False)
    expected = tokenizer.reconstruct(golden / "media" / PHOTO, threshold=0.6)
    np.testing.assert_array_equal(
        np.asarray(Image.open(tmp_path / "again.png")), expected.frames[0]
    )


def test_the_files_of_a_folder_get_folders_and_a_bad_one_is_left_out(
    tokenizers, golden, tmp_path, caplog
):
    source, out = tmp_path / "in", tmp_path / "out"
    (source / "more").mkdir(parents=True)
    for name in ("a.png", "b.png", "b.webp", "more/a.png"):
        Image.open(golden / "media" / PHOTO).save(source / name)
    (source / "b.mp4").write_text("not a film")
    (source / "out").mkdir()
    (source / "out" / "viz.mp4").write_text("a result")
    inputs = runs.find_inputs(source, output_folder=source / "out")
    assert list(inputs.values()) == ["a", "b.mp4", "b.png", "b.webp", "more/a"]
    done, bad = runs.tokenize_files(
        tokenizers["fsq"], inputs, out, EncodeOptions(num_tokens=8), progress=False
    )
    assert [str(run.folder.relative_to(out)) for run in done] == ["a", "b.png", "b.webp", "more/a"]
    assert bad == [source / "b.mp4"] and "b.mp4" in caplog.text
    assert sorted(path.name for path in out.iterdir()) == ["a", "b.png", "b.webp", "more"]


def test_a_clip_cut_off_leaves_nothing(tokenizers, tmp_path, golden):
    data = (golden / "media" / CLIP).read_bytes()
    (tmp_path / "cut.mp4").write_bytes(data[: len(data) // 2])
    with pytest.raises(media.MediaError, match=r"cut\.mp4"):
        runs.tokenize_file(
            tokenizers["fsq"],
            tmp_path / "cut.mp4",
            tmp_path / "out",
            EncodeOptions(num_tokens=8, rate=None),
            progress=False,
        )
    assert names(tmp_path) == ["cut.mp4"]


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError(28, "No space left on device")])
@pytest.mark.parametrize("earlier", [True, False])
def test_a_picture_that_stops_midway_leaves_the_folder_as_it_was(
    tokenizers, golden, tmp_path, monkeypatch, error, earlier
):
    if earlier:
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / "tokens.npz").write_bytes(EARLIER)
    before = names(tmp_path)

    def stop(*_, **__):
        assert any("unfinished" in name for name in names(tmp_path))
        raise error

    monkeypatch.setattr(result_folder.report, "plot_report", stop)
    with pytest.raises((KeyboardInterrupt, OSError)):
        runs.tokenize_file(
            tokenizers["fsq"],
            golden / "media" / PHOTO,
            tmp_path / "out",
            EncodeOptions(num_tokens=8),
            progress=False,
        )
    assert names(tmp_path) == before
    if earlier:
        assert (tmp_path / "out" / "tokens.npz").read_bytes() == EARLIER


def test_results_are_only_replaced_when_that_is_wanted(tokenizers, golden, tmp_path):
    (tmp_path / "report.json").write_text("of an earlier run")
    with pytest.raises(ValueError, match="holds results already"):
        runs.tokenize_file(
            tokenizers["fsq"],
            golden / "media" / PHOTO,
            tmp_path,
            EncodeOptions(num_tokens=8),
            overwrite=False,
            progress=False,
        )
    with pytest.raises(ValueError, match="is a file"):
        runs.tokenize_file(
            tokenizers["fsq"],
            golden / "media" / PHOTO,
            tmp_path / "report.json",
            EncodeOptions(num_tokens=8),
            progress=False,
        )
    assert names(tmp_path) == ["report.json"]


@pytest.mark.parametrize(
    ("present", "source"),
    [
        ({"viz.mp4": "a holiday"}, PHOTO),
        ({"viz.png": "", "report.json": "{}"}, PHOTO),
        ({"tokens.npz": "of another program", "report.json": REPORT}, PHOTO),
        ({"report.json": REPORT, "viz.mp4": CLIP}, "viz.mp4"),
        ({"unfinished/original.rgb": CLIP}, "unfinished/original.rgb"),
    ],
)
def test_no_file_of_the_user_is_replaced(tokenizers, golden, tmp_path, present, source):
    """Not those in the folder, whatever their names are, and not the one that is tokenized."""
    for name, content in present.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        data = (golden / "media" / CLIP).read_bytes() if content == CLIP else content.encode()
        (tmp_path / name).write_bytes(data)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    source = golden / "media" / source if source == PHOTO else tmp_path / source
    with pytest.raises(ValueError, match="name another folder"):
        runs.tokenize_file(
            tokenizers["fsq"], source, tmp_path, EncodeOptions(num_tokens=8), progress=False
        )
    assert before == {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}


def test_a_run_reads_its_frames_one_block_after_the_other(
    tokenizers, golden, tmp_path, monkeypatch
):
    held = []

    class Frames(result_folder._Frames):
        def add(self, original, reconstruction):
            held.append(len(original))
            super().add(original, reconstruction)

    monkeypatch.setattr(result_folder, "_Frames", Frames)
    runs.tokenize_file(
        tokenizers["fsq"],
        golden / "media" / CLIP,
        tmp_path,
        EncodeOptions(num_tokens=8, rate=4, max_frames=5),
        progress=False,
    )
    assert held == [2, 2, 1]


@pytest.mark.parametrize("copies", [True, False])
@pytest.mark.parametrize("stage", ["after the third block", "drawing"])
def test_a_clip_that_stops_midway_goes_on_and_ends_like_an_unbroken_run(
    tokenizers, golden, tmp_path, monkeypatch, stage, copies
):
    """Also where the disk was full while the results were written; an earlier run's results stay until then."""
    monkeypatch.setattr(resume, "_COPY_SECONDS", 0.0 if copies else 1e9)
    monkeypatch.setattr(resume, "_COPY_SHARE", 0)
    options = EncodeOptions(threshold=0.522, rate=4, max_frames=11)
    source = golden / "media" / CLIP
    whole = runs.tokenize_file(
        tokenizers["fsq"], source, tmp_path / "whole", options, progress=False
    )
    out = tmp_path / "out"
    out.mkdir()
    (out / "tokens.npz").write_bytes(EARLIER)
    with monkeypatch.context() as patched:
        if stage == "drawing":
            patched.setattr(
                result_folder.report, "plot_report", _raise(OSError(28, "No space left"))
            )
        else:
            add = result_folder.ResultFolder.add
            patched.setattr(
                result_folder.ResultFolder,
                "add",
                lambda job, block: (
                    _raise(KeyboardInterrupt)() if len(job._costs) == 3 else add(job, block)
                ),
            )
        with pytest.raises((KeyboardInterrupt, OSError)):
            runs.tokenize_file(tokenizers["fsq"], source, out, options, progress=False)
    assert (out / "tokens.npz").read_bytes() == EARLIER
    assert names(out) == sorted(
        ["tokens.npz", "unfinished"]
        + [f"unfinished/{name}" for name in (".lock", "original.rgb", "reconstruction.rgb")]
        + ["unfinished/tokens.part"]
        + ["unfinished/tokens.part.cache"] * copies
        + (["unfinished/tokens.npz", "unfinished/report.json"] if stage == "drawing" else [])
    )
    part = decode_files.open_tokens(out / "unfinished" / "tokens.part")
    decode_files.decode_to_file(tokenizers["fsq"], part, tmp_path / "so_far.mp4", progress=False)
    with media.open_clip(tmp_path / "so_far.mp4", resolution=32, rate=None) as clip:
        assert clip.num_frames == (11 if stage == "drawing" else 8)
    again = runs.tokenize_file(tokenizers["fsq"], source, out, options, progress=False)
    assert names(out) == ["plot.png", "report.json", "tokens.npz", "viz.mp4"]
    assert TokenizedClip.load(out / "tokens.npz") == TokenizedClip.load(whole.folder / "tokens.npz")
    for run in (whole, again):  # what took time is not the same
        run.report["run"].pop("date")
        run.report["totals"].pop("seconds"), run.report["totals"].pop("frames_per_second")
        for block in run.report["blocks"]:
            block.pop("seconds")
    assert again.report == whole.report
    assert (out / "viz.mp4").read_bytes() == (whole.folder / "viz.mp4").read_bytes()


def _raise(error):
    def stop(*_, **__):
        raise error

    return stop


def test_a_folder_that_another_process_writes_into_is_refused(tokenizers, golden, tmp_path):
    (tmp_path / "unfinished").mkdir()
    with locked(tmp_path / "unfinished" / ".lock"):
        with pytest.raises(ValueError, match="Another process is writing into"):
            runs.tokenize_file(
                tokenizers["fsq"],
                golden / "media" / PHOTO,
                tmp_path,
                EncodeOptions(num_tokens=8),
                progress=False,
            )
        assert names(tmp_path) == ["unfinished", "unfinished/.lock"]


def test_files_side_by_side_give_the_results_of_files_one_by_one(tokenizers, golden, tmp_path):
    source = tmp_path / "in"
    source.mkdir()
    for name in (CLIP, PHOTO):
        (source / name).write_bytes((golden / "media" / name).read_bytes())
    (source / "bad.mp4").write_bytes(b"no video")
    inputs = runs.find_inputs(source)
    options = EncodeOptions(threshold=0.522, rate=4, max_frames=11)
    found = {}
    for batch in (1, 2):
        done, bad = runs.tokenize_files(
            tokenizers["fsq"], inputs, tmp_path / str(batch), options, batch=batch, progress=False
        )
        assert [path.name for path in bad] == ["bad.mp4"]
        found[batch] = {
            run.source.name: TokenizedClip.load(run.folder / "tokens.npz").counts.tolist()
            for run in done
        }
    assert found[1] == found[2] and len(found[1]) == 2
    assert names(tmp_path / "1") == names(tmp_path / "2")


def test_the_log_in_a_file_has_no_bar(tokenizers, golden, tmp_path, capsys):
    """Standard error is no terminal here, as in a file."""
    options = EncodeOptions(num_tokens=8, max_frames=2)
    runs.tokenize_file(tokenizers["fsq"], golden / "media" / CLIP, tmp_path, options)
    assert capsys.readouterr().err == ""


def test_a_model_is_one_short_line_and_with_verbose_all_of_it(tokenizers, caplog):
    for level, words, most in (("INFO", "tokens per block", 160), ("DEBUG", "attention '", 1000)):
        caplog.clear()
        caplog.set_level(level, logger="elastic")
        load_model.log_model(tokenizers["fsq"], name="a")
        (line,) = caplog.messages
        assert line.startswith("a: Model ") and words in line
        assert len(line.replace(tokenizers["fsq"].model_id, "")) < most

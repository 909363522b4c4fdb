"""The page of `elastictok demo` in a real browser: upload, move the slider, see another picture, take the tokens, decode them.

Runs where Gradio, Playwright and a Chromium are installed: `bash scripts/run_tests.sh --extras` sees to it.
Pictures of the page are left in pytest's folder (`--basetemp`).
"""

import io
import re
import shutil
import socket

import numpy as np
import pytest
from PIL import Image
from small_models import load_tokenizer

from elastic.cli import app, main

CHROMIUM = (
    shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
)
needs_browser = pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium")
pytestmark = pytest.mark.filterwarnings("ignore")  # those of Gradio and what it is built on


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        return probe.getsockname()[1]


@pytest.fixture(scope="module")
def address(golden):
    gradio = pytest.importorskip("gradio", reason="gradio is not installed")
    from elastic.cli.demo_page import build

    page = build(load_tokenizer(golden, "fsq"), quality=12.0, max_seconds=0.2)
    _, url, _ = page.launch(
        prevent_thread_lock=True,
        quiet=True,
        server_port=free_port(),
        max_file_size="1mb",
        show_error=True,
    )
    yield url
    page.close()
    gradio.close_all()


@pytest.fixture
def page(address):
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    with playwright.sync_playwright() as tools:
        browser = tools.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 1300, "height": 1000})
        page.set_default_timeout(120_000)
        page.goto(address)
        page.locator("#start").wait_for()
        yield page
        browser.close()


@pytest.fixture
def picture(tmp_path):
    draw = np.random.default_rng(0)
    path = tmp_path / "shown.png"
    Image.fromarray(draw.integers(0, 256, (40, 40, 3), dtype=np.uint8)).resize((160, 120)).save(
        path
    )
    return path


def pixels(page, place):
    """The bytes of the picture that a place of the page shows."""
    source = page.locator(f"{place} img").first
    source.wait_for()
    return source.get_attribute("src"), page.request.get(source.get_attribute("src")).body()


def set_slider(page, place, value):
    field = page.locator(f"{place} input[type=number]")
    field.fill(str(value))
    field.press("Enter")
    # What a hand does: take the knob, let it go.
    page.locator(f"{place} input[type=range]").dispatch_event("pointerup")


@needs_browser
def test_a_picture_is_uploaded_and_the_slider_gives_another(page, picture, tmp_path):
    page.locator("#source input[type=file]").set_input_files(picture)
    page.get_by_text("shown.png").first.wait_for()
    page.locator("#start").click()
    first, before = pixels(page, "#picture")
    page.screenshot(path=tmp_path / "1-tokenized.png")
    assert "tokens per block" in page.locator("#numbers").inner_text()

    page.get_by_label("tokens per block").check()
    set_slider(page, "#tokens", 5)
    page.wait_for_function(
        "before => document.querySelector('#picture img').src != before", arg=first
    )
    after = pixels(page, "#picture")[1]
    page.screenshot(path=tmp_path / "2-fewer-tokens.png")
    assert before != after
    assert re.search(r"mean 5\.0, min 5, max 5", page.locator("#numbers").inner_text())

    link = page.locator("#file a").first.get_attribute("href")
    (tmp_path / "tokens.npz").write_bytes(page.request.get(link).body())
    page.get_by_role("tab", name="Decode").click()
    page.locator("#given input[type=file]").set_input_files(tmp_path / "tokens.npz")
    page.get_by_text("tokens.npz").last.wait_for()
    page.locator("#decode").click()
    decoded = Image.open(io.BytesIO(pixels(page, "#decoded-picture")[1]))
    page.screenshot(path=tmp_path / "3-decoded.png")
    assert decoded.size == (32, 32)  # what the model makes of it


@needs_browser
def test_a_clip_is_shown_as_a_video_and_cut_at_the_limit(page, golden):
    page.locator("#source input[type=file]").set_input_files(
        golden / "media" / "clip_160x120_30fps_97f.mp4"
    )
    page.get_by_text("clip_160x120").first.wait_for()
    page.locator("#start").click()
    page.locator("#video video").wait_for()
    assert "(5 frames" in page.locator("#numbers").inner_text()  # 0.2 s at 24 frames/s


@needs_browser
def test_a_bad_file_is_named_and_the_page_goes_on(page, picture, tmp_path):
    bad = tmp_path / "film.mp4"
    bad.write_text("this is no film")
    page.locator("#source input[type=file]").set_input_files(bad)
    page.get_by_text("film.mp4").first.wait_for()
    page.locator("#start").click()
    message = page.locator(".toast-body, .toast-text").filter(has_text="film.mp4").first
    message.wait_for()
    assert str(tmp_path) not in message.inner_text()  # no path of the server


def test_the_demo_says_what_it_needs(monkeypatch, capsys):
    for flags, message in {
        ("--port=99999",): "--port=99999 must lie in 0 to 65535",
        ("--max_seconds=0",): "--max_seconds=0.0 must be above 0",
    }.items():
        assert main.main(["demo", *flags]) == 1
        assert message in capsys.readouterr().err
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert main.main(["demo"]) == 1
    assert "pip install 'elastictok[demo]'" in capsys.readouterr().err
    assert app.parse(main._load(main.COMMANDS["demo"].flags), [])["host"] == "127.0.0.1"

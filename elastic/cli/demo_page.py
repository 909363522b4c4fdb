"""The page of `elastictok demo`: upload or record a clip, move a slider, see what fewer tokens do. Needs Gradio."""

import contextlib
import importlib
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from elastic import media
from elastic.pipeline import decode_files, tokenize_files
from elastic.pipeline.result_folder import PICTURE, TOKENS, VIDEO
from elastic.tokenizer import ElasticTokenizer, EncodeOptions

_PICTURES = "original | reconstruction | tokens"
gr: Any = importlib.import_module("gradio")  # an extra, so that nobody's type checker need know it
QUALITY, COUNT = "quality in dB", "tokens per block"
_ABOUT = """# ElasticTok
A clip becomes as many tokens as its content needs: few for a still shot, many for a fast one. Upload or record one, choose a
quality or a number of tokens, and compare."""


class Actions:
    """What the buttons of the page do. Results lie in a folder of their own for each visitor, and go with the next result.

    Args:
      tokenizer: the model.
      max_seconds: what is taken of a longer clip.
    """

    def __init__(self, tokenizer: ElasticTokenizer, *, max_seconds: float):
        self._tokenizer, self._max_frames = tokenizer, max(1, round(24 * max_seconds))
        self._kept = Path(tempfile.mkdtemp(prefix="elastictok-demo-"))

    def tokenize(
        self,
        source: str | None,
        recorded: str | None,
        target: str,
        decibels: float,
        tokens: int,
        before: str,
        progress: Any = gr.Progress(),  # noqa: B008 - Gradio finds it by its default
    ) -> tuple[Any, ...]:
        """Updates of video, picture, file, numbers and folder, for a clip."""
        path = source or recorded
        if not path:
            raise gr.Error("Upload or record a clip or a picture first.")
        wanted: dict[str, Any] = dict(psnr=decibels) if target == QUALITY else dict(num_tokens=int(tokens))  # fmt: skip
        with self._new_folder(path, before) as folder:
            done = tokenize_files.tokenize_file(
                self._tokenizer, path, folder,
                EncodeOptions(rate=24.0, max_frames=self._max_frames, **wanted),
                progress=False,
                on_progress=lambda share: progress(share, desc="tokenizing"),
            )  # fmt: skip
        return (
            *_shown(folder / VIDEO, folder / PICTURE),
            str(folder / TOKENS),
            "```\n" + _without_paths(tokenize_files.summary(done)) + "\n```",
            str(folder),
        )

    def decode(self, path: str | None, before: str) -> tuple[Any, ...]:
        """Updates of video, picture and folder, for a token file."""
        if not path:
            raise gr.Error(
                "Upload a token file first: tokens.npz of a clip that this model tokenized."
            )
        tokenizer = self._tokenizer
        with self._new_folder(path, before) as folder:
            tokens = decode_files.open_tokens(path)
            decode_files.check_same_model(tokens, tokenizer.config, tokenizer.model_id)
            file = folder / ("decoded.png" if tokens.is_image else "decoded.mp4")
            decode_files.decode_to_file(tokenizer, tokens, str(file))
        return *_shown(folder / "decoded.mp4", folder / "decoded.png"), str(folder)

    @contextlib.contextmanager
    def _new_folder(self, path: str, before: str) -> Iterator[Path]:
        """A folder for results, which takes the place of an earlier one. A bad file is the visitor's to hear of."""
        folder = Path(tempfile.mkdtemp(dir=self._kept))
        try:
            yield folder
        except (ValueError, OSError) as error:
            remove(str(folder))
            raise gr.Error(str(error).replace(path, Path(path).name), duration=None) from error
        remove(before)


def remove(folder: str) -> None:
    """Removes a visitor's folder, if there is one."""
    if folder:
        shutil.rmtree(folder, ignore_errors=True)


def build(
    tokenizer: ElasticTokenizer,
    *,
    quality: float = 25.0,
    max_seconds: float = 10.0,
    examples: list[str] | None = None,
) -> Any:
    """The page, a `gradio.Blocks`.

    Args:
      tokenizer: the model. One visitor's clip goes through it at a time; the others wait in a line.
      quality: dB where the slider stands at first.
      max_seconds: what is taken of a longer clip.
      examples: paths of files that are offered to visitors.
    """
    config, actions = tokenizer.config, Actions(tokenizer, max_seconds=max_seconds)
    with gr.Blocks(title="ElasticTok", analytics_enabled=False, delete_cache=(3600, 3600)) as page:
        gr.Markdown(f"{_ABOUT}\n\nModel: `{Path(tokenizer.model_id).name}`, {config.resolution} x {config.resolution} pixels, "
                    f"at most {max_seconds:g} s of a clip.")  # fmt: skip
        with gr.Tab("Tokenize"), gr.Row():
            with gr.Column(scale=1):
                with gr.Tab("Upload"):
                    source = gr.File(label="clip or picture", type="filepath", elem_id="source")
                    if examples:
                        gr.Examples(examples, inputs=source, label="or take this one")
                with gr.Tab("Record"):
                    recorded = gr.Video(label="webcam", sources=["webcam"], include_audio=False)
                target = gr.Radio([QUALITY, COUNT], value=QUALITY, label="asked for", elem_id="target")  # fmt: skip
                decibels = gr.Slider(
                    10, 45, value=quality, step=0.5, label="every block reaches (dB)", elem_id="decibels"
                )  # fmt: skip
                tokens = gr.Slider(
                    config.min_toks, config.max_toks, value=config.max_toks // 4, step=1,
                    label="tokens of every block", visible=False, elem_id="tokens",
                )  # fmt: skip
                start = gr.Button("Tokenize", variant="primary", elem_id="start")
            with gr.Column(scale=2):
                video = gr.Video(label=_PICTURES, show_label=False, visible=False, autoplay=True, loop=True, elem_id="video")  # fmt: skip
                picture = gr.Image(label=_PICTURES, show_label=False, visible=False, elem_id="picture")  # fmt: skip
                numbers = gr.Markdown(elem_id="numbers")
                file = gr.File(label="tokens.npz", elem_id="file", interactive=False)
            folder = gr.State("", time_to_live=3600, delete_callback=remove)
        with gr.Tab("Decode"), gr.Row():
            with gr.Column(scale=1):
                given = gr.File(label="tokens.npz", type="filepath", elem_id="given")
                again = gr.Button("Decode", variant="primary", elem_id="decode")
            with gr.Column(scale=2):
                decoded_video = gr.Video(label="decoded", visible=False, elem_id="decoded-video")
                decoded_picture = gr.Image(
                    label="decoded", visible=False, elem_id="decoded-picture"
                )
            decoded_folder = gr.State("", time_to_live=3600, delete_callback=remove)

        target.change(
            lambda name: (gr.update(visible=name == QUALITY), gr.update(visible=name == COUNT)),
            target, [decibels, tokens],
        )  # fmt: skip
        inputs = [source, recorded, target, decibels, tokens, folder]
        outputs = [video, picture, file, numbers, folder]
        one_at_a_time: dict[str, Any] = dict(concurrency_limit=1, concurrency_id="model")
        start.click(actions.tokenize, inputs, outputs, **one_at_a_time)
        for slider in (decibels, tokens):  # a slider that is let go shows what it did
            slider.release(
                actions.tokenize, inputs, outputs, trigger_mode="always_last", **one_at_a_time
            )
        again.click(
            actions.decode, [given, decoded_folder], [decoded_video, decoded_picture, decoded_folder], **one_at_a_time
        )  # fmt: skip
    return page


def _shown(video: Path, picture: Path) -> tuple[Any, Any]:
    """Updates of the video's and the picture's place: the file that is there is shown."""
    return tuple(
        gr.update(value=str(path) if path.exists() else None, visible=path.exists())
        for path in (video, picture)
    )  # type: ignore[return-value]


def _without_paths(summary: str) -> str:
    """The table of a run without its first and last line, which name files of the server."""
    return "\n".join(line[2:] for line in summary.splitlines()[1:-1])


def example_files() -> list[str]:
    """The shipped clip, where it is beside the package."""
    clip = Path(__file__).resolve().parents[2] / "example" / "video.mp4"
    return [str(clip)] if media.is_media(clip) and clip.is_file() else []

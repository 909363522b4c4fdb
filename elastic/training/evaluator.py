"""Evaluation during training, on held-out files: tokens under thresholds, quality at fixed counts, and pictures."""

import itertools
import logging
import pathlib
from typing import Any

import jax

from elastic import media
from elastic.config import ElasticTokConfig
from elastic.distributed.hosts import is_first_host, wait_for_hosts
from elastic.distributed.mesh import make_mesh
from elastic.evaluation import evaluate as evaluation
from elastic.media.inputs import find_clips
from elastic.media.location import Place, is_part
from elastic.tokenizer import ElasticTokenizer
from elastic.training.config import TrainConfig
from elastic.training.state import to_host, used_params
from elastic.training.step import TrainState
from elastic.training.writers import Logs

log = logging.getLogger(__name__)

FOLDER = "eval"


def _readable(files: dict[str, Place]) -> list[Place] | dict[str, Place]:
    """The files that can be opened, by name where a path is none. A bad file must not end a run after thousands of steps."""
    good = {}
    for name, file in files.items():
        try:
            media.probe(file)
            good[name] = file
        except media.MediaError as error:
            if is_first_host():
                log.warning("Not evaluated on: %s", error)
    if not good:
        raise ValueError(
            f"None of the {len(files)} files to evaluate on can be read, such as {next(iter(files.values()))}; the log says why."
        )
    return good if any(map(is_part, good.values())) else list(good.values())


class Evaluator:
    """Evaluates the parameters of a run. The first host does it on its own devices, the others wait.

    Raises:
      ValueError: there is no file to evaluate on, or the options do not fit the model.
    """

    def __init__(self, config: TrainConfig, model_config: ElasticTokConfig):
        self._dtype, self._model_config = config.dtype, model_config
        self._save = config.save
        self._folder = pathlib.Path(config.output_dir) / FOLDER
        wanted = config.evaluation
        found = find_clips(wanted.path, flag="--eval_dataset.path")
        self._files = _readable(dict(itertools.islice(found.items(), wanted.max_files)))
        self._config = evaluation.EvaluationConfig(
            thresholds=wanted.thresholds,
            num_tokens=wanted.num_tokens,
            metrics=("psnr", "ssim"),
            max_frames=wanted.max_frames,
            fps=config.data.fps,
            reader=config.data.reader,
            exact_color=config.data.exact_color,
            fit=config.data.fit,
        )
        self._config.counts(model_config)  # raises now rather than after the first thousand steps
        self._tokenizer: ElasticTokenizer | None = None

    def __call__(self, step: int, state: TrainState, logs: Logs | None) -> None:
        """Evaluates the state, and writes numbers and pictures to the logs. Every host must call this."""
        params = to_host(state.best_params())
        if is_first_host() and logs is not None:
            params = used_params(self._save, params)
            found = evaluation.evaluate(
                self._tokenizer_of(params, f"step {step}"),
                self._files,
                self._config,
                progress=False,
            )
            scalars, pictures = found.scalars(), found.pictures()
            logs.write({"step": step} | scalars)
            logs.show(step, pictures)
            for name, picture in pictures.items():
                place = self._folder / f"{step:08d}" / f"{name.replace('/', '_')}.png"
                place.parent.mkdir(parents=True, exist_ok=True)
                media.write_image(place, picture)
            numbers = "  ".join(
                f"{name.removeprefix('eval/')} {value:.4g}" for name, value in scalars.items()
            )
            log.info("step %d  evaluation of %d files: %s", step, len(self._files), numbers)
        wait_for_hosts(f"evaluated {step}")

    def _tokenizer_of(self, params: dict[str, Any], model_id: str) -> ElasticTokenizer:
        """A tokenizer with these parameters, which reuses the compiled programs of earlier evaluations."""
        if self._tokenizer is None:
            mesh = make_mesh("!1,1,-1,1", jax.local_devices())
            self._tokenizer = ElasticTokenizer(
                self._model_config, params, dtype=self._dtype, mesh=mesh, model_id=model_id
            )
        else:
            self._tokenizer = self._tokenizer.with_params(params, model_id=model_id)
        return self._tokenizer

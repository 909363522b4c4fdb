"""The flags of training -> the configuration of a run; scripts/train.py and scripts/check_compile.py share it."""

import os

import jax

from elastic.cli.flags import RUN
from elastic.cli.flags_train import DATA, EVALUATION, LOG, OPTIMIZER, SAVE
from elastic.cli.options import naming_flags
from elastic.cli.script import Values
from elastic.config import ElasticTokConfig, check_resolution, load_config, update_config
from elastic.data.dataset import DataPosition
from elastic.data.packing import sequence_length
from elastic.training.config import TrainConfig


def model_of(flags: Values) -> ElasticTokConfig:
    """The model that the flags describe."""
    return update_config(load_config(flags["load_elastic_config"]), flags["update_elastic_config"])


def run_of(
    flags: Values, model_config: ElasticTokConfig, *, only_compiled: bool = False
) -> TrainConfig:
    """The run that the flags describe.

    Args:
      only_compiled: nothing will be read or written, so that no folder need be named.

    Raises:
      ValueError: a value is of no use.
    """
    folder = os.path.join(flags["logger.output_dir"], flags["logger.experiment_id"])
    if only_compiled:
        folder = "not written"
    with naming_flags({"resolution": f"{DATA.prefix}.resolution"}):
        check_resolution(flags[f"{DATA.prefix}.resolution"], model_config)
    config = RUN.read(
        flags,
        data=DATA.read(flags, **({"path": "not read"} if only_compiled else {})),
        optimizer=OPTIMIZER.read(flags),
        output_dir=folder.removesuffix(os.sep),
        log=LOG.read(flags),
        save=SAVE.read(flags),
        evaluation=EVALUATION.read(flags),
    )
    if not only_compiled:
        _check_run(config, model_config)
    return config


def _check_run(config: TrainConfig, model_config: ElasticTokConfig) -> None:
    """What can be said of a run before its files are looked through."""
    with naming_flags(DATA.names):
        length = sequence_length(config.data, model_config)
        _check_batch(config.data.batch_size, length, model_config.patch_dim)
    most = max(config.evaluation.num_tokens, default=0)
    if config.evaluation.freq and most > model_config.max_toks:
        raise ValueError(
            f"--eval_num_tokens={most} must be at most {model_config.max_toks}, the tokens of a block of this model."
        )
    if config.load_dataset_state:
        try:
            DataPosition.load(config.load_dataset_state)
        except OSError:
            pass  # a run that goes on does not need the file; a new run refuses it later
        except ValueError as error:
            raise ValueError(
                f"--load_dataset_state={config.load_dataset_state} is no saved position in the data; "
                "give the data_position.json of a milestone."
            ) from error


def _check_batch(batch_size: int, length: int, patch_dim: int) -> None:
    """Refuses a batch whose bare pixels are more than the memory of the hosts that share it."""
    needed = batch_size * length * patch_dim
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") * jax.process_count()
    if needed > memory:
        raise ValueError(
            f"batch_size={batch_size} sequences of seq_length={length} tokens are {needed / 1e9:.0f} GB of pixels, and there "
            f"are {memory / 1e9:.0f} GB of memory; take fewer or shorter ones."
        )

"""Trains a tokenizer on a folder of images and videos; `--help` lists the flags."""

from elastic.cli import app


def train(flags: app.Values) -> int:
    """Builds the configuration of a run and trains. A run that a signal stopped exits with 128 + its number."""
    from elastic.distributed import cpu_devices
    from elastic.distributed.hosts import Hosts, join_hosts

    hosts = Hosts(**flags.under("jax_distributed"))
    cpu_devices.set_up_cpu()
    join_hosts(hosts)

    from elastic.cli import train_config
    from elastic.training import loop as training

    model_config = train_config.model_of(flags)
    config = train_config.run_of(flags, model_config)
    finished = training.train(config, model_config, leave=app.leave)
    return 0 if finished.signal is None else 128 + finished.signal

"""Batches of the hosts to arrays on all devices."""

import contextlib
from collections.abc import Iterator
from typing import Any

import numpy as np
from jax.sharding import Mesh, NamedSharding

from elastic.config import ElasticTokConfig
from elastic.data.config import DataConfig
from elastic.data.dataset import HostBatch, TrainingData
from elastic.data.packing import sequence_length
from elastic.distributed.hosts import global_array, local_rows
from elastic.distributed.sharding import fitting_spec


class DeviceBatches:
    """Batches as global arrays: this process decodes the rows that its devices hold."""

    def __init__(self, mesh: Mesh, data: DataConfig, model_config: ElasticTokConfig):
        self._num_rows = data.batch_size
        shape = (self._num_rows, sequence_length(data, model_config), model_config.patch_dim)
        self._pixels = NamedSharding(mesh, fitting_spec(mesh, shape, "batch", "sequence", None))
        self._blocks = NamedSharding(mesh, fitting_spec(mesh, (self._num_rows, 1), "batch", None))
        self._rows = local_rows(self._pixels, shape)

    @contextlib.contextmanager
    def batches(self, data: TrainingData, first: int, count: int) -> Iterator[Iterator[HostBatch]]:
        """The batches from number `first` on, `count` of them."""
        with contextlib.closing(data.batches(first, first + count, self._rows)) as local:
            yield map(self.placed, local)

    def placed(self, local: HostBatch) -> HostBatch:
        """The rows of this process as its part of the global batch."""

        def place(x: np.ndarray, sharding: NamedSharding) -> Any:
            return global_array(x, self._rows, sharding, self._num_rows)

        return HostBatch(
            place(local.patches, self._pixels), *(place(x, self._blocks) for x in local[1:])
        )

"""Which engine tokenizes a data set, and where. Loads neither jax nor Ray."""

import dataclasses
import importlib.util

from elastic.io.options import at_least, check_options, option


@dataclasses.dataclass(frozen=True, kw_only=True)
class EngineOptions:
    """Which engine tokenizes a data set, and where. The help text of each field says what it means."""

    engine: str = option(
        "default",
        "who tokenizes: this process and others like it (default), or actors of Ray, which share the clips among them (ray; "
        "pip install 'elastictok[ray]')",
        choices=("default", "ray"),
    )
    ray_address: str = option(
        "",
        "with engine=ray, the cluster, as ray.init takes it: auto, HOST:PORT, ray://HOST:PORT; '': $RAY_ADDRESS, or without it a "
        "cluster of this machine alone, for this run",
    )
    ray_actors: int = option(
        0,
        "with engine=ray, the number of actors, each of which loads the model; 0: one per accelerator, else one per two cores",
        check=at_least(0),
    )

    def __post_init__(self):
        check_options(self)
        unused = [name for name in ("ray_address", "ray_actors") if getattr(self, name)]
        if self.engine != "ray" and unused:
            raise ValueError(
                f"{unused[0]}={getattr(self, unused[0])} is for engine=ray; give that too, or leave it out."
            )
        if self.engine == "ray" and importlib.util.find_spec("ray") is None:
            raise ValueError(
                "engine=ray needs Ray: pip install 'elastictok[ray]' (or ray). Without it, several processes share a data set."
            )

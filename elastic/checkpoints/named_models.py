"""Models that have a name: those shipped with the project, and the released ones.

The shipped models lie in `example/` of a checkout, and in `elastic/shipped/` of an installed package
(pyproject.toml puts them there). The released ones are repositories at Hugging Face.
"""

from pathlib import Path

import elastic

# name -> its folder in a checkout
SHIPPED = {"small-fsq": "example/fsq", "small-vae": "example/vae"}
# name -> its repository; `elastic.config.PRESETS` has a model's config under the same name
RELEASED = {
    "ElasticTok-FSQ": "LargeWorldModel/ElasticTok-FSQ",
    "ElasticTok-VAE": "LargeWorldModel/ElasticTok-VAE",
}
NAMES = (*SHIPPED, *RELEASED)


def shipped_folder(name: str) -> Path | None:
    """The folder of a shipped model, by its name or by its folder in a checkout; None if there is no such model here."""
    names = {folder: shipped for shipped, folder in SHIPPED.items()}
    name = names.get(name.rstrip("/"), name)
    if name not in SHIPPED:
        return None
    package = Path(elastic.__file__).resolve().parent
    places = (package / "shipped" / name, package.parent / SHIPPED[name])
    return next((place for place in places if place.is_dir()), None)


def preset_of(repository: str) -> str | None:
    """The preset that describes the model of a repository, which has no config.json itself; None for other repositories."""
    return next((name for name, repo in RELEASED.items() if repo == repository), None)

"""The type checker of the test run (pyproject.toml names it): beartype, with ints where floats go."""

from beartype import BeartypeConf, beartype

check = beartype(conf=BeartypeConf(is_pep484_tower=True))

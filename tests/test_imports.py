"""What an entrance loads: each runs in a process of its own, which then lists its modules."""

import subprocess
import sys
from pathlib import Path

import pytest

import elastic
from elastic.cli.main import COMMANDS

ROOT = Path(__file__).resolve().parent.parent

JAX = frozenset({"jax", "jaxlib", "flax", "optax", "orbax", "tensorstore"})
# Nothing needs these before it is asked for: plots, SSIM, downloads, a configuration for the Hub.
OPTIONAL = frozenset({"transformers", "huggingface_hub", "scipy", "matplotlib", "torch"})


def loaded_by(program: str) -> set[str]:
    """The packages that a new process has loaded after `program`."""
    program = f"{program}\nimport sys; print('\\n' + ' '.join(sys.modules))"
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True
    )
    return {name.partition(".")[0] for name in done.stdout.splitlines()[-1].split()}


@pytest.mark.parametrize(
    ("program", "without"),
    [
        ("import elastic; elastic.__version__; dir(elastic)", JAX | OPTIONAL | {"numpy"}),
        ("from elastic import ElasticTokConfig; ElasticTokConfig()", JAX | OPTIONAL),
        ("from elastic import TokenShards, TokenizedClip", JAX | OPTIONAL | {"grain"}),
        ("import elastic.tokens, elastic.tokens.npz_file", JAX | OPTIONAL | {"grain"}),
        # What a worker unpickles: a reader of files and grain's own objects.
        ("import elastic.data.reader, elastic.data.workers", JAX | OPTIONAL),
        ("from elastic import ElasticTokenizer", OPTIONAL | {"optax", "orbax", "tensorstore"}),
        (
            "import sys; sys.argv = ['inference.py', '--help']\n"
            "import runpy\n"
            "try: runpy.run_path('scripts/inference.py', run_name='__main__')\n"
            "except SystemExit: pass",
            JAX | OPTIONAL | {"numpy"},
        ),
        ("from elastic.cli.main import main; main(['--help'])", JAX | OPTIONAL | {"numpy"}),
        *(
            (f"from elastic.cli.main import main; main(['{name}', '--help'])", JAX | OPTIONAL)
            for name in COMMANDS
        ),
    ],
)
def test_an_entrance_loads_no_more_than_it_needs(program, without):
    assert loaded_by(program) & without == set()


def test_the_tokenizer_needs_jax():
    """Else the test above would look for the wrong names."""
    assert loaded_by("from elastic import ElasticTokenizer") >= {"jax", "flax"}


def test_the_package_hands_out_its_public_names():
    from elastic.tokens import TokenizedClip, TokenShards

    assert elastic.TokenShards is TokenShards and elastic.TokenizedClip is TokenizedClip
    assert set(elastic.__all__) <= set(dir(elastic))
    with pytest.raises(AttributeError, match="no attribute 'ElasticTokeniser'"):
        _ = elastic.ElasticTokeniser
    assert (Path(elastic.__file__).parent / "py.typed").is_file()

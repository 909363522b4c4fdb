"""The distribution: what `python -m build` makes, and that it works outside of the checkout. No network."""

import email
import os
import pathlib
import subprocess
import sys
import tarfile
import zipfile

import pytest

import elastic

ROOT = pathlib.Path(__file__).resolve().parents[1]

for tool in ("build", "hatchling"):
    pytest.importorskip(tool, reason=f"{tool} is not installed: pip install -r requirements-ci.txt")


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """The folder with a source distribution, and the wheel that was built from it."""
    folder = tmp_path_factory.mktemp("dist")
    command = [sys.executable, "-m", "build", "--no-isolation", f"--outdir={folder}", str(ROOT)]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


@pytest.fixture(scope="module")
def wheel(built):
    (path,) = built.glob("*.whl")
    assert path.name == f"elastictok-{elastic.__version__}-py3-none-any.whl"
    return path


def test_the_wheel_holds_the_package_and_the_shipped_models_and_nothing_else(wheel):
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    modules = {str(path.relative_to(ROOT)) for path in (ROOT / "elastic").rglob("*.py")}
    models = {
        f"elastic/shipped/small-{kind}/{file}"
        for kind in ("fsq", "vae")
        for file in ("config.json", "model.safetensors", "curves.json", "README.md")
    }
    assert modules | models | {"elastic/py.typed"} <= names
    assert {name.split("/")[0] for name in names} == {
        "elastic",
        f"elastictok-{elastic.__version__}.dist-info",
    }
    assert not [name for name in names if "__pycache__" in name]


def test_the_wheel_says_its_name_its_command_and_its_licence(wheel):
    about = f"elastictok-{elastic.__version__}.dist-info"
    with zipfile.ZipFile(wheel) as archive:
        metadata = email.message_from_bytes(archive.read(f"{about}/METADATA"))
        commands = archive.read(f"{about}/entry_points.txt").decode()
        assert f"{about}/licenses/LICENSE" in archive.namelist()
    assert (metadata["Name"], metadata["Version"]) == ("elastictok", elastic.__version__)
    assert "elastictok = elastic.cli.main:main" in commands


def test_the_source_distribution_is_without_tests(built):
    (path,) = built.glob("*.tar.gz")
    with tarfile.open(path) as archive:
        tops = {name.split("/")[1] for name in archive.getnames() if "/" in name}
    assert {"elastic", "example", "pyproject.toml", "README.md", "LICENSE"} <= tops
    assert not tops & {"tests", "outputs"}


def test_the_shipped_models_load_by_name_from_the_wheel(wheel, tmp_path):
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path / "installed")
    program = """
from elastic import checkpoints
from elastic.search import load_prior
for name in ("small-fsq", "small-vae"):
    config = checkpoints.load_config(name)
    assert checkpoints.load_params(name, config).keys() == {"encoder", "decoder", "token_order"}
    assert load_prior(checkpoints.folder_of(name)) is not None
    print(checkpoints.folder_of(name))
"""
    done = subprocess.run(
        [sys.executable, "-c", program],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(tmp_path / "installed")},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    shipped = tmp_path / "installed" / "elastic" / "shipped"
    assert done.stdout.split() == [str(shipped / "small-fsq"), str(shipped / "small-vae")]

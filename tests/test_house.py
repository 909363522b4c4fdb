"""The house rules that a machine can check: who may import whom, and what no file may hold."""

import ast
import pathlib
import re
import subprocess

import pytest

ROOT = pathlib.Path(__file__).resolve().parent.parent

# A room may import from the lines above its own, never from its own line or below. Put a new room
# on the highest line that serves it.
TABLE = """
    config hlo targets host_memory device_grid cache_folder
    mesh flops programs
    sharding
    patches
    masks
    ops.bits
    ops.dense
    ops.local
    ops.visits
    ops.reference ops.blockwise ops.pallas_tpu ops.pallas_gpu ops.feedforward
    ops.cudnn
    ops.kernels
    ops.ring
    ops.attention
    ops.past
    ops
    layers
    bottleneck
    model
    tensor_file
    float8 checksums
    streaming safetensor_file layer_layout
    checkpoint_source
    checkpoint_fit
    checkpoint
    media_file
    media_video
    media_read
    media_write
    media
    data_index dataset_plan
    data_plan
    frame_cache
    data_read
    data_workers
    data
    lpips_weights
    lpips
    losses metrics
    curves
    predict budget curve_prior
    search
    codec
    token_file fingerprint
    token_header
    tokens
    token_stream
    recording clips
    blocks token_shards
    lanes token_batches
    budgeting
    encoding
    tokenizer
    report
    jobs
    runs dataset_summary
    evaluation_records dataset_run
    evaluation
    evaluation_files
    optim linear_start
    train_config
    logs
    train_step
    train_checkpoints
    train_state
    train_log
    train_eval
    train
    aot
    cli_flags
    cli_flags_train
    cli
    train_flags
"""
ROWS = [line.split() for line in TABLE.strip().splitlines()]
RANK = {room: rank for rank, row in enumerate(ROWS) for room in row}
MOST_LINES = 450

ELASTIC = sorted((ROOT / "elastic").rglob("*.py"))
PYTHON = ELASTIC + sorted((ROOT / "scripts").rglob("*.py"))
WRAPPERS = [*sorted((ROOT / "scripts").glob("run_*.sh")), ROOT / ".ci" / "run"]
SHELL = [*WRAPPERS, ROOT / "scripts" / "setup_env.sh", ROOT / "tpu_requirements.sh"]


def name(path: pathlib.Path) -> str:
    return str(path.relative_to(ROOT))


def room_of(path: pathlib.Path) -> str:
    """elastic/ops/reference.py -> "ops.reference", elastic/ops/__init__.py -> "ops"."""
    parts = path.relative_to(ROOT / "elastic").with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def is_room(dotted: str) -> bool:
    path = ROOT.joinpath("elastic", *dotted.split("."))
    return path.with_suffix(".py").is_file() or (path / "__init__.py").is_file()


def imported_modules(tree: ast.AST) -> set[str]:
    """Full names of all modules that are imported anywhere in the file, inside functions too."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: say `from elastic...`, not `from .`"
            module = node.module or ""
            for alias in node.names:
                below = f"{module}.{alias.name}".removeprefix("elastic.")
                inside = module.split(".")[0] == "elastic" and is_room(below)
                found.add(f"elastic.{below}" if inside else module)
    return found


def rooms_imported(path: pathlib.Path) -> set[str]:
    modules = imported_modules(ast.parse(path.read_text(encoding="utf-8")))
    return {module.removeprefix("elastic.") for module in modules if module.startswith("elastic.")}


def test_every_room_stands_in_the_table():
    rooms = {room_of(path) for path in ELASTIC} - {""}
    assert rooms <= RANK.keys()


@pytest.mark.parametrize("path", ELASTIC, ids=name)
def test_imports_only_point_up_the_table(path):
    room = room_of(path)
    if not room:  # elastic/__init__.py: opening one room must not open all the others
        assert not rooms_imported(path)
        return
    for other in rooms_imported(path):
        assert RANK[other] < RANK[room], f"{room} imports {other}, which stands beside or below it"


@pytest.mark.parametrize("path", ELASTIC, ids=name)
def test_nothing_in_the_package_imports_the_scripts_or_the_tests(path):
    roots = {module.split(".")[0] for module in imported_modules(ast.parse(path.read_text()))}
    assert not roots & {"scripts", "tests"}


@pytest.mark.parametrize("path", PYTHON, ids=name)
def test_no_file_is_longer_than_a_sitting(path):
    assert len(path.read_text(encoding="utf-8").splitlines()) <= MOST_LINES


def forbidden(tree: ast.AST) -> list[str]:
    """What runs text as code: `eval`, `exec`, pickles, shells."""
    found = [
        f"import of {module}"
        for module in imported_modules(tree)
        if module.split(".")[0] in {"pickle", "cloudpickle", "dill", "marshal", "shelve"}
    ]
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            called = ast.unparse(node.func)
            if called in {"eval", "exec", "os.system", "os.popen"}:
                found.append(f"line {node.lineno}: {called}(")
            for keyword in node.keywords:
                allows = isinstance(keyword.value, ast.Constant) and keyword.value.value is True
                if keyword.arg in {"shell", "allow_pickle"} and allows:
                    found.append(f"line {node.lineno}: {keyword.arg}=True")
    return found


@pytest.mark.parametrize("path", PYTHON, ids=name)
def test_nothing_runs_text_as_code(path):
    assert forbidden(ast.parse(path.read_text(encoding="utf-8"))) == []


@pytest.mark.parametrize(
    "source",
    [
        "eval(x)",
        "from pickle import load",
        "subprocess.run(x, shell=True)",
        "import os; os.system(x)",
    ],
)
def test_the_search_for_such_code_finds_it(source):
    assert len(forbidden(ast.parse(source))) == 1


@pytest.mark.parametrize("path", [*PYTHON, *SHELL, ROOT / "README.md"], ids=name)
def test_no_path_of_one_machine_is_written_down(path):
    places = "|".join(["home", "root", "work", "tmp", "Users", "mnt", "opt"])
    assert re.findall(rf"(?<![\w.:/$}}])/(?:{places})/\S*", path.read_text(encoding="utf-8")) == []


@pytest.mark.parametrize("path", ELASTIC, ids=name)
def test_every_public_function_and_class_says_what_it_is(path):
    silent = []
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if not isinstance(node, ast.FunctionDef | ast.ClassDef) or node.name.startswith("_"):
            continue
        inner = node.body if isinstance(node, ast.ClassDef) else []
        methods = [item for item in inner if isinstance(item, ast.FunctionDef)]
        public = [item for item in methods if not item.name.startswith("_")]
        # Flax gives `setup` its meaning; there is nothing to add.
        silent += [
            item.name
            for item in [node, *public]
            if item.name != "setup" and ast.get_docstring(item) is None
        ]
    assert silent == []


@pytest.mark.parametrize("path", SHELL, ids=name)
def test_every_shell_script_is_well_formed(path):
    subprocess.run(["bash", "-n", path], check=True)


@pytest.mark.parametrize("path", WRAPPERS, ids=name)
def test_every_wrapper_stops_at_the_first_failure(path):
    assert "\nset -euo pipefail\n" in path.read_text(encoding="utf-8")


def test_the_readme_names_only_files_that_exist():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    named = set(re.findall(r"\b(?:elastic|scripts|tests)/[\w/]*\.(?:py|sh)\b", readme))
    named |= set(re.findall(r"\]\((?!https?:|#)([^)#]+)\)", readme))
    assert [file for file in sorted(named) if not (ROOT / file).exists()] == []

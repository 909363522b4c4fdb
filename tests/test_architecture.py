"""The house rules that a machine can check: who may import whom, and what no file may hold."""

import ast
import pathlib
import re
import subprocess

import pytest

ROOT = pathlib.Path(__file__).resolve().parent.parent

# A package imports packages of lower levels only, never one of its own level.
LEVELS = """
    config patches io distributed
    ops media metrics search tokens
    model data report
    checkpoints
    tokenizer
    evaluation pipeline
    training
    cli aot
"""
LEVEL = {
    name: level for level, row in enumerate(LEVELS.strip().splitlines()) for name in row.split()
}
# On the ground floor, config may use io.
GROUND = {("config", "io")}

ELASTIC = sorted((ROOT / "elastic").rglob("*.py"))
PYTHON = ELASTIC + sorted((ROOT / "scripts").rglob("*.py"))
WRAPPERS = [*sorted((ROOT / "scripts").glob("run_*.sh")), ROOT / ".ci" / "run"]
SHELL = [*WRAPPERS, ROOT / "scripts" / "setup_env.sh", ROOT / "tpu_requirements.sh"]


def name(path: pathlib.Path) -> str:
    return str(path.relative_to(ROOT))


def module_of(path: pathlib.Path) -> str:
    """elastic/ops/dense.py -> "ops.dense", elastic/ops/__init__.py -> "ops"."""
    parts = path.relative_to(ROOT / "elastic").with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def is_module(dotted: str) -> bool:
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
                inside = module.split(".")[0] == "elastic" and is_module(below)
                found.add(f"elastic.{below}" if inside else module)
    return found


def own_imports(path: pathlib.Path) -> set[str]:
    """Modules of the project that a file imports, without "elastic."."""
    modules = imported_modules(ast.parse(path.read_text(encoding="utf-8")))
    return {module.removeprefix("elastic.") for module in modules if module.startswith("elastic.")}


def test_every_package_stands_on_a_level():
    packages = {module_of(path).split(".")[0] for path in ELASTIC} - {""}
    assert packages == LEVEL.keys()


@pytest.mark.parametrize("path", ELASTIC, ids=name)
def test_packages_import_lower_levels_only(path):
    package = module_of(path).split(".")[0]
    if not package:  # elastic/__init__.py hands out names lazily
        return
    for module in own_imports(path):
        other = module.split(".")[0]
        lower = LEVEL[other] < LEVEL[package] or (package, other) in GROUND
        assert other == package or lower, f"{package} imports {module}, which is not below it"


def test_no_files_import_each_other_in_a_circle():
    imports = {module_of(path): own_imports(path) for path in ELASTIC}
    done: set[str] = set()

    def visit(module: str, above: tuple[str, ...]) -> None:
        assert module not in above, " -> ".join([*above[above.index(module) :], module])
        if module not in done:
            for other in sorted(imports[module]):
                visit(other, (*above, module))
            done.add(module)

    for module in sorted(imports):
        visit(module, ())


@pytest.mark.parametrize("path", ELASTIC, ids=name)
def test_nothing_in_the_package_imports_the_scripts_or_the_tests(path):
    roots = {module.split(".")[0] for module in imported_modules(ast.parse(path.read_text()))}
    assert not roots & {"scripts", "tests"}


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


@pytest.mark.parametrize("path", [*PYTHON, *SHELL], ids=name)
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

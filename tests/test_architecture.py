"""The house rules that a machine can check: who may import whom, and what no file may hold."""

import ast
import pathlib
import re
import subprocess
import tokenize

import pytest

ROOT = pathlib.Path(__file__).resolve().parent.parent

# A package imports packages of lower levels only, never one of its own level.
LEVELS = """
    config patches tiles io distributed
    ops media metrics search tokens
    model data report
    checkpoints
    tokenizer
    evaluation pipeline
    training
    aot
    cli
"""
LEVEL = {
    name: level for level, row in enumerate(LEVELS.strip().splitlines()) for name in row.split()
}
# On the ground floor, config may use io.
GROUND = {("config", "io")}

ELASTIC = sorted((ROOT / "elastic").rglob("*.py"))
PYTHON = ELASTIC + sorted((ROOT / "scripts").rglob("*.py"))
WRAPPERS = [*sorted((ROOT / "scripts").glob("run_*.sh")), ROOT / ".ci" / "run"]
SHELL = [
    *WRAPPERS,
    ROOT / "scripts" / "setup_env.sh",
    ROOT / "scripts" / "setup_paths.sh",
    ROOT / "tpu_requirements.sh",
]


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


# Names that this project once had for things that the field names otherwise (glossary of elastic/README.md).
RENAMED = set(
    """
    Past past past_spec attention_with_past KeysValues Lanes lanes lane Visits meetings Ids HIDDEN How Scope Options
    on_device on_ring Places hide turned Compute pairs_apart Setting Waiting Encoding Recording Job Shown
    Memory Pictures Sequences Batches Feed check_fit written_beside write_atomically atomic_file Stopped StopSign
    answer_grain linear_start
""".split()
)
# Here the words have another meaning: a vector register of a TPU has lanes.
ELSEWHERE = {"elastic/ops/attention/pallas_tpu.py": {"lanes"}}
METAPHORS = r"\b(?:rubbish|dear|(?<!make )(?<!makes )room(?! for\b))\b"


def defined_names(tree: ast.AST) -> set[str]:
    """Functions, classes, arguments, variables and fields, without underscores in front."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            found.add(node.name)
        elif isinstance(node, ast.arg):
            found.add(node.arg)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            found.add(node.id)
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            found.add(node.attr)
        elif isinstance(node, ast.alias):
            found.add(node.asname or node.name)
    return {name.lstrip("_") for name in found}


def prose(path: pathlib.Path) -> str:
    """Docstrings and comments of a file."""
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef)
    nodes = ast.walk(ast.parse(path.read_text(encoding="utf-8")))
    texts = [ast.get_docstring(node) or "" for node in nodes if isinstance(node, documented)]
    with open(path, "rb") as file:
        texts += [t.string for t in tokenize.tokenize(file.readline) if t.type == tokenize.COMMENT]
    return "\n".join(texts)


@pytest.mark.parametrize("path", ELASTIC, ids=name)
def test_names_and_sentences_use_the_words_of_the_field(path):
    names = defined_names(ast.parse(path.read_text(encoding="utf-8")))
    assert names & RENAMED <= ELSEWHERE.get(name(path), set())
    assert re.findall(METAPHORS, prose(path)) == []


def test_the_search_for_such_names_finds_them():
    source = "class _Lanes:\n    def put(self, Ids, *, meetings): self.on_ring = past = 1"
    assert defined_names(ast.parse(source)) & RENAMED == {
        "Lanes",
        "Ids",
        "meetings",
        "on_ring",
        "past",
    }


@pytest.mark.parametrize("path", SHELL, ids=name)
def test_every_shell_script_is_well_formed(path):
    subprocess.run(["bash", "-n", path], check=True)


@pytest.mark.parametrize("path", WRAPPERS, ids=name)
def test_every_wrapper_stops_at_the_first_failure(path):
    assert "\nset -euo pipefail\n" in path.read_text(encoding="utf-8")

"""The documents: their code parses, their commands have scripts and flags that exist, their links lead somewhere.

Nothing is computed here. The README's Python lines run in tests/acceptance/test_shipped.py.
"""

import ast
import functools
import importlib
import itertools
import pathlib
import re
import shlex
import subprocess
from typing import NamedTuple

import pytest

from elastic.cli.flags import Script

ROOT = pathlib.Path(__file__).resolve().parents[1]
FOLDERS = (".github", "elastic", "scripts", "tests", "example")
DOCUMENTS = sorted(
    [*ROOT.glob("*.md"), *(path for folder in FOLDERS for path in (ROOT / folder).rglob("*.md"))]
)
# What documents may name: not what runs write, and not a virtual environment.
FILES = sorted(
    str(path.relative_to(ROOT))
    for top in (*FOLDERS, "imgs", ".ci")
    for path in (ROOT / top).rglob("*")
    if path.is_file() and "outputs" not in str(path) and "__pycache__" not in path.parts
) + [path.name for path in ROOT.glob("*.*") if path.is_file()]

SCRIPT = re.compile(r"(?:[\w./]*/)?scripts/[\w/]+\.(?:py|sh)")
TEST_FLAGS = {"quick", "extras"}  # of run_tests.sh; its other arguments go to pytest
FOREIGN_MODULES = {"torch"}  # which documents show beside the package; it is no requirement
# Flags of other programs, which documents name.
FOREIGN = {"durations", "help", "xla_force_host_platform_device_count", "h", "version"}


def name(path: pathlib.Path) -> str:
    return str(path.relative_to(ROOT))


each_document = pytest.mark.parametrize("path", DOCUMENTS, ids=name)


class CodeBlock(NamedTuple):
    """A fenced block: its language, its text, and the line of the document where it starts."""

    language: str
    text: str
    line: int


def code_blocks(text: str) -> list[CodeBlock]:
    """The fenced blocks of a document."""
    found = re.finditer(r"^( *)```(\w*)\n(.*?)^ *```$", text, re.MULTILINE | re.DOTALL)
    return [CodeBlock(m[2], m[3], text[: m.start()].count("\n") + 2) for m in found]


def prose(text: str) -> str:
    """The document without its fenced blocks."""
    return re.sub(r"^ *```\w*\n.*?^ *```$", "", text, flags=re.MULTILINE | re.DOTALL)


def inline_code(text: str) -> list[str]:
    """What stands between backticks in the prose."""
    return [" ".join(span.split()) for span in re.findall(r"`([^`]+)`", prose(text))]


def is_command(span: str) -> bool:
    return (
        SCRIPT.search(span) is not None
        and re.match(r"(\w+=\S* )*(bash|python3?) ", span) is not None
    )


def commands(text: str) -> list[list[str]]:
    """Words of every command that runs a script of ours, with the assignments before it."""
    lines = [b.text for b in code_blocks(text) if b.language in ("bash", "sh")]
    lines += [span for span in inline_code(text) if is_command(span)]
    found = []
    for line in "\n".join(lines).replace("\\\n", " ").splitlines():
        if "<" in line:  # a template
            continue
        words = shlex.split(line, comments=True)
        for is_end, part in itertools.groupby(words, lambda word: word in {"&&", ";", "|"}):
            command = list(part)
            if not is_end and any(SCRIPT.fullmatch(word) for word in command):
                found.append(command)
    return found


def script_of(command: list[str]) -> str:
    return next(word for word in command if SCRIPT.fullmatch(word))


@functools.cache
def source(script: str) -> str:
    return (ROOT / script).read_text(encoding="utf-8")


@functools.cache
def flags_of(script: str) -> frozenset[str]:
    """The flags that a script or the script behind a wrapper takes."""
    if script.endswith(".sh"):
        behind = set(
            re.findall(
                r"scripts/[\w/]+\.(?:py|sh)", re.sub(r"^#.*", "", source(script), flags=re.M)
            )
        )
        behind -= {script, "scripts/setup_env.sh"}
        names = [flags_of(other) for other in behind if other != "scripts/prepare_env.py"]
        return frozenset(TEST_FLAGS if script.endswith("run_tests.sh") else set()).union(*names)
    declared = re.findall(r'add_argument\(\s*"--([\w.]+)"', source(script))
    for other in re.findall(r"^from (scripts\.[\w.]+) import", source(script), re.MULTILINE):
        declared += flags_of(other.replace(".", "/") + ".py")
    if "from elastic.cli import app" in source(script):
        module = importlib.import_module(script.removesuffix(".py").replace("/", "."))
        scripts = [value for value in vars(module).values() if isinstance(value, Script)]
        assert any(script == found.name for found in scripts) or script.startswith("scripts/tools/")
        declared += [
            flag.name
            for found in scripts
            if pathlib.PurePath(found.name).name == pathlib.PurePath(script).name
            for flag in found.flags
        ]
    return frozenset(declared)


def all_flags() -> set[str]:
    scripts = [file for file in FILES if re.fullmatch(r"scripts/[\w/]+\.(py|sh)", file)]
    return set().union(*(flags_of(script) for script in scripts if "setup_env" not in script))


def variables_of(wrapper: str) -> set[str]:
    """The variables that a wrapper lets one fill in, those of the wrapper that it calls included."""
    text = source(wrapper)
    names = set(re.findall(r"^(?:export )?(\w+)=", text, re.MULTILINE))
    for other in re.findall(r"bash (scripts/\w+\.sh)", text):
        if other != wrapper and "run_tests" not in other:
            names |= set(re.findall(r"^(?:export )?(\w+)=", source(other), re.MULTILINE))
    return names | {"ELASTIC_PYTHON", "JAX_PLATFORMS"}


# --- Code --------------------------------------------------------------------------------------


@each_document
def test_python_blocks_compile_and_what_they_import_exists(path):
    for block in code_blocks(path.read_text(encoding="utf-8")):
        if block.language != "python":
            continue
        for node in ast.walk(ast.parse(block.text, f"{name(path)}, line {block.line}")):
            if isinstance(node, ast.Import):
                for alias in (alias for alias in node.names if alias.name not in FOREIGN_MODULES):
                    importlib.import_module(alias.name)
            elif isinstance(node, ast.ImportFrom):
                module = importlib.import_module(node.module or "")
                for alias in node.names:
                    if not hasattr(module, alias.name):
                        importlib.import_module(f"{node.module}.{alias.name}")


@each_document
def test_shell_blocks_are_well_formed(path):
    for block in code_blocks(path.read_text(encoding="utf-8")):
        if block.language in ("bash", "sh"):
            done = subprocess.run(["bash", "-n"], input=block.text, capture_output=True, text=True)
            assert done.returncode == 0, f"{name(path)}, line {block.line}: {done.stderr}"


@each_document
def test_every_block_says_its_language(path):
    blocks = code_blocks(path.read_text(encoding="utf-8"))
    assert [block.line for block in blocks if not block.language] == []


# --- Commands ----------------------------------------------------------------------------------


@each_document
def test_commands_name_scripts_flags_and_variables_that_exist(path):
    for command in commands(path.read_text(encoding="utf-8")):
        script = script_of(command)
        assert script in FILES, f"there is no {script}: {shlex.join(command)}"
        given = [word[2:].partition("=")[0] for word in command if re.match(r"--\w", word)]
        unknown = set(given) - flags_of(script) - {"help"}
        if not script.endswith("run_tests.sh"):
            assert not unknown, f"{script} has no {sorted(unknown)}: {shlex.join(command)}"
        before = command[: command.index(script)]
        assigned = {word.partition("=")[0] for word in before if re.match(r"\w+=", word)}
        if script.endswith(".sh"):
            assert not assigned - variables_of(script), shlex.join(command)


@each_document
def test_flags_in_the_prose_exist(path):
    known = all_flags() | FOREIGN
    spans = inline_code(path.read_text(encoding="utf-8"))
    named = {
        flag.rstrip(".")
        for span in spans
        if not span.startswith(("pip ", "git ", "conda "))
        for flag in re.findall(r"(?<!\S)--([A-Za-z][\w.]*)", span)
    }
    unknown = {
        flag
        for flag in named
        if flag not in known and not any(other.startswith(flag + ".") for other in known)
    }
    assert not unknown, f"no script has {sorted(unknown)}"


# --- Files, tests and links --------------------------------------------------------------------


def exists(file: str, folder: pathlib.Path) -> bool:
    """Whether a document in `folder` may call a file so: from the root, from its folder, or by the end of its path."""
    if (ROOT / file).exists() or (folder / file).exists():
        return True
    return any(known.endswith("/" + file) for known in FILES)


@each_document
def test_files_and_tests_that_are_named_exist(path):
    text = path.read_text(encoding="utf-8")
    spans = [*inline_code(text), *(block.text for block in code_blocks(text))]
    ending = r"(?:py|sh|toml|txt)\b(?!\.)"
    files = {
        file
        for span in spans
        for file in re.findall(rf"(?<![\w./:$*}}\]-])((?:[\w.-]+/)*[\w-]+\.{ending})", span)
        if not file.startswith(("requirements", "path/")) and not re.search("PACKAGE|FILE", file)
    }
    missing = sorted(file for file in files if not exists(file, path.parent))
    assert not missing, f"{name(path)} names {missing}"
    tests = {
        test for span in inline_code(text) for test in re.findall(r"\btest_\w+(?!\w|\.py)", span)
    }
    defined = functions_of_tests() | {pathlib.PurePath(file).stem for file in FILES}
    assert sorted(tests - defined) == []


@functools.cache
def functions_of_tests() -> frozenset[str]:
    files = (ROOT / file for file in FILES if re.fullmatch(r"tests/.*\.py", file))
    found = (
        re.findall(r"^def (test_\w+)", file.read_text(encoding="utf-8"), re.M) for file in files
    )
    return frozenset(itertools.chain.from_iterable(found))


def named_tests(text: str) -> list[tuple[str, str]]:
    """The pairs (file, test) that a document writes as a file, a colon and names of its tests."""
    listed = re.findall(r"`(tests/[\w/]+\.py)`:\s+(`test_\w+`(?:,\s+`test_\w+`)*)", prose(text))
    return [(file, test) for file, tests in listed for test in re.findall(r"\w+", tests)]


@each_document
def test_a_test_that_is_named_with_its_file_is_in_that_file(path):
    misplaced = [
        (file, test)
        for file, test in named_tests(path.read_text(encoding="utf-8"))
        if not re.search(rf"^def {test}\(", source(file), re.MULTILINE)
    ]
    assert misplaced == []


def anchors(path: pathlib.Path) -> set[str]:
    """The anchors of a document's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.*)$", prose(path.read_text(encoding="utf-8")), re.MULTILINE)
    plain = (
        re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading).strip().lower() for heading in headings
    )
    return {re.sub(r"[^\w\- ]", "", heading).replace(" ", "-") for heading in plain}


@each_document
def test_links_lead_to_files_and_headings_that_exist(path):
    for target in re.findall(r"\]\(([^)\s]+)\)", prose(path.read_text(encoding="utf-8"))):
        if re.match(r"https?:", target):
            continue
        file, _, anchor = target.partition("#")
        linked = (path.parent / file).resolve() if file else path
        assert linked.exists(), f"{name(path)} links to {target}"
        if anchor:
            assert anchor in anchors(linked), f"{name(path)} links to {target}"


# --- What a document must be -------------------------------------------------------------------


def test_the_readme_is_short():
    lines = (ROOT / "README.md").read_text(encoding="utf-8").splitlines()
    assert len(lines) <= 170
    wide = [number for number, line in enumerate(lines, 1) if len(line) > 120 and line[:1] != "|"]
    assert wide == []


def test_every_folder_of_code_has_a_readme():
    packages = {path.parent for path in (ROOT / "elastic").glob("*/__init__.py")}
    folders = [*sorted(packages), ROOT / "scripts", ROOT / "tests", ROOT / "example"]
    assert [name(folder) for folder in folders if not (folder / "README.md").exists()] == []


@each_document
def test_no_path_of_one_machine_and_no_page_that_is_not_here(path):
    text = path.read_text(encoding="utf-8")
    places = "|".join(["home", "root", "work", "tmp", "Users", "mnt", "opt"])
    assert re.findall(rf"(?<![\w.:/$}}])/(?:{places})/\S*", text) == []
    assert re.findall(r"\b(?:DESIGN|LAYOUT|STYLE|TRAPS)\b", text) == []


@each_document
def test_nothing_is_left_to_do(path):
    assert re.findall(r"TODO\w*", path.read_text(encoding="utf-8")) == []


def test_ci_runs_what_a_contributor_runs():
    workflow = (ROOT / ".github" / "workflows" / "ci.yml").read_text(encoding="utf-8")
    assert "- run: .ci/run" in workflow
    assert "scripts/run_tests.sh" in (ROOT / ".ci" / "run").read_text(encoding="utf-8")


# --- The checks find what they look for --------------------------------------------------------


def test_commands_are_found_in_blocks_and_in_prose():
    text = """
Run `bash scripts/run_train.sh --log_freq=5`, or

```bash
cd x && dataset_path=a python3 scripts/train.py \\
    --total_steps=4  # four
```
"""
    found = commands(text)
    assert [script_of(command) for command in found] == ["scripts/train.py", "scripts/run_train.sh"]
    assert found[0] == ["dataset_path=a", "python3", "scripts/train.py", "--total_steps=4"]
    assert "total_steps" in flags_of("scripts/train.py") & flags_of("scripts/run_train.sh")
    assert "lpips" in flags_of("scripts/bench/train.py") and "dtypes" in flags_of(
        "scripts/bench/train.py"
    )


def test_a_flag_that_no_script_has_is_found():
    assert "search_algorithm" not in all_flags() and "search_alg" in all_flags()


def test_files_with_several_tests_are_found():
    text = "| `tests/a.py`: `test_x`, `test_y`; `tests/b/c.py`; `tests/d.py`: `test_z` |"
    assert named_tests(text) == [
        ("tests/a.py", "test_x"),
        ("tests/a.py", "test_y"),
        ("tests/d.py", "test_z"),
    ]
    assert len(named_tests((ROOT / "elastic" / "README.md").read_text(encoding="utf-8"))) > 15


def test_headings_become_anchors():
    assert "what-differs-from-the-released-code" in anchors(ROOT / "elastic" / "README.md")

"""Reads compiled programs: which sends overlap with arithmetic, and by how much a program exceeds memory.

The text of a scheduled module lists the instructions of every computation in the order in which they are issued. So the
instructions between a send's start and its done run while the data travels.
"""

import functools
import re
from typing import NamedTuple

# Our kernels, as the compilers name them: Mosaic on TPU, Triton and Mosaic on GPU.
KERNEL_TARGETS = ("tpu_custom_call", "__gpu$xla.gpu.triton", "__cudnn$fmha", "mosaic_gpu")

_HEADER = re.compile(r"(?:ENTRY )?%?([\w.$-]+) \(.*\) -> .*\{$")
_INSTRUCTION = re.compile(r"\s+(?:ROOT )?%?([\w.$-]+) = (.*)$")
_OPCODE = re.compile(r"(?:^|[\s)])([a-z][a-z0-9-]*)\(")
_NAME = re.compile(r"%([\w.$-]+)")
_CALLED = re.compile(
    r"(?:calls|to_apply|body|condition|true_computation|false_computation|"
    r"branch_computations|called_computations)=(\{[^}]*\}|%?[\w.$-]+)"
)
_TARGET = re.compile(r'custom_call_target="([^"]*)"')
_SOURCE = re.compile(r'op_name="([^"]*)"')
# XLA's G is 2**30.
_SIZE = r"([\d.]+)([KMGT]?)"
_EXCEEDED = (
    re.compile(rf"Used {_SIZE}\S* of {_SIZE}\S* hbm", re.IGNORECASE),
    re.compile(rf"memory required for .*?\({_SIZE}\S*\) exceeds available \w+ \({_SIZE}"),
)


class Instruction(NamedTuple):
    """One instruction of a computation."""

    name: str
    opcode: str
    operands: tuple[str, ...]
    called: tuple[str, ...]  # names of computations that it runs
    target: str  # of a custom call
    source: str  # the place in the traced function that it comes from


class Permute(NamedTuple):
    """One send along the ring, from its start to its done.

    Attributes:
      name: the name of the start.
      source: the place in the traced function that it comes from.
      overlapped: whether a kernel runs between start and done.
      between: opcodes of the instructions between start and done, in order.
    """

    name: str
    source: str
    overlapped: bool
    between: tuple[str, ...]


# The computations of a compiled module by name, their instructions in the order of the schedule.
Program = dict[str, tuple[Instruction, ...]]


def permutes(program: Program, *, loops_count: bool) -> list[Permute]:
    """Every collective permute of a program.

    A send that the compiler left synchronous, or whose done is in another computation than its start, counts as not
    overlapped.

    Args:
      program: what `read_program` gives.
      loops_count: whether a loop counts as a kernel, as for attention written in XLA.
    """

    @functools.cache
    def holds_kernel(computation: str) -> bool:
        return any(runs_kernel(item) for item in program.get(computation, ()))

    def runs_kernel(item: Instruction) -> bool:
        if item.opcode == "custom-call":
            return item.target.startswith(KERNEL_TARGETS)
        if loops_count and item.opcode == "while":
            return True
        return any(holds_kernel(name) for name in item.called)

    found = []
    for instructions in program.values():
        done = {
            item.operands[0]: place
            for place, item in enumerate(instructions)
            if item.opcode in ("collective-permute-done", "async-done") and item.operands
        }
        for place, item in enumerate(instructions):
            if _is_permute(item, program):
                between = instructions[place + 1 : done.get(item.name, place)]
                overlapped = any(runs_kernel(other) for other in between)
                names = tuple(other.opcode for other in between)
                found.append(Permute(item.name, item.source, overlapped, names))
    return found


def _is_permute(item: Instruction, program: Program) -> bool:
    if item.opcode == "async-start":  # of a computation that holds the send and nothing else
        inner = [other.opcode for name in item.called for other in program.get(name, ())]
        return "collective-permute" in inner
    return item.opcode in ("collective-permute", "collective-permute-start")


def read_program(text: str) -> Program:
    """The program in the text that `compiled.as_text()` gives.

    Raises:
      ValueError: the text is not that of a scheduled module, so its order has no meaning.
    """
    header = text[: text.find("\n")]
    if "is_scheduled=true" not in header:
        raise ValueError(
            f"{header[:80]!r} does not begin a scheduled module (is_scheduled=true); give the text of "
            "a compiled program, not of a lowered one."
        )
    program: Program = {}
    name, lines = "", []
    for line in text.splitlines():
        if (match := _HEADER.match(line)) is not None:
            name, lines = match[1], []
        elif line.startswith("}") and name:
            program[name] = tuple(lines)
            name = ""
        elif name and (match := _INSTRUCTION.match(line)) is not None:
            lines.append(_instruction(match[1], match[2]))
    return program


def _instruction(name: str, rest: str) -> Instruction:
    opcode = _OPCODE.search(rest)
    if opcode is None:
        return Instruction(name, "", (), (), "", "")
    # Operands end at the closing bracket; the layouts of their types may contain brackets too.
    depth, end = 1, opcode.end()
    while depth and end < len(rest):
        depth += {"(": 1, ")": -1}.get(rest[end], 0)
        end += 1
    attributes = rest[end:]
    called = [part.strip("{}%, ") for part in _CALLED.findall(attributes)]
    target, source = _TARGET.search(attributes), _SOURCE.search(attributes)
    return Instruction(
        name,
        opcode[1],
        tuple(_NAME.findall(rest[opcode.end() : end])),
        tuple(part.strip(" %") for names in called for part in names.split(",")),
        target[1] if target else "",
        source[1] if source else "",
    )


class OutOfMemory(NamedTuple):
    """The sizes in a compiler's message about a program that exceeds memory."""

    needed_bytes: int
    available_bytes: int
    temporaries_only: bool  # `needed_bytes` does not include arguments


def out_of_memory(message: str) -> OutOfMemory | None:
    """The sizes in a compiler's RESOURCE_EXHAUSTED message; None for any other message."""
    if "RESOURCE_EXHAUSTED" not in message:
        return None
    for form in _EXCEEDED:
        if (match := form.search(message)) is not None:
            needed, available = _bytes(*match.groups()[:2]), _bytes(*match.groups()[2:])
            return OutOfMemory(needed, available, "temporaries" in match[0])
    return None


def _bytes(number: str, unit: str) -> int:
    return int(float(number) * 1024 ** " KMGT".index(unit or " "))

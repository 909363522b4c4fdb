"""Flags for the scripts: parsing, `--help`, and how an error ends: in one line and exit code 1.

Nothing heavy is imported here, so that `--help` and a mistyped flag answer at once. The tables of
flags are in `elastic.cli.flags` and `elastic.cli.flags_train`.
"""

import contextlib
import difflib
import logging
import os
import select
import signal
import sys
import textwrap
import threading
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NoReturn

from absl import flags

from elastic.cli.flags import ENCODING
from elastic.cli.options import name_flags, words
from elastic.cli.script import Flag, Script, Values
from elastic.io.user_cache import keep_programs
from elastic.tokenizer.targets import EncodeOptions

__all__ = [
    "Values",
    "check_target",
    "encode_options",
    "has_target",
    "help_text",
    "leave",
    "log",
    "parse",
    "run",
    "words",
]

log = logging.getLogger(__name__)

_WIDTH = 100
_HELP = ("-h", "-help", "--help", "--helpfull", "--helpshort")
_KINDS = {str: "TEXT", int: "N", float: "NUMBER", bool: "True|False"}
_VALUES = {
    int: "a whole number, in digits",
    float: "a number, such as 0.003",
    bool: "True or False",
    str: "text",
}
_TERMINATED = 128 + signal.SIGTERM
_INTERRUPTED = 128 + signal.SIGINT
_READER_LEFT = 128 + signal.SIGPIPE  # what a shell shows for `cat` when its reader ends first


def parse(script: Script, arguments: Sequence[str]) -> Values:
    """The values that a command line gives to the flags of a script.

    Args:
      arguments: without the name of the program. A flag given twice counts as given last.

    Raises:
      ValueError: a flag is unknown, its value is of no use, or a required one is missing.
    """
    holder = flags.FlagValues()
    for flag in script.flags:
        _define(flag, holder)
    try:
        rest = holder([script.name, *arguments])[1:]
    except flags.UnrecognizedFlagError as error:
        known = [flag.name for flag in script.flags]
        raise ValueError(
            f"There is no flag --{error.flagname}.{_way_to(error.flagname, known)} "
            "--help lists them all."
        ) from error
    except flags.IllegalFlagValueError as error:
        raise ValueError(_refusal(error, script)) from error
    except flags.Error as error:
        raise ValueError(f"{str(error).rstrip('.')}; write --name=value.") from error
    if script.positional and len(rest) == 1 and not holder[script.positional].present:
        holder[script.positional].parse(rest.pop())
    if rest:
        raise ValueError(f"{rest[0]!r} belongs to no flag; write --name=value.")
    given = frozenset(flag.name for flag in script.flags if holder[flag.name].present)
    values = {flag.name: holder[flag.name].value for flag in script.flags}
    missing = [flag for flag in script.flags if flag.required and not values[flag.name]]
    if missing:
        raise ValueError(f"Give --{missing[0].name}: {missing[0].help}")
    for flag in script.flags:
        _refuse_unbuilt(flag, values[flag.name], given=flag.name in given)
    return Values(values, given)


def check_target(values: Values) -> None:
    """Refuses a command line that says both how many tokens a block may have and how good it must be.

    Raises:
      ValueError: there is a threshold beside a count.
    """
    # Another search with --n_codes is refused where the search is made, in words of its own.
    fixed = bool(values["n_codes"]) and values["search_alg"] in (None, "fixed")
    if fixed and values["threshold"] is not None:
        raise ValueError("--threshold= and --n_codes= are 2 targets; give one.")


def has_target(values: Values) -> bool:
    """Whether a command line says how many tokens a block may have, or how good it must be."""
    targets = ("psnr", "n_codes", "avg_tokens", "bitrate")
    return values["threshold"] is not None or any(values[name] for name in targets)


def encode_options(values: Values, recommended: Sequence[float] = ()) -> EncodeOptions:
    """The flags of inference that say what is read of a clip, and how its tokens are chosen. 0 stands for None where None is allowed.

    Args:
      values: of the flags.
      recommended: thresholds that suit the model; without a target the first one is taken, which the log says.

    Raises:
      ValueError: a value is out of its range, or there is not one target.
    """
    if has_target(values):
        return ENCODING.read(values)
    if not recommended:
        raise ValueError(
            "The model recommends no threshold. Give --threshold=ERROR (such as 0.003) or --psnr=DB for a quality that every "
            "block reaches, --n_codes=N for a fixed length, or --avg_tokens=N or --bitrate=KBIT for a budget that the blocks share."
        )
    log.info(
        "--threshold=%g: the model recommends it, and no other target is given.", recommended[0]
    )
    return ENCODING.read(values, threshold=recommended[0])


def help_text(script: Script) -> str:
    """What `--help` prints: the flags by group, with their defaults."""
    lines = [f"usage: {script.command} {script.usage}", "", _wrap(script.description, 0), ""]
    for title, group in script.groups.items():
        lines.append(f"{title}:")
        for flag in group:
            kind = "|".join(flag.choices) if flag.choices else _KINDS[flag.type]
            default = "" if flag.default in (None, "") else f" [{flag.default}]"
            note = " (required)" if flag.required else default
            lines.append(f"  --{flag.name}={kind}")
            lines.append(_wrap(f"{flag.help}{note}", 6))
        lines.append("")
    return "\n".join(lines)


def run(
    script: Script, body: Callable[[Values], int | None], arguments: Sequence[str] | None = None
) -> int:
    """Runs a script: parses, calls `body`, and gives the exit code.

    Errors that the packages raise on purpose (`ValueError`, `OSError`), and a lack of memory, become
    one line on standard error; `--debug` shows where they came from. Other exceptions are bugs and
    keep their traceback. Where the reader of the output leaves early (`| head -1`), the script ends
    without a message, as other programs do.
    """
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    code = 0
    try:
        if any(argument in _HELP for argument in arguments):
            print(help_text(script))
        else:
            code = _run_body(script, body, arguments)
        if sys.stdout is not None:  # None: standard output was closed before Python started
            sys.stdout.flush()  # a failure shows here, not when Python ends
    except OSError as error:
        _drop_output()
        if isinstance(error, BrokenPipeError):
            return code or _READER_LEFT
        if code == 0:  # else the message is out already
            reason = error.strerror or str(error)
            print(f"{script.name}: error: standard output: {reason}.", file=sys.stderr)
        return code or 1
    return code


def leave(code: int) -> NoReturn:
    """Ends the process at once with an exit code: not even threads that are in XLA are waited for."""
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(AttributeError, OSError, ValueError):
            stream.flush()
    os._exit(code)


def _run_body(
    script: Script, body: Callable[[Values], int | None], arguments: Sequence[str]
) -> int:
    """As `run`, but a write to a pipe whose reader has left raises BrokenPipeError."""
    debug = False
    with _logging(script):
        try:
            with _termination():
                values = parse(script, arguments)
                debug = values["debug"]
                if any(flag.name == "verbose" for flag in script.flags) and values["verbose"]:
                    logging.getLogger("elastic").setLevel(logging.DEBUG)
                if debug:
                    _show_all()
                keep_programs()
                return body(values) or 0
        except KeyboardInterrupt:
            print(f"{script.name}: interrupted.", file=sys.stderr)
            return _INTERRUPTED
        except (ValueError, OSError, MemoryError, RuntimeError) as error:
            if isinstance(error, BrokenPipeError) and _reader_left():
                raise
            message = _one_line(error)
            if message is None:
                raise
            if debug:
                traceback.print_exc()
            print(f"{script.name}: error: {_with_flags(message, script)}", file=sys.stderr)
            return 1


def _reader_left() -> bool:
    """Whether standard output or standard error is a pipe that nobody reads any more."""
    for stream in (sys.stdout, sys.stderr):
        try:
            descriptor = stream.fileno()
        except (AttributeError, OSError, ValueError):  # closed, or no file at all
            continue
        poll = select.poll()
        poll.register(descriptor, 0)
        if any(event & (select.POLLERR | select.POLLHUP) for _, event in poll.poll(0)):
            return True
    return False


def _drop_output() -> None:
    """Drops what standard output still buffers, which Python would otherwise try to write when it ends."""
    with contextlib.suppress(AttributeError, OSError, ValueError):
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, sys.stdout.fileno())
        os.close(nowhere)


def _one_line(error: Exception) -> str | None:
    """The message of an error that is the user's to mend; None for a bug."""
    # An OSError or ValueError with these words is about a full disk.
    full = isinstance(error, RuntimeError) and "RESOURCE_EXHAUSTED" in str(error)
    if isinstance(error, MemoryError) or full:
        return "Out of memory; use a smaller batch, shorter sequences or a shorter cache, or --dtype=bf16."
    if isinstance(error, RuntimeError):
        return None
    if isinstance(error, OSError) and error.filename is not None:
        return f"{error.filename}: {error.strerror}."
    return " ".join(str(error).split()) or type(error).__name__


def _with_flags(message: str, script: Script) -> str:
    """A message of the package in the words of the command line."""
    return name_flags(message, script.flag_of_option)


def _refusal(error: flags.IllegalFlagValueError, script: Script) -> str:
    """The message for a value that a flag cannot take: it names the value and the rule."""
    typed = str(error).removeprefix("flag ").removesuffix(f": {error.__context__}")
    name = typed.partition("=")[0].removeprefix("--")
    flag = next(flag for flag in script.flags if flag.name == name)
    if flag.choices:
        return f"{typed} must be one of {'|'.join(flag.choices)}."
    return f"{typed} must be {_VALUES[flag.type]}."


def _define(flag: Flag, holder: flags.FlagValues) -> None:
    default: Any = flag.default
    if flag.choices:
        choices = list(flag.choices)
        flags.DEFINE_enum(flag.name, default, choices, flag.help, flag_values=holder)
        return
    define = {
        str: flags.DEFINE_string,
        int: flags.DEFINE_integer,
        float: flags.DEFINE_float,
        bool: flags.DEFINE_boolean,
    }[flag.type]
    define(flag.name, default, flag.help, flag_values=holder)


def _refuse_unbuilt(flag: Flag, value: Any, *, given: bool) -> None:
    """Flags of the released scripts that this version does not serve are refused, not ignored."""
    if flag.unbuilt and value != flag.default:
        raise ValueError(f"--{flag.name}={value}: {flag.unbuilt}")
    if flag.idle and given:
        log.warning("--%s has no effect: %s", flag.name, flag.idle)


def _way_to(name: str, known: list[str]) -> str:
    """How an unknown flag is meant: as an option of the model's, or as the flag that is nearly called that."""
    from elastic.config import option_names  # only here: `--help` needs none of them

    changes = "update_elastic_config"
    if changes in known and name in option_names():
        return f' It is an option of the model: --{changes}="dict({name}=...)".'
    return _nearest(name, known)


def _nearest(name: str, known: list[str]) -> str:
    close = difflib.get_close_matches(name, known, n=1)
    if not close:  # `--lr` for `--optimizer.adamw_optimizer.lr`
        close = [other for other in known if other.rsplit(".", 1)[-1] == name.rsplit(".", 1)[-1]]
    return f" Did you mean --{close[0]}?" if close else ""


def _wrap(text: str, indent: int) -> str:
    space = " " * indent
    return textwrap.fill(text, _WIDTH, initial_indent=space, subsequent_indent=space)


@contextlib.contextmanager
def _logging(script: Script) -> Iterator[None]:
    """Our log on standard error, above a progress bar if there is one; warnings go there too."""
    from tqdm.contrib.logging import logging_redirect_tqdm

    ours = logging.getLogger("elastic")
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("%(message)s"))
    level, propagate = ours.level, ours.propagate
    ours.addHandler(handler)
    ours.setLevel(logging.INFO)
    ours.propagate = False  # a library that gives the root a handler would have every line twice
    _drop_echoes()

    def show(message: Warning | str, category: type[Warning], *_: Any, **__: Any) -> None:
        del category
        log.warning("%s", _with_flags(str(message), script))

    try:
        with warnings.catch_warnings(), logging_redirect_tqdm([ours]):
            warnings.simplefilter("default", UserWarning)
            warnings.showwarning = show
            yield
    finally:
        ours.removeHandler(handler)
        ours.setLevel(level)
        ours.propagate = propagate


def _is_no_trace(record: logging.LogRecord) -> bool:
    """Drops the tracebacks that orbax logs, once a thread, before it raises the same exception."""
    return record.exc_info is None


_NEVER_AWAITED = "coroutine .* was never awaited"
_hooks: dict[str, Any] = {}  # of the module sys, as they were before `_drop_echoes`


def _drop_echoes() -> None:
    """Drops what orbax, asyncio and tensorstore say of reads and writes that orbax has given up, until the process ends.

    On a full disk, each part of a checkpoint that is still under way says that its event loop is closed, that nobody asked for its
    error, or that it was never awaited: hundreds of messages around the one error that is raised, some of them after the run.
    """
    warnings.filterwarnings("ignore", _NEVER_AWAITED, RuntimeWarning)
    logging.getLogger("absl").addFilter(_is_no_trace)
    logging.getLogger("asyncio").addFilter(_is_no_echo)
    for name, hook in (("excepthook", _show_no_echo), ("unraisablehook", _report_no_echo)):
        if getattr(sys, name) is not hook:
            _hooks[name] = getattr(sys, name)
            setattr(sys, name, hook)


def _is_echo(error: BaseException | None) -> bool:
    return type(error) is RuntimeError and str(error) == "Event loop is closed"


def _is_no_echo(record: logging.LogRecord) -> bool:
    return "exception was never retrieved" not in record.getMessage()


def _show_no_echo(kind: type[BaseException], error: BaseException, trace: Any) -> None:
    """For sys.excepthook."""
    if not _is_echo(error):
        _hooks["excepthook"](kind, error, trace)


def _report_no_echo(unraisable: Any) -> None:
    """For sys.unraisablehook."""
    if not _is_echo(unraisable.exc_value):
        _hooks["unraisablehook"](unraisable)


def _show_all() -> None:
    """For --debug."""
    warnings.filterwarnings("default", _NEVER_AWAITED, RuntimeWarning)
    logging.getLogger("absl").removeFilter(_is_no_trace)
    logging.getLogger("asyncio").removeFilter(_is_no_echo)
    sys.excepthook, sys.unraisablehook = sys.__excepthook__, sys.__unraisablehook__


class _Signal(BaseException):
    """A signal on its way to the end of the program. One that is dropped on the way is sent anew.

    Whoever drops it frees it: a callback from which nothing can be raised, a garbage collector's for instance, or an
    `except:` that names nothing. JAX has one of those behind every compilation, which is when a signal that came
    meanwhile is raised.
    """

    number = signal.SIGTERM
    has_arrived = False

    def __del__(self) -> None:
        if not self.has_arrived:
            again = threading.Timer(0.05, os.kill, (os.getpid(), self.number))
            again.daemon = True
            again.start()


class _Terminated(_Signal, SystemExit):
    """SIGTERM."""


class _Interrupted(_Signal, KeyboardInterrupt):
    """Ctrl-C."""

    number = signal.SIGINT


@contextlib.contextmanager
def _termination() -> Iterator[None]:
    """SIGTERM unwinds the stack like Ctrl-C does, so that nothing half-written stays behind; neither is lost."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def terminate(*_: Any) -> None:
        raise _Terminated(_TERMINATED)

    def interrupt(*_: Any) -> None:
        raise _Interrupted

    def show(unraisable: Any) -> None:
        if not isinstance(unraisable.exc_value, _Signal):
            hook(unraisable)

    handlers: dict[int, Any] = {signal.SIGTERM: terminate}
    # Where somebody else takes Ctrl-C, or ignores it, it stays theirs.
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        handlers[signal.SIGINT] = interrupt
    before = {number: signal.signal(number, handler) for number, handler in handlers.items()}
    hook, sys.unraisablehook = sys.unraisablehook, show
    try:
        yield
    except _Signal as arrived:
        arrived.has_arrived = True
        raise
    finally:
        sys.unraisablehook = hook
        for number, handler in before.items():
            signal.signal(number, handler)

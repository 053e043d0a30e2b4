"""What all commands share: how options are read, and how errors and progress are shown."""

import argparse
import difflib
import math
import os
import re
import sys
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path
from typing import IO, Any, NoReturn, TextIO

from tqdm import tqdm


class ConfigError(Exception):
    """An option that cannot be used; the message is one line for the person who wrote it."""


# How the text of the command line becomes a value. A string is taken as it stands and never
# evaluated: a run may be called 2024_01.


def _int(text: str) -> int:
    try:
        return int(text)
    except ValueError:
        if not (number := float(text)).is_integer():  # 2e6 samples
            raise
    return int(number)


def _float(text: str) -> float:
    if not math.isfinite(number := float(text)):
        raise ValueError(text)
    return number


def _bool(text: str) -> bool:
    return ("false", "true").index(text.lower()) == 1


KINDS = {
    int: (_int, "a whole number"),
    float: (_float, "a number"),
    bool: (_bool, "true or false"),
    str: (str, "text"),
}


def from_text(kind: type) -> Callable[[str], object]:
    """What argparse calls to read a value of this type."""
    read, description = KINDS[kind]

    def value_of(text: str) -> object:
        try:
            return read(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"must be {description}, not {text!r}") from None

    return value_of


def nearest(name: str, names: Iterable[str]) -> str:
    """The end of an error message: the name that was meant, if one is similar."""
    similar = difflib.get_close_matches(name, names, n=1, cutoff=0.6)
    return f"; did you mean {similar[0]!r}?" if similar else "; --help lists them"


class Parser(argparse.ArgumentParser):
    """The parser of every command: `--some_name value` or `--some_name=value`.

    Hyphens are accepted for underscores, names are never abbreviated, and an unknown name is an
    error that suggests the nearest one. Raises ConfigError instead of ending the process.
    """

    def __init__(self, **options: Any) -> None:
        layout = argparse.RawDescriptionHelpFormatter  # keeps the lines of a docstring
        super().__init__(**{"allow_abbrev": False, "formatter_class": layout} | options)
        for kind in (int, float):
            self.register("type", kind, from_text(kind))

    def parse_known_args(self, args=None, namespace=None):
        args = sys.argv[1:] if args is None else list(args)
        end = args.index("--") if "--" in args else len(args)
        for i, arg in enumerate(args[:end]):
            name, equals, value = arg.partition("=")
            if re.fullmatch(r"--[\w-]+", name):  # a value may begin with hyphens, too
                args[i] = "--" + name[2:].replace("-", "_") + equals + value
        return super().parse_known_args(args, namespace)

    def parse_args(self, args=None, namespace=None):
        known, unknown = self.parse_known_args(args, namespace)
        for arg in unknown:
            name = arg.partition("=")[0]
            if arg.startswith("--"):
                self.error(f"no option is called {name}{nearest(name, self._option_names())}")
            self.error(f"unexpected argument {arg!r}")
        return known

    def _option_names(self) -> list[str]:
        """Of this parser and of its commands."""
        names = [name for name in self._option_string_actions if name.startswith("--")]
        for action in self._actions:
            if isinstance(action, argparse._SubParsersAction):
                names += [n for parser in action.choices.values() for n in parser._option_names()]
        return names

    def error(self, message: str) -> NoReturn:
        raise ConfigError(message.removeprefix("argument "))


def run_cli(main: Callable[[list[str]], int | None], *errors: type[Exception]) -> NoReturn:
    """Run main(arguments) as a command and end the process with its exit code, or 0 for None.

    A ConfigError, an OSError or one of `errors` is bad input: one line on stderr and exit code 2.
    Any other exception is a bug and shows its traceback.
    """
    if sys.stdin is None:
        sys.stdin = open(os.devnull, encoding="utf-8")
    sys.stdout = sys.stdout or open(os.devnull, "w", encoding="utf-8")
    sys.stderr = sys.stderr or open(os.devnull, "w", encoding="utf-8")
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")  # a terminal that lacks a letter shows "?"
    terminal = sys.stderr
    if not terminal.isatty():
        sys.stderr = LogFile(terminal)
    try:
        code = main(sys.argv[1:]) or 0
        sys.stdout.flush()
    except KeyboardInterrupt:
        print(file=sys.stderr)
        code = 130
    except (ConfigError, OSError, *errors) as error:
        code, rank = 2, os.environ.get("RANK", "0")
        # Rank 0 reports an error raised on all ranks. A bad command line reaches every rank, so the
        # first rank of each machine reports it. Anything else concerns this rank alone.
        first = os.environ.get("LOCAL_RANK", "0") == "0" or not isinstance(error, ConfigError)
        if isinstance(error, BrokenPipeError) and _is_closed(sys.stdout):
            code = 1  # as in `| head`, which is no error to report
        elif rank == "0" or (first and not getattr(error, "on_all_ranks", False)):
            where = Path(sys.argv[0]).name + (f": rank {rank}" if rank != "0" else "")
            tqdm.write(f"{where}: {in_one_line(error)}", file=sys.stderr)
    finally:
        if isinstance(sys.stderr, LogFile):
            sys.stderr.finish()
        sys.stderr = terminal
    sys.exit(code)


def _is_closed(stdout: TextIO) -> bool:
    """Whether the reader of stdout has closed it; the rest of the output is dropped then."""
    try:
        stdout.write("\n")  # what was not written before is not kept, so flush alone may succeed
        stdout.flush()
        return False
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), stdout.fileno())
        return True


def in_one_line(error: BaseException) -> str:
    """What an exception says, without its type if it says anything."""
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    return str(error).strip().partition("\n")[0] or type(error).__name__


def lock(path: Path) -> IO | None:
    """Claim `path` until the file returned is closed; None if another process has claimed it.

    The lock is a hidden file beside it. Where locks are not available, nothing is locked.
    """
    path = path.resolve()
    path.parent.mkdir(parents=True, exist_ok=True)
    file = open(path.with_name(f".{path.name}.lock"), "ab")
    with suppress(ImportError, OSError):
        import fcntl

        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.close()
            return None
    return file


def write_file(path: str | Path, content: bytes) -> None:
    """Write a file whole or not at all: under another name, synced, then renamed."""
    unfinished = Path(f"{path}.tmp")
    with open(unfinished, "wb") as f:
        f.write(content)
        f.flush()
        os.fsync(f.fileno())
    unfinished.replace(path)


class LogFile:
    """stderr when it is not a terminal: a progress bar leaves one line a minute, and its last one.

    A bar redraws its line with carriage returns, ten times a second, which would fill a log file
    with one long line that grep cannot search.
    """

    def __init__(self, stream: TextIO) -> None:
        self._stream, self._line, self._written = stream, "", time.monotonic()

    def write(self, text: str) -> int:
        *lines, rest = (self._line + text).split("\n")
        for line in lines:
            self._stream.write(line.removesuffix("\r").rpartition("\r")[2] + "\n")
        redrawn = "\r" in rest
        self._line = rest.rpartition("\r")[2]
        if redrawn:
            if self._line.strip() and time.monotonic() - self._written >= 60:
                self._stream.write(self._line + "\n")
                self._line, self._written = "", time.monotonic()
            self._line = "\r" + self._line
        return len(text)

    def finish(self) -> None:
        """Write what has not ended with a line break."""
        self._stream.write(self._line.rpartition("\r")[2])
        self._stream.flush()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

"""How a command ends with an error: the user's own are one sentence and exit code 2, a bug is a traceback and 1."""

import argparse
import dis
import os
import re
import sys
import sysconfig
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from difflib import get_close_matches
from pathlib import Path
from types import TracebackType
from typing import Any, NoReturn

USERS, CRASH = 2, 1
"""Exit codes."""
MAX_LINES = 10
DEBUG = "GOPO_DEBUG"
"""Environment variable: 1 shows the traceback of every error, as --debug does."""
REPORT = "This is a fault of gopo-lightning, not of your input: please report it, with the traceback and the config."

_PACKAGE = Path(__file__).parents[1]
_LIBRARIES = [Path(sysconfig.get_path(name)) for name in ("stdlib", "platstdlib", "purelib", "platlib")]
_STARTED_TOGETHER = (("RANK", "LOCAL_RANK"), ("SLURM_PROCID", "SLURM_LOCALID"))
"""Variables of torchrun and of srun, whose ranks all parse the same arguments at once."""
_BY_NAME = {"MisconfigurationException", "OutOfMemoryError", "ArgumentError"}
"""Of lightning, torch and argparse, which are not imported for this."""


class UsageError(ValueError):
    """A command line or a config that cannot be parsed."""


class RaisesUsageErrors:
    """A parser, argparse's or jsonargparse's, that raises `UsageError` instead of printing its usage."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """As the parser calls it; of an unknown option, says which is meant."""
        if match := re.match(r"unrecognized arguments: (--?[\w.]+)", message):
            known = re.findall(r"(?<!\S)--\w+", self.format_help())  # type: ignore[attr-defined]  # of the parser
            near = get_close_matches(match[1], known, 1)
            advice = f"did you mean {near[0]!r}?" if near else "--help lists the options."
            message = f"{match[1]} is unknown; {advice}"
        raise UsageError(message) from ex


class Parser(RaisesUsageErrors, argparse.ArgumentParser):
    """Of our own commands."""


@contextmanager
def reported(arguments: list[str]) -> Iterator[None]:
    """Around a whole command: what it raises is printed here and nowhere else, and decides the exit code.

    Args:
        arguments: of the command; ``--debug`` is taken out of what stands before ``--``.
    """
    own = arguments[: arguments.index("--")] if "--" in arguments else arguments
    if "--debug" in own:
        arguments.remove("--debug")
        os.environ[DEBUG] = "1"  # of the ranks that this process starts, too
    try:
        yield
    except Exception as error:  # noqa: BLE001 - every one of them ends the command
        sys.exit(report(error))


def report(error: Exception) -> int:
    """Print ``error`` to stderr; the exit code."""
    users = is_users(error)
    if not users or os.environ.get(DEBUG, "0") not in ("", "0"):
        traceback.print_exception(error)
    if not users:
        print(f"\n{REPORT}", file=sys.stderr, flush=True)
        return CRASH
    if said := of_this_rank(error, sentence(error)):
        print("\n".join(said), file=sys.stderr, flush=True)
    return CRASH if _is_of_a_peer(error) else USERS


def is_users(error: BaseException) -> bool:
    """Whether the user can mend what raised ``error``.

    That is what this package raises on purpose (ValueError and its like, never AssertionError), what the user's own
    code raises, and what the system or a library says of a file, an option or memory.
    """
    if isinstance(error, OSError) or type(error).__name__ in _BY_NAME:
        return True
    frames = [frame for frame in _frames(error) if not _is_library(frame)]
    if not frames:
        return False
    last = frames[-1]
    if not _is_ours(last):
        return True
    return last.tb_next is None and not isinstance(error, AssertionError) and _is_raise(last)


def sentence(error: BaseException) -> list[str]:
    """``error: …`` in at most `MAX_LINES` lines, with the place in the user's own code where there is one."""
    is_plain = isinstance(error, ValueError | OSError | RuntimeError) or type(error).__name__ in _BY_NAME
    message = str(error).strip() or type(error).__name__
    lines = f"error: {message if is_plain else f'{type(error).__name__}: {message}'}".splitlines()
    lines = [line.rstrip() for line in lines if line.strip()]
    place = _place(error)
    most = MAX_LINES - (place is not None)
    if len(lines) > most:
        lines = [*lines[: most - 1], "… (--debug shows all)"]
    return lines if place is None else [*lines, f"  raised in {place} (--debug shows the traceback)"]


def of_this_rank(error: Exception, lines: Sequence[str]) -> list[str]:
    """What this rank prints of ``lines``.

    While ranks parse, the first of each machine speaks for the others on it. Later, the rank that has the error does;
    of one that only stops because another has failed, rank 0.
    """
    names = next((names for names in _STARTED_TOGETHER if names[0] in os.environ), ("LOCAL_RANK", ""))
    rank, local = (int(os.environ.get(name, 0)) for name in names)
    if rank == 0:
        return list(lines)
    dist: Any = sys.modules.get("torch.distributed")
    have_met = dist is not None and dist.is_available() and dist.is_initialized()
    if _is_of_a_peer(error) or (local > 0 and not have_met):
        return []
    return [f"rank {rank}: {lines[0]}", *lines[1:]]


def _is_of_a_peer(error: Exception) -> bool:
    return type(error).__name__ == "PeerError"


# ----------------------------------------------------------------------------------------------------------- tracebacks


def _frames(error: BaseException) -> list[TracebackType]:
    """From the command down to what raised ``error``."""
    found, step = [], error.__traceback__
    while step is not None:
        found.append(step)
        step = step.tb_next
    return found


def _file(step: TracebackType) -> Path:
    return Path(step.tb_frame.f_code.co_filename)


def _is_ours(step: TracebackType) -> bool:
    return _file(step).is_relative_to(_PACKAGE)


def _is_library(step: TracebackType) -> bool:
    """Also what has no file, such as a dataclass's `__init__`."""
    file = _file(step)
    return not _is_ours(step) and (not file.exists() or any(file.is_relative_to(folder) for folder in _LIBRARIES))


def _is_raise(step: TracebackType) -> bool:
    """Whether it stopped at a `raise` statement, and not at a call of C code that failed."""
    return step.tb_frame.f_code.co_code[step.tb_lasti] == dis.opmap["RAISE_VARARGS"]


def _place(error: BaseException | None) -> str | None:
    """`my_rewards.py, line 12` of the user's own code, of ``error`` or of what caused it."""
    while error is not None:
        for step in reversed(_frames(error)):
            if not _is_ours(step) and not _is_library(step):
                return f"{_file(step)}, line {step.tb_lineno}, in {step.tb_frame.f_code.co_name}"
        error = error.__cause__
    return None

"""Command lines as a user types them, each in a process of its own: a new one, or a fork with warm imports."""

import os
import re
import runpy
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from gopo_lightning.commands.errors import MAX_LINES, USERS
from tests.ports import free_port

LIMIT_SECONDS = 300.0
"""Of a command; it takes 3 where nothing else runs, and 30 with the pretrained policy."""
GRACE_SECONDS = 30.0
"""For the other rank, once one has failed; then it is ended, as torchrun would."""
REPOSITORY = Path(__file__).parents[2]
ERROR = re.compile(r"(rank \d+: )?error: ")
"""Begins what is said of an error of the user's."""


@dataclass(frozen=True)
class Ended:
    """How a command ended; ``code`` None: it had to be killed. ``text`` is what it printed, all ranks together."""

    arguments: tuple[str, ...]
    code: int | None
    text: str
    seconds: float

    @property
    def line(self) -> str:
        """The command to type."""
        return " ".join(["python -m gopo_lightning", *self.arguments])

    @property
    def last_words(self) -> str:
        """What was printed last: an error of the user's from its beginning, or else a line."""
        lines = [line for line in self.text.splitlines() if line.strip()]
        errors = [number for number, line in enumerate(lines) if ERROR.match(line)]
        return "\n".join(lines[errors[-1] if errors else -1 :]).strip()

    @property
    def is_refused(self) -> bool:
        """As what is the user's to mend: by a sentence on a few lines, and exit code 2."""
        few = len(self.last_words.splitlines()) <= MAX_LINES
        return self.code == USERS and few and bool(ERROR.match(self.last_words)) and "Traceback" not in self.text


def preload() -> None:
    """Import what every command imports, so that its fork need not; one thread, since forks cannot share a pool."""
    torch.set_num_threads(1)
    import transformers

    import gopo_lightning.commands.lightning_cli  # noqa: F401

    transformers.utils.logging.disable_progress_bar()


def run(
    arguments: Sequence[str],
    folder: Path,
    *,
    processes: int = 1,
    cold: bool = False,
    limit_seconds: float = LIMIT_SECONDS,
) -> Ended:
    """Run the command in ``folder``. ``cold``: a new interpreter, which starts further ranks by itself; else forks.

    Forks of several ranks stand in the environment that torchrun makes.
    """
    start, log = time.monotonic(), folder / "log.txt"
    offset = log.stat().st_size if log.exists() else 0
    with log.open("ab") as output:
        if cold:
            command, environment = [sys.executable, "-m", "gopo_lightning", *arguments], _environment()
            children = [subprocess.Popen(command, cwd=folder, stdout=output, stderr=output, env=environment).pid]
        else:
            ranks = [{}] if processes == 1 else _torchrun_environments(processes)
            children = [_fork(arguments, folder, output.fileno(), environment) for environment in ranks]
    code = _wait(children, start + limit_seconds)
    text = log.read_bytes()[offset:].decode(errors="replace")
    return Ended(tuple(arguments), code, text, time.monotonic() - start)


def _environment() -> dict[str, str]:
    return os.environ | {"PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}


def _torchrun_environments(processes: int) -> list[dict[str, str]]:
    port = free_port()
    shared = {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "WORLD_SIZE": str(processes),
        "LOCAL_WORLD_SIZE": str(processes),
        "GROUP_RANK": "0",
        "TORCHELASTIC_RUN_ID": "use",
    }
    return [shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(processes)]


def _fork(arguments: Sequence[str], folder: Path, output: int, environment: Mapping[str, str]) -> int:
    """The process id of a child that runs the command's own ``__main__`` and exits as an interpreter would."""
    child = os.fork()
    if child:
        return child
    code = 1
    try:
        os.dup2(output, 1)
        os.dup2(output, 2)
        sys.stdout, sys.stderr = (os.fdopen(number, "w", buffering=1, closefd=False) for number in (1, 2))
        os.chdir(folder)
        os.environ.update(_environment() | environment)
        sys.path.insert(0, str(folder))
        sys.argv = ["gopo_lightning", *arguments]
        runpy.run_module("gopo_lightning", run_name="__main__", alter_sys=False)
        code = 0
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else int(error.code is not None)
    except BaseException:  # noqa: BLE001 - as an interpreter does with what nobody catches
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _wait(children: list[int], deadline: float) -> int | None:
    """The first exit code that is not 0, else 0; None when the deadline passes. Nothing is left running."""
    codes: dict[int, int] = {}
    while len(codes) < len(children) and time.monotonic() < deadline:
        for child in children:
            if child not in codes and (ended := os.waitpid(child, os.WNOHANG))[0]:
                codes[child] = os.waitstatus_to_exitcode(ended[1])
                if codes[child] != 0:
                    deadline = min(deadline, time.monotonic() + GRACE_SECONDS)
        time.sleep(0.02)
    for child in (child for child in children if child not in codes):
        for process in (*_children(child), child):
            os.kill(process, signal.SIGKILL)
        os.waitpid(child, 0)
    failed = [code for code in codes.values() if code]
    if failed:
        return failed[0]
    return 0 if len(codes) == len(children) else None


def _children(process: int) -> list[int]:
    path = Path(f"/proc/{process}/task/{process}/children")
    return [int(child) for child in path.read_text().split()] if path.exists() else []

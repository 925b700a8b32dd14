"""Verdicts on disk: what a judge has been asked once is never asked again, also after a resume."""

import itertools
import json
import os
import socket
from pathlib import Path

Verdict = float | None
"""1.0: A wins, 0.0: B wins, 0.5: a tie; None: there is none."""


class VerdictCache:
    """JSON lines ``{"key": …, "verdict": …}``, a file of its own for every process, all of them read at the start.

    Args:
        folder: shared by any number of judges and runs, for a key hashes all that a verdict depends on; None keeps
            verdicts in memory only.
    """

    def __init__(self, folder: Path | None) -> None:
        self._verdicts: dict[str, float] = {}
        self._folder = folder
        self._file: Path | None = None
        if folder is not None:
            folder.mkdir(parents=True, exist_ok=True)
            for file in sorted(folder.glob("*.jsonl")):
                self._read(file)

    def __contains__(self, key: str) -> bool:
        return key in self._verdicts

    def get(self, key: str) -> Verdict:
        """None where the judge has not been asked, or gave none: it is asked again then."""
        return self._verdicts.get(key)

    def add(self, key: str, verdict: float) -> None:
        """Keep a verdict; on disk at once, so that a run that dies loses none."""
        self._verdicts[key] = verdict
        if self._folder is None:
            return
        if self._file is None:
            self._file = _new_file(self._folder)
        with self._file.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"key": key, "verdict": verdict}) + "\n")

    def _read(self, file: Path) -> None:
        """Raises ValueError on a malformed line, but for a last one that was cut off when its process died."""
        for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(keepends=True), start=1):
            if not line.endswith("\n"):
                break
            try:
                row = json.loads(line)
                if row["verdict"] is not None:
                    self._verdicts[row["key"]] = row["verdict"]
            except (ValueError, KeyError, TypeError) as error:
                raise ValueError(f"{file}, line {number}: not a cached verdict ({error}). Delete the line.") from error


def _new_file(folder: Path) -> Path:
    """Empty, of this process alone: in containers others may have had, or have, the same host name and number."""
    for attempt in itertools.count():
        file = folder / f"{socket.gethostname()}-{os.getpid()}{f'-{attempt}' if attempt else ''}.jsonl"
        try:
            file.open("x").close()
        except FileExistsError:
            continue
        return file
    raise AssertionError("unreachable: names do not run out")

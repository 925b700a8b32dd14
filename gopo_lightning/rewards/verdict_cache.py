"""Verdicts on disk: what a judge has been asked once is never asked again, also after a resume."""

import json
import os
import socket
import threading
from pathlib import Path

Verdict = float | None
"""1.0: A wins, 0.0: B wins, 0.5: a tie; None: the judge replied, but gave no verdict."""


class VerdictCache:
    """JSON lines ``{"key": …, "verdict": …}``, a file of its own for every process, all of them read at the start.

    Args:
        folder: shared by any number of judges and runs, for a key hashes all that a verdict depends on; None keeps
            verdicts in memory only.
    """

    def __init__(self, folder: Path | None) -> None:
        self._verdicts: dict[str, Verdict] = {}
        self._lock = threading.Lock()
        self._file: Path | None = None
        if folder is not None:
            folder.mkdir(parents=True, exist_ok=True)
            for file in sorted(folder.glob("*.jsonl")):
                self._read(file)
            self._file = folder / f"{socket.gethostname()}-{os.getpid()}.jsonl"

    def __contains__(self, key: str) -> bool:
        return key in self._verdicts

    def get(self, key: str) -> Verdict:
        """None also where the judge has not been asked."""
        return self._verdicts.get(key)

    def add(self, key: str, verdict: Verdict) -> None:
        """Keep a verdict; on disk at once, so that a run that dies loses none."""
        line = json.dumps({"key": key, "verdict": verdict}) + "\n"
        with self._lock:
            self._verdicts[key] = verdict
            if self._file is not None:
                with self._file.open("a", encoding="utf-8") as file:
                    file.write(line)

    def _read(self, file: Path) -> None:
        """Raises ValueError on a malformed line, but for a last one that was cut off when its process died."""
        for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(keepends=True), start=1):
            if not line.endswith("\n"):
                break
            try:
                row = json.loads(line)
                self._verdicts[row["key"]] = row["verdict"]
            except (ValueError, KeyError, TypeError) as error:
                raise ValueError(f"{file}, line {number}: not a cached verdict ({error}). Delete the line.") from error

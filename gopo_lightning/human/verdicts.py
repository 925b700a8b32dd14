"""What people said, on disk: JSON lines that reward-model training reads as ranked lists, just as they stand.

    {"prompt": "2 + 2 =", "completions": [" 5", " 4"], "ranks": [2, 1], "good": 1, "rater": "ann", "time": "2026-…"}

``ranks`` are 1 for the best, equal for ties. ``good`` of the completions stand above the line "none below is good"; the
others tie at the end, so a group without a single good one ties throughout: it is kept, and says nothing of an order.
"""

import json
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from gopo_lightning.data.cells import numbers
from gopo_lightning.data.comparison_formats import reading_row
from gopo_lightning.data.files import read_local
from gopo_lightning.data.json_lines import dumps
from gopo_lightning.distributed.atomic_files import sync_folder, writing_aside
from gopo_lightning.human.groups import Group, group_of_row, plain

_NAME = re.compile(r"\w[\w.@-]{0,63}")


@dataclass(frozen=True)
class Verdict:
    """An order of a group's completions by one person."""

    group: Group
    ranks: tuple[float, ...]
    """Of each completion: 1 is the best, equal ranks tie."""
    num_good: int
    """Completions that stand above the line."""
    rater: str
    time: str
    """ISO 8601, UTC."""

    @classmethod
    def of(cls, group: Group, order: Sequence[int], ties: Sequence[bool], num_good: int, rater: str) -> "Verdict":
        """What the page sends, now.

        >>> Verdict.of(Group("", ("a", "b", "c", "d")), [2, 0, 1, 3], [False, True, False, False], 2, "ann").ranks
        (1, 2, 1, 2)

        Args:
            group: M completions.
            order: their numbers, the best first.
            ties: whether each, in this order, is as good as the one before it.
            num_good: how many stand above the line.
            rater: who says so.

        Raises:
            ValueError: ``order`` is no order of the M completions, or a number does not fit.
        """
        M = len(group.completions)
        if sorted(order) != list(range(M)) or len(ties) != M or not 0 <= num_good <= M:
            raise ValueError(f"no order of {M} completions: order={order}, ties={ties}, good={num_good}")
        ranks, rank = [0] * M, 0
        for place, (number, is_tied) in enumerate(zip(order, ties, strict=True)):
            is_new = not is_tied if 0 < place < num_good else place in (0, num_good)
            rank += is_new
            ranks[number] = rank
        now = datetime.now(UTC).isoformat(timespec="seconds")
        return cls(group, tuple(ranks), num_good, rater, now)

    def row(self) -> dict[str, Any]:
        """A line of the file."""
        return {
            "prompt": plain(self.group.prompt),
            "completions": list(self.group.completions),
            "ranks": list(self.ranks),
            "good": self.num_good,
            "rater": self.rater,
            "time": self.time,
        }


def _verdict(row: Mapping[str, Any]) -> Verdict:
    group, ranks = group_of_row(row), numbers(row, "ranks")
    if len(ranks) != len(group.completions):
        raise ValueError(f"{len(ranks)} ranks of {len(group.completions)} different completions; give each one")
    good = row.get("good")
    return Verdict(group, ranks, len(ranks) if good is None else int(good), *(str(row.get(k) or "") for k in _WHO))


_WHO = ("rater", "time")


def read_verdicts(path: str | Path) -> list[Verdict]:
    """All of a file, a pattern or a folder; ranked lists of another origin too.

    Raises:
        ValueError: nothing is there, or a malformed row, with its number.
    """
    found = []
    for number, row in enumerate(read_local(str(path))):
        with reading_row(f"row {number} (counted from 0) of {path}"):
            found.append(_verdict(row))
    return found


def check_rater(name: str) -> None:
    """ValueError for what cannot be a file's name."""
    if not _NAME.fullmatch(name):
        raise ValueError(
            f"the rater {name!r} names a file: use at most 64 letters, digits and . _ - @, the first a letter or digit."
        )


class VerdictFile:
    """The verdicts of one person, one for each group, in ``<folder>/<rater>.jsonl``.

    A new one is appended and on disk when ``add`` returns. One that takes the place of an earlier one is written with
    all others into a new file, which then takes the place of the old. A last line that was cut off when its process
    died is taken out.

    Args:
        folder: of all raters.
        rater: who.

    Raises:
        ValueError: a name that cannot be a file's, a malformed file, or one that another process writes.
    """

    def __init__(self, folder: Path, rater: str) -> None:
        check_rater(rater)
        self.folder, self.rater, self.path = folder, rater, folder / f"{rater}.jsonl"
        folder.mkdir(parents=True, exist_ok=True)
        self._lock = FileLock(folder / f".{rater}.lock", blocking=False)
        try:
            self._lock.acquire()
        except Timeout as error:
            raise ValueError(
                f"another process writes {self.path}. End it, or name another rater: --rater NAME."
            ) from error
        self._verdicts: dict[str, Verdict] = {}
        if self.path.is_file():
            _mend(self.path)
            if self.path.stat().st_size:
                self._verdicts = {verdict.group.key: verdict for verdict in read_verdicts(self.path)}

    def __contains__(self, key: str) -> bool:
        return key in self._verdicts

    def get(self, key: str) -> Verdict | None:
        """Of the group with this key."""
        return self._verdicts.get(key)

    def all(self) -> list[Verdict]:
        """Every verdict, in the order of the file."""
        return list(self._verdicts.values())

    def add(self, verdict: Verdict) -> None:
        """Keep ``verdict``; on disk when this returns."""
        key = verdict.group.key
        if key in self._verdicts:
            kept = {**self._verdicts, key: verdict}
            with writing_aside(self.path) as aside:
                _write(aside, "w", kept.values())
                aside.replace(self.path)
        else:
            _write(self.path, "a", [verdict])
        self._verdicts[key] = verdict
        sync_folder(self.folder)

    def close(self) -> None:
        """Let another process write the file."""
        self._lock.release()


def _write(path: Path, mode: str, verdicts: Iterable[Verdict]) -> None:
    with path.open(mode, encoding="utf-8", newline="\n") as file:
        file.writelines(dumps(verdict.row()) + "\n" for verdict in verdicts)
        file.flush()
        os.fsync(file.fileno())


def _mend(path: Path) -> None:
    """End a last line that is whole, and cut one off that is not."""
    content = path.read_bytes()
    rest = content.rpartition(b"\n")[2]
    if not rest:
        return
    try:
        json.loads(rest)
    except ValueError:
        with path.open("r+b") as file:
            file.truncate(len(content) - len(rest))
        return
    with path.open("ab") as file:
        file.write(b"\n")

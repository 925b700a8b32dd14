"""Which groups a person has to order, and what has been said of them. Shared by the page's server and whoever waits."""

import hashlib
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from gopo_lightning.data.visible import visible
from gopo_lightning.human.groups import Group
from gopo_lightning.human.verdicts import Verdict, VerdictFile

Summary = Callable[[Sequence[Verdict]], str]
"""Verdicts of a person → what the page says at its end."""


class Session:
    """Groups in their order; thread-safe.

    Args:
        verdicts: where what is said is kept; groups that are in there are done.
        groups: to order.
        is_live: more groups will come by `begin`.
        summary: of all verdicts.
    """

    def __init__(
        self,
        verdicts: VerdictFile,
        groups: Sequence[Group] = (),
        *,
        is_live: bool = False,
        summary: Summary = lambda verdicts: "",
    ) -> None:
        self.verdicts, self.is_live, self._summary = verdicts, is_live, summary
        self._changed = threading.Condition()
        self._skipped: set[str] = set()
        self._groups: dict[str, Group] = {}
        self.begin(groups)

    def begin(self, groups: Sequence[Group]) -> None:
        """Order these from now on, in place of those before; each once."""
        with self._changed:
            self._groups = {group.key: group for group in groups}
            self._skipped = set()

    def state(self) -> dict[str, Any]:
        """What the page shows around a group."""
        with self._changed:
            status = {key: self._status(key) for key in self._groups}
            return {
                "rater": self.verdicts.rater,
                "live": self.is_live,
                "groups": [{"key": key, "status": value} for key, value in status.items()],
                "file": str(self.verdicts.path),
                "summary": "" if self.is_live or "open" in status.values() else self._summary(self.verdicts.all()),
            }

    def group(self, key: str) -> dict[str, Any]:
        """Its texts, in an order of the rater's own, or as it was ranked; KeyError for an unknown one."""
        with self._changed:
            group, verdict = self._groups[key], self.verdicts.get(key)
        order = sorted(range(len(group.completions)), key=lambda number: _draw(self.verdicts.rater, key, number))
        if verdict is not None:
            order.sort(key=lambda number: verdict.ranks[number])
        ranks = [] if verdict is None else [verdict.ranks[number] for number in order[: verdict.num_good]]
        return {
            "key": key,
            "prompt": [{"role": role, "text": visible(text)} for role, text in group.turns],
            "completions": [
                {
                    "number": number,
                    "text": visible(group.completions[number]),
                    "cut": bool(group.truncated and group.truncated[number]),
                }
                for number in order
            ],
            "ties": [place > 0 and rank == ranks[place - 1] for place, rank in enumerate(ranks)],
            "good": None if verdict is None else verdict.num_good,
        }

    def rank(self, message: Mapping[str, Any]) -> None:
        """Keep what the page says of a group.

        Raises:
            KeyError: an unknown group.
            ValueError: no order of its completions.
        """
        key, order, ties, good = (message.get(name) for name in ("key", "order", "ties", "good"))
        if not _are(order, int) or not _are(ties, bool) or not _are([good], int):
            raise ValueError("`order` must be whole numbers, `ties` true or false, and `good` a whole number")
        with self._changed:
            group = self._groups[str(key)]
            self.verdicts.add(Verdict.of(group, order, ties, good, self.verdicts.rater))  # type: ignore[arg-type]
            self._changed.notify_all()

    def skip(self, message: Mapping[str, Any]) -> None:
        """Leave a group for later; KeyError for an unknown one."""
        with self._changed:
            self._skipped.add(self._groups[str(message.get("key"))].key)
            self._changed.notify_all()

    def reopen(self, message: Mapping[str, Any]) -> None:
        """Ask for what was skipped once more."""
        with self._changed:
            self._skipped.clear()

    def wait(self, seconds: float) -> bool:
        """Whether all groups are ranked or skipped, after at most ``seconds``."""
        with self._changed:
            return self._changed.wait_for(lambda: self.num_open == 0, seconds)

    @property
    def num_open(self) -> int:
        """Groups that are neither ranked nor skipped."""
        return sum(self._status(key) == "open" for key in self._groups)

    @property
    def num_done(self) -> int:
        """Groups that are ranked."""
        return sum(self._status(key) == "done" for key in self._groups)

    def _status(self, key: str) -> str:
        return "done" if key in self.verdicts else "skipped" if key in self._skipped else "open"


def _draw(rater: str, key: str, number: int) -> bytes:
    return hashlib.sha256(repr((rater, key, number)).encode()).digest()


def _are(values: Any, kind: type) -> bool:
    """A list of ``kind``; True is no whole number."""
    return isinstance(values, list) and all(type(value) is kind for value in values)

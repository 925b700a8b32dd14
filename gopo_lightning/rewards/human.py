"""A person's order of each group: read from files of verdicts, or asked for on a page while the training waits."""

import math
import time
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor

from gopo_lightning.distributed.collectives import all_or_none, gather_objects, rank
from gopo_lightning.human.groups import Group, Turns, group_of
from gopo_lightning.human.server import RankingServer
from gopo_lightning.human.session import Session
from gopo_lightning.human.verdicts import Verdict, VerdictFile, check_rater, read_verdicts
from gopo_lightning.rewards.pairwise import Groups, PairwiseSource
from gopo_lightning.types import Completion, Prompt

_POLL_SECONDS = 5.0
"""The longest that ranks wait in one collective for what a person says to rank 0."""


class HumanRanking(PairwiseSource):
    """Compares the completions of a group as people have ordered them (`gopo-lightning rank`), or order them now.

    W_ij is the mean over raters: 1 where i ranks before j, ½ where they tie, 0 otherwise. Completions that no verdict
    holds are not compared. One that was cut off is also known by its beginning. A group that was skipped, or of which
    none is good, teaches nothing.

    With ``ask``, rank 0 serves a page at 127.0.0.1 whose address it prints, and the training waits until the person has
    ordered or skipped the groups of all ranks that no verdict in the folder covers. Every verdict is on disk before the
    page says so: a resumed run samples the same texts and asks about none again. Validation asks nobody: a person's
    win rate is NaN there, so let another source stand beside this one, or look at `rank` of two policies' completions.

    Args:
        verdicts: with ``ask`` the folder of all raters' files; else a file, a pattern or a folder.
        ask: wait for a person where no verdict covers a group; otherwise such a group is not compared.
        rater: who is asked; their verdicts go to ``<verdicts>/<rater>.jsonl``.
        port: of the page; 0 takes a free one. Over SSH, forward it under the same number.
        timeout_seconds: so long without a new verdict, and the rest of the rollout counts as skipped; null waits for
            ever. (`rewards.timeout_seconds` does not hold for people.)
        name: in logs and error messages.
    """

    waits_for_people = True

    def __init__(
        self,
        verdicts: str,
        ask: bool = False,
        rater: str = "me",
        port: int = 0,
        timeout_seconds: float | None = None,
        name: str = "human",
    ) -> None:
        check_rater(rater)
        if timeout_seconds is not None and not timeout_seconds > 0:
            raise ValueError(f"timeout_seconds={timeout_seconds} must be above 0; null waits for ever.")
        if not 0 <= port < 2**16:
            raise ValueError(f"port={port} must be in [0, 65535]; 0 takes a free one.")
        if not ask and (port, timeout_seconds, rater) != (0, None, "me"):
            raise ValueError("rater, port and timeout_seconds are for ask: true. Set it, or leave them out.")
        self.path, self.ask, self.rater, self.port = Path(verdicts), ask, rater, port
        self.timeout_seconds, self.name, self.tolerance = timeout_seconds, name, 1e-6
        self._verdicts: dict[Turns, list[Verdict]] | None = None
        self._session: Session | None = None
        self._server: RankingServer | None = None

    def setup(self, device: torch.device) -> None:
        """Read what is there; with ``ask``, rank 0 serves the page from here on."""
        if self._verdicts is not None:
            return
        self._verdicts = {}
        if not self.ask:
            self._keep(read_verdicts(self.path))
        elif rank() == 0:
            file = VerdictFile(self.path, self.rater)
            self._keep(file.all())
            for other in sorted({*self.path.glob("*.jsonl")} - {file.path}):
                self._keep(read_verdicts(other))
            self._session = Session(file, is_live=True)
            self._server = RankingServer(self._session, self.port)
            rank_zero_info(f"{self.name}: order completions at {self._server.address}")

    def close(self) -> None:
        """Serve the page no longer, and let another process write the file."""
        if self._server is not None and self._session is not None:
            self._server.close()
            self._session.verdicts.close()
        self._verdicts = self._server = self._session = None

    def __call__(self, prompts: Sequence[Prompt], groups: Groups) -> Tensor:
        """wins_PGG. With ``ask`` a collective, which ends when a person has seen the groups of all ranks."""
        mine = [group_of(prompt, group) for prompt, group in zip(prompts, groups, strict=True)]
        known = self._asked(mine) if self.ask else self._verdicts or {}
        return torch.stack(
            [_wins(group, known.get(asked.turns, [])) for group, asked in zip(groups, mine, strict=True)]
        )

    def versus(self, prompts: Sequence[Prompt], groups: Groups, references: Groups) -> Tensor:
        """NaN [P, G, R]: in validation nobody is asked."""
        return torch.full((len(groups), len(groups[0]), len(references[0])), math.nan, dtype=torch.float64)

    def _asked(self, mine: Sequence[Group]) -> dict[Turns, list[Verdict]]:
        """Verdicts on the groups of all ranks, by prompt; the same on every rank."""
        everyones = [group for part in gather_objects(list(mine)) for group in part]
        if self._session is not None:
            open_groups = [group for group in everyones if not self._covers(group)]
            self._session.begin(open_groups)
            if open_groups:
                rank_zero_info(f"{self.name}: {len(open_groups)} groups to order at {self._address}")
        said, since = self._session.num_open if self._session is not None else 0, time.monotonic()
        while True:
            with all_or_none(f"waiting for {self.rater}"):
                if self._session is None:
                    is_done = False
                else:
                    left = since + (self.timeout_seconds or math.inf) - time.monotonic()
                    is_done = self._session.wait(min(_POLL_SECONDS, max(left, 0.0)))
                    if (count := self._session.num_open) != said:
                        said, since = count, time.monotonic()
                    else:
                        is_done |= left <= _POLL_SECONDS
            if gather_objects(is_done)[0]:
                break
        verdicts: list[Verdict] | None = None
        if self._session is not None:
            self._keep(v for group in everyones if (v := self._session.verdicts.get(group.key)) is not None)
            wanted = {group.turns for group in everyones}
            verdicts = [v for turns in wanted for v in (self._verdicts or {}).get(turns, [])]
            self._session.begin([])
        found: dict[Turns, list[Verdict]] = {}
        for verdict in gather_objects(verdicts)[0]:
            found.setdefault(verdict.group.turns, []).append(verdict)
        return found

    @property
    def _address(self) -> str:
        assert self._server is not None
        return self._server.address

    def _covers(self, group: Group) -> bool:
        """Whether nothing is to be asked: a verdict holds all its texts, or there is but one."""
        found = (self._verdicts or {}).get(group.turns, [])
        return len(group.completions) < 2 or any({*group.completions} <= {*v.group.completions} for v in found)

    def _keep(self, verdicts: Iterable[Verdict]) -> None:
        """Remember, one of each rater and group: the last."""
        assert self._verdicts is not None
        for verdict in verdicts:
            others = self._verdicts.setdefault(verdict.group.turns, [])
            others[:] = [v for v in others if (v.rater, v.group.key) != (verdict.rater, verdict.group.key)]
            others.append(verdict)


def _wins(group: Sequence[str], verdicts: Sequence[Verdict]) -> Tensor:
    """float64 [G, G], the mean over ``verdicts``; NaN for completions that none of them holds both."""
    G = len(group)
    wins = [torch.full((G, G), math.nan, dtype=torch.float64)]
    for verdict in verdicts:
        ranks_G = torch.tensor([_rank(text, verdict) for text in group], dtype=torch.float64)
        before_GG = ranks_G[:, None] - ranks_G[None, :]
        wins.append(torch.where(before_GG.isnan(), math.nan, 0.5 - 0.5 * before_GG.sign()))
    return torch.stack(wins).nanmean(0)


def _rank(text: str, verdict: Verdict) -> float:
    """Of the completion that is ``text`` or, cut off, the only one that begins with it; NaN where there is none."""
    ranks = dict(zip(verdict.group.completions, verdict.ranks, strict=True))
    prompt = verdict.group.prompt if isinstance(verdict.group.prompt, str) else ""
    for whole in (str(text), prompt + text):  # `RecordedEngine` takes a prompt off that an answer repeats
        if whole in ranks:
            return float(ranks[whole])
    cut = isinstance(text, Completion) and text.truncated and bool(text)
    found = [rank for known, rank in ranks.items() if cut and known.startswith(text)]
    return float(found[0]) if len(found) == 1 else math.nan

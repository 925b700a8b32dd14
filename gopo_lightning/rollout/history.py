"""A length reward measured by the correct completions of the same prompt so far."""

import hashlib
import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple, TypeVar, get_args

import torch

from gopo_lightning.distributed.collectives import gather_objects
from gopo_lightning.objectives.base import Mean
from gopo_lightning.objectives.named import check_choice
from gopo_lightning.rollout.correct import Correct
from gopo_lightning.rollout.transforms import Context, Setting, Transform, mean_of, plus
from gopo_lightning.types import Experience, Prompt, Rollout

R = TypeVar("R", bound=Rollout)
Form = Literal["cosine", "linear"]
History = Literal["min", "mean"]

LOWEST_OF_CORRECT = -0.7
"""So that a correct completion, of reward 1, stays above a wrong one, of 0."""


class Lengths(NamedTuple):
    """Of the correct completions of one prompt; whole numbers, so that their sum does not depend on its order."""

    shortest: int
    total: int
    number: int

    def joined(self, other: "Lengths | None") -> "Lengths":
        """Of these and others.

        >>> Lengths(5, 12, 2).joined(Lengths(4, 4, 1))
        Lengths(shortest=4, total=16, number=3)
        """
        if other is None:
            return self
        return Lengths(min(self.shortest, other.shortest), self.total + other.total, self.number + other.number)


class HistoryLength(Transform):
    """r + w · r_len, r_len by the shortest correct completion of the prompt so far: HAPO (arXiv 2505.11225).

    With L tokens and h of the history, f = cos(π L / 2h) up to 2h and −1 beyond: 1 for no tokens, 0 at h. A correct
    completion has r_len = max(f, −0.7), a wrong one min(f, 0): nothing is gained by a wrong one that is short. Where
    rewards are 0 and 1, any correct one stays above any wrong one. ``linear`` has f = 1 − L / h up to h, 0 up to
    (1 + tolerance) h, and beyond it falls by 1 for each h.

    All completions of a step are measured by the history before it, which learns after the update. A prompt without
    one has r_len 0, so nothing happens before its second visit: use this over several epochs. Completions without a
    valid score have r_len 0 and are not learned from, nor are those of weight 0.

    Departures: lengths count EOS, where the authors tokenise the text anew. One history is shared by all ranks, where
    theirs each keep one, and evaluation does not add to it. A prompt is known by its tokens, so that the history stays
    right where a resumed run reads other data.

    Args:
        weight: w in (0, 1], in units of the reward.
        form: of f, cosine or linear.
        history: h is the ``min`` or the ``mean`` of the correct completions' lengths.
        tolerance: of linear; 0.1 when null.
        source: whose score says which completions are correct; the combined reward when null.
        tau: the least score of a correct completion.
    """

    def __init__(
        self,
        weight: float = 1.0,
        form: Form = "cosine",
        history: History = "min",
        tolerance: float | None = None,
        source: str | None = None,
        tau: float = 0.5,
    ) -> None:
        check_choice("form", form, get_args(Form))
        check_choice("history", history, get_args(History))
        if not 0 < weight <= 1:
            raise ValueError(
                f"weight={weight} of HistoryLength must lie in (0, 1]. Leave the transform out for none; above 1 a "
                "short wrong completion could be worth more than a long correct one."
            )
        if tolerance is not None and (form != "linear" or not 0 <= tolerance < math.inf):
            raise ValueError(
                f"tolerance={tolerance} of HistoryLength is a share of the history of at least 0, of form: linear. "
                "Leave it out."
            )
        self._correct = Correct(source, tau, "HistoryLength")
        self.weight, self.form, self.history, self.tolerance = weight, form, history, tolerance
        self.source, self.tau = source, tau
        self._known: dict[str, Lengths] = {}
        self._seen: dict[str, Lengths] = {}  # on this rank, in the last call
        self._measured: dict[str, Mean] = {}

    def set_up(self, setting: Setting) -> None:
        """ValueError for a source that the run does not have."""
        self._correct.set_up(setting)

    def __call__(self, rollout: R, context: Context) -> R:
        """Rewards with the length reward."""
        correct_PG = self._correct(rollout).tolist()
        lengths_PG = rollout.completions.lengths_N.view(len(rollout), -1).tolist()
        keys = [key_of(prompt) for prompt in rollout.prompts.prompts]
        earned_PG = [
            [self._earned(length, correct, self._known.get(key)) for length, correct in zip(*group, strict=True)]
            for key, *group in zip(keys, lengths_PG, correct_PG, strict=True)
        ]
        self._seen = {}
        for key, lengths_G, correct_G in zip(keys, lengths_PG, correct_PG, strict=True):
            if found := lengths_of(lengths_G, correct_G):
                self._seen[key] = found.joined(self._seen.get(key))
        known_P = torch.tensor([key in self._known for key in keys])
        earned = torch.tensor(earned_PG, dtype=torch.float64)
        self._measured = {
            "known_history_fraction": mean_of(known_P.double()),
            "length_reward": mean_of(earned[known_P]),
        }
        return plus(rollout, self.weight * earned.flatten())

    def metrics(self) -> Mapping[str, Mean]:
        """How many prompts have a history, and the mean of r_len where there is one."""
        return self._measured

    def commit(self, experience: Experience) -> None:
        """Learn the correct completions of all ranks."""
        for seen in gather_objects(self._seen):
            for key, lengths in seen.items():
                self._known[key] = lengths.joined(self._known.get(key))

    def state_dict(self) -> dict[str, Any]:
        """The history."""
        return {"known": {key: tuple(lengths) for key, lengths in self._known.items()}}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """What ``state_dict`` gave."""
        self._known = {key: Lengths(*lengths) for key, lengths in state["known"].items()}

    def _earned(self, length: int, correct: float, known: Lengths | None) -> float:
        """r_len of one completion; ``correct`` is 1, 0 or NaN."""
        if known is None or math.isnan(correct):
            return 0.0
        past = known.shortest if self.history == "min" else known.total / known.number
        if self.form == "cosine":
            conciseness = cosine(length, past)
        else:
            conciseness = linear(length, past, 0.1 if self.tolerance is None else self.tolerance)
        return max(conciseness, LOWEST_OF_CORRECT) if correct else min(conciseness, 0.0)


def cosine(length: float, past: float) -> float:
    """From 1 at no tokens over 0 at ``past`` to −1 at twice that and beyond."""
    return math.cos(min(math.pi * length / (2 * past), math.pi))


def linear(length: float, past: float, tolerance: float) -> float:
    """From 1 at no tokens to 0 at ``past``; from (1 + tolerance) · ``past`` on down to −1."""
    return max(1 - length / past, 0.0) + max(min((1 + tolerance) - length / past, 0.0), -1.0)


def lengths_of(lengths_G: Sequence[int], correct_G: Sequence[float]) -> Lengths | None:
    """Of the correct completions; None where none is.

    >>> lengths_of([7, 3, 9], [1.0, 0.0, 1.0])
    Lengths(shortest=7, total=16, number=2)
    """
    found = [length for length, correct in zip(lengths_G, correct_G, strict=True) if correct == 1]
    return Lengths(min(found), sum(found), len(found)) if found else None


def key_of(prompt: Prompt) -> str:
    """By which a prompt is known: a hash of its tokens."""
    return hashlib.sha256(repr(prompt.token_ids).encode()).hexdigest()[:16]

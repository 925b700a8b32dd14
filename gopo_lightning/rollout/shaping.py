"""`Rollout` → `Experience`: transforms, advantages, credit. Nothing here runs in an evaluation."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, TypeVar

from torch import Tensor

from gopo_lightning.distributed.collectives import all_or_none
from gopo_lightning.objectives.base import Needed
from gopo_lightning.objectives.credit import Credit, broadcast
from gopo_lightning.rollout.transforms import Context, Transform
from gopo_lightning.types import Experience, Rollout

R = TypeVar("R", bound=Rollout)


class Shaping:
    """Makes of what was scored what is trained on.

    Args:
        advantage: rewards_PG → advantages_PG, or wins_PGG → advantages_PG if ``from_wins``.
        from_wins: the advantage reads the comparison matrices of the only source, a pairwise one.
        transforms: in their order; those of position rewards go before the advantage.
        credit: experience → advantages_NT or None.
    """

    def __init__(
        self,
        advantage: Callable[[Tensor], Tensor],
        *,
        from_wins: bool = False,
        transforms: Sequence[Transform] = (),
        credit: Credit = broadcast,
    ) -> None:
        self.advantage, self.from_wins = advantage, from_wins
        self.transforms, self.credit = tuple(transforms), credit

    @property
    def needs(self) -> frozenset[Needed]:
        """Frozen log-probs that must be there before."""
        return frozenset().union(*(transform.needs for transform in self.transforms))

    def __call__(self, rollout: Rollout, context: Context) -> Experience:
        """The experience of this rank. What fails on one rank fails on all."""
        shaped = self._transformed(rollout, "rewards", context)
        if self.from_wins and shaped.rewards_PG is not rollout.rewards_PG:
            raise ValueError(
                "a transform changes the rewards, but the ordinal advantage of the only source, a pairwise one, reads "
                "its comparisons and no reward. Add a second source, use another advantage, or remove the transform."
            )
        with all_or_none("the advantage"):
            advantages_PG = self.advantage(self._judged(shaped)).float().to(rollout.prompts.tokens_PL.device)
        experience = self._transformed(shaped.with_advantages(advantages_PG), "advantages", context)
        with all_or_none("the credit"):
            advantages_NT = self.credit(experience)
            if advantages_NT is None and experience.token_rewards_NT is not None:
                raise ValueError(
                    "a transform gives rewards to single tokens, and credit=broadcast does not read them. Use credit: "
                    "reward_to_go, or remove the transform."
                )
        return replace(experience, advantages_NT=advantages_NT)

    def commit(self, experience: Experience) -> None:
        """After the updates on ``experience``."""
        for transform in self.transforms:
            transform.commit(experience)

    def state_dict(self) -> dict[str, Any]:
        """The transforms' states, by place and class."""
        return {_key(i, transform): transform.state_dict() for i, transform in enumerate(self.transforms)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore those of transforms that are where they were; others begin anew."""
        for i, transform in enumerate(self.transforms):
            if (key := _key(i, transform)) in state:
                transform.load_state_dict(state[key])

    def _judged(self, rollout: Rollout) -> Tensor:
        """What the advantage reads."""
        if not self.from_wins:
            return rollout.rewards_PG
        assert rollout.wins_PGGK is not None
        return rollout.wins_PGGK[..., 0]

    def _transformed(self, rollout: R, position: str, context: Context) -> R:
        for transform in self.transforms:
            if transform.position == position:
                with all_or_none(f"the transform {type(transform).__name__}"):
                    rollout = transform(rollout, context)
        return rollout


def _key(place: int, transform: Transform) -> str:
    return f"{place} {type(transform).__qualname__}"

"""`Rollout` → `Experience`: transforms, advantages, credit. Nothing here runs in an evaluation."""

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from itertools import chain
from typing import Any, TypeVar, get_args

import torch
from torch import Tensor

from gopo_lightning.distributed.collectives import all_or_none, gather_objects
from gopo_lightning.objectives.advantages import preferences
from gopo_lightning.objectives.base import Needed
from gopo_lightning.objectives.credit import Credit, broadcast
from gopo_lightning.objectives.named import described
from gopo_lightning.rollout.engines.streams import stream_seeds, uniforms
from gopo_lightning.rollout.transforms import Context, Position, Transform
from gopo_lightning.types import Experience, Rollout

R = TypeVar("R", bound=Rollout)


class Shaping:
    """Makes of what was scored what is trained on.

    Args:
        advantage: rewards_PG → advantages_PG, or wins_PGG → advantages_PG if ``from_wins``.
        from_wins: the advantage reads the comparison matrices of the only source, a pairwise one.
        transforms: in their order; those of position rewards go before the advantage.
        credit: experience → advantages_NT or None.
        advantages_are_read: whether the objective reads them; else a transform may not change them.
        draws_are_read: whether the objective draws, and the experience needs ``draws_PGG``.

    Raises:
        ValueError: a transform stands at an unknown position.
    """

    def __init__(
        self,
        advantage: Callable[[Tensor], Tensor],
        *,
        from_wins: bool = False,
        transforms: Sequence[Transform] = (),
        credit: Credit = broadcast,
        advantages_are_read: bool = True,
        draws_are_read: bool = False,
    ) -> None:
        for transform in transforms:
            if transform.position not in get_args(Position):
                raise ValueError(
                    f"position={transform.position!r} of {type(transform).__name__} is unknown, so it would never be "
                    f"applied; use one of {list(get_args(Position))}."
                )
        self.advantage, self.from_wins = advantage, from_wins
        self.transforms, self.credit = tuple(transforms), credit
        self.advantages_are_read, self.draws_are_read = advantages_are_read, draws_are_read

    @property
    def needs(self) -> frozenset[Needed]:
        """Frozen log-probs that must be there before."""
        return frozenset().union(*(transform.needs for transform in self.transforms))

    def __call__(self, rollout: Rollout, context: Context) -> Experience:
        """The experience of this rank. What fails on one rank fails on all."""
        shaped = self._transformed(rollout, "rewards", context)
        with all_or_none("the advantage"):
            judged = self._judged(shaped, changed=shaped.rewards_PG is not rollout.rewards_PG)
            advantages_PG = self.advantage(judged).float().to(rollout.prompts.tokens_PL.device)
        experience = self._transformed(self._experience(shaped, judged, advantages_PG, context), "advantages", context)
        with all_or_none("the credit"):
            self._check_read(experience, advantages_PG)
            advantages_NT = self.credit(experience)
            check_credit(advantages_NT, experience)
        return replace(experience, advantages_NT=None if advantages_NT is None else advantages_NT.float())

    def commit(self, experience: Experience) -> None:
        """After the updates on ``experience``."""
        for transform in self.transforms:
            with all_or_none(f"commit of the transform {type(transform).__name__}"):
                transform.commit(experience)

    def metrics(self) -> dict[str, Tensor]:
        """`transform/<name>`, what the transforms measured in the last call, over all ranks; a collective.

        What several of them call the same is one mean.
        """
        own = [
            (name, float(mean.sum), float(mean.count))
            for transform in self.transforms
            for name, mean in transform.metrics().items()
        ]
        sums: dict[str, Tensor] = defaultdict(lambda: torch.zeros(2, dtype=torch.float64))
        for name, total, count in chain.from_iterable(gather_objects(own) if self.transforms else []):
            sums[name] += torch.tensor([total, count], dtype=torch.float64)
        return {f"transform/{name}": total / count for name, (total, count) in sums.items() if count > 0}

    def state_dict(self) -> dict[str, Any]:
        """The transforms' states, by place and class."""
        return {_key(i, transform): transform.state_dict() for i, transform in enumerate(self.transforms)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore those of transforms that are where they were; others begin anew."""
        for i, transform in enumerate(self.transforms):
            if (key := _key(i, transform)) in state:
                transform.load_state_dict(state[key])

    def _experience(self, rollout: Rollout, judged: Tensor, advantages_PG: Tensor, context: Context) -> Experience:
        """With what objectives read beside the advantages."""
        return rollout.with_advantages(
            advantages_PG,
            preferences_PGG=preferences(judged) if self.from_wins else None,
            draws_PGG=_draws(rollout, context) if self.draws_are_read else None,
        )

    def _check_read(self, experience: Experience, advantages_PG: Tensor) -> None:
        """ValueError where a transform changed advantages that nothing reads."""
        if not self.advantages_are_read and experience.advantages_PG is not advantages_PG:
            raise ValueError(
                "a transform changes the advantages, but the objective reads rewards or comparisons and no advantage. "
                "Remove the transform, or use an objective that reads advantages, such as ClippedSurrogate."
            )

    def _judged(self, rollout: Rollout, *, changed: bool) -> Tensor:
        """What the advantage reads; ValueError where that are comparisons, and a transform has ``changed`` rewards."""
        if not self.from_wins:
            return rollout.rewards_PG
        if changed:
            raise ValueError(
                "a transform changes the rewards, but the ordinal advantage of the only source, a pairwise one, reads "
                "its comparisons and no reward. Add a second source, use another advantage, or remove the transform."
            )
        assert rollout.wins_PGGK is not None
        return rollout.wins_PGGK[..., 0]

    def _transformed(self, rollout: R, position: str, context: Context) -> R:
        for transform in self.transforms:
            if transform.position == position:
                with all_or_none(f"the transform {type(transform).__name__}"):
                    changed = transform(rollout, context)
                    check_transformed(changed, rollout, type(transform).__name__)
                    rollout = changed
        return rollout


def _draws(rollout: Rollout, context: Context) -> Tensor:
    """float64 [P, G, G] in [0, 1), from streams of their own, keyed by seed, step and prompt."""
    P, G = rollout.rewards_PG.shape
    seeds_N = stream_seeds(~context.seed, ~context.step, [prompt.index for prompt in rollout.prompts.prompts], G)
    return uniforms(seeds_N, G).view(P, G, G).to(rollout.rewards_PG.device)


def check_transformed(changed: Any, rollout: Rollout, name: str) -> None:
    """ValueError unless the transform ``name`` gave ``rollout`` with other rewards, weights or advantages."""
    if type(changed) is not type(rollout):
        raise ValueError(
            f"the transform {name} returned {described(changed)}; it must return the {type(rollout).__name__} that it "
            "got, with what it changes: dataclasses.replace(rollout, …)."
        )
    if changed.prompts is not rollout.prompts or changed.completions is not rollout.completions:
        raise ValueError(
            f"the transform {name} changed prompts or completions, on which the update would be no policy gradient. "
            "Give those that should not count a weight of 0, by weights_PG."
        )
    if getattr(changed, "advantages_NT", None) is not None:
        raise ValueError(
            f"the transform {name} gave advantages to tokens, which the credit would overwrite. Use a function of your "
            "own as objective.credit, or give token_rewards_NT before the advantages."
        )
    _check_fields(changed, rollout, name)


def _check_fields(changed: Rollout, rollout: Rollout, name: str) -> None:
    """Shapes and ranges of what a transform may change."""
    PG, NT = rollout.rewards_PG.shape, rollout.completions.mask_NT.shape
    given = {"rewards_PG": PG} | ({"advantages_PG": PG} if isinstance(rollout, Experience) else {})
    if changed.weights_PG is not None:
        given["weights_PG"] = PG
    if changed.token_rewards_NT is not None:
        given["token_rewards_NT"] = NT
    for field, shape in given.items():
        if not _is_real(value := getattr(changed, field), shape):
            raise ValueError(
                f"the transform {name} gave {field}={described(value)}; it must be a float tensor {tuple(shape)}."
            )
    weights_PG = changed.weights_PG
    if weights_PG is not None and not ((weights_PG >= 0) & weights_PG.isfinite()).all():
        raise ValueError(
            f"the transform {name} gave weights_PG={weights_PG.tolist()}; weights must be finite and at least 0. Use 0 "
            "for what should not count."
        )


def check_credit(advantages_NT: Any, experience: Experience) -> None:
    """ValueError unless a credit may give this."""
    shape = experience.completions.mask_NT.shape
    if advantages_NT is not None and not _is_real(advantages_NT, shape):
        raise ValueError(
            f"the credit returned {described(advantages_NT)}; it must return a float tensor {tuple(shape)} "
            "[completions, tokens], or None where each token has the advantage of its completion."
        )
    if advantages_NT is None and experience.token_rewards_NT is not None:
        raise ValueError(
            "a transform gives rewards to single tokens, and credit=broadcast does not read them. Use credit: "
            "reward_to_go, or remove the transform."
        )


def _is_real(value: Any, shape: torch.Size) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point() and value.shape == shape


def _key(place: int, transform: Transform) -> str:
    return f"{place} {type(transform).__qualname__}"

"""Sources that learn from what was sampled: they see each rollout after its updates, and a checkpoint keeps them."""

from collections.abc import Iterable, Mapping
from contextlib import AbstractContextManager
from typing import Any, Protocol, runtime_checkable

from torch import Tensor

from gopo_lightning.distributed.collectives import all_or_none
from gopo_lightning.rewards.scoring import Source
from gopo_lightning.types import Rollout


@runtime_checkable
class LearnsFromRollouts(Protocol):
    """A source whose scores change in the course of a run."""

    def observe(self, rollout: Rollout, scores_PG: Tensor, *, step: int) -> None:
        """After the updates on ``rollout`` of this rank, of which the source's own scores are ``scores_PG``.

        A collective. What is learned must be the same on all ranks (gather it), as a checkpoint keeps that of rank 0.
        ``step``: optimiser steps so far.
        """
        ...

    def as_first(self) -> AbstractContextManager[None]:
        """Inside, the source is as it was before it learned anything, so that evaluations can be compared."""
        ...

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint keeps: tensors and plain values."""
        ...

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """What ``state_dict`` gave."""
        ...


def observe(sources: Iterable[Source], rollout: Rollout, *, step: int) -> None:
    """Show ``rollout`` to those that learn. A collective: what fails on one rank fails on all."""
    for k, source in enumerate(sources):
        if isinstance(source, LearnsFromRollouts):
            with all_or_none(f"what reward source '{source.name}' learns"):
                source.observe(rollout, rollout.rewards_PGK[..., k], step=step)


def state_of(sources: Iterable[Source]) -> dict[str, Any]:
    """State of each source that learns, by its name."""
    return {source.name: source.state_dict() for source in sources if isinstance(source, LearnsFromRollouts)}


def load_state(sources: Iterable[Source], state: Mapping[str, Any]) -> None:
    """What ``state_of`` gave; a source that was not there begins anew."""
    for source in sources:
        if isinstance(source, LearnsFromRollouts) and source.name in state:
            source.load_state_dict(state[source.name])


def refuse_learner(source: object, wrapper: str) -> None:
    """ValueError where ``wrapper`` would hide from the run that ``source`` learns."""
    if isinstance(source, LearnsFromRollouts):
        raise ValueError(
            f"{type(source).__name__} learns from rollouts, which it would not see inside of {wrapper}. Name it under "
            "rewards.sources itself, or use a source that does not learn."
        )

"""Frozen companions of the policy: a copy of its trained weights, taken anew from time to time."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor, nn

from gopo_lightning.distributed.fsdp import reshard, shard_like, whole_tensors
from gopo_lightning.policy.adapters import KeptWeights


class Iterate:
    """The policy as it was some updates ago; of LoRA the adapter alone.

    Before a rollout it becomes the present policy if, since the copy was taken, the updates have reached or passed a
    multiple of ``every``. So a rollout's updates all see one copy, and a multiple within them acts on the next rollout.

    Raises:
        ValueError: ``every`` is below 1.
    """

    def __init__(self, every: int) -> None:
        if every < 1:
            raise ValueError(f"iterate_every={every} must be at least 1; use null for no iterate.")
        self.every, self._step = every, -1
        self._weights: KeptWeights | None = None
        self._restored: Mapping[str, Tensor] | None = None

    def refresh(self, policy: nn.Module, step: int) -> None:
        """Before a rollout, at ``step`` updates: take a copy, if it is time."""
        if self._restored is not None:
            trained = {name: p.detach() for name, p in policy.named_parameters() if p.requires_grad}
            self._weights = KeptWeights({name: shard_like(self._restored[name], p) for name, p in trained.items()})
            self._restored = None
        if self._weights is None and step > 0:
            rank_zero_info(f"The checkpoint has no iterate: it begins as the policy of step {step}.")
        if self._weights is None or step // self.every > self._step // self.every:
            self._weights, self._step = KeptWeights.of(policy), step

    @contextmanager
    def of(self, policy: nn.Module) -> Iterator[nn.Module]:
        """``policy`` with the copy in the place of its weights inside."""
        assert self._weights is not None, "refresh comes first"
        reshard(policy)
        with self._weights.inside(policy):
            yield policy
            reshard(policy)

    def state_dict(self, *, keep: bool) -> dict[str, Any]:
        """The copy as whole CPU tensors, on ranks with ``keep``. A collective."""
        weights = self._restored if self._weights is None else self._weights.tensors
        return {"step": self._step, "weights": None if weights is None else whole_tensors(dict(weights), keep=keep)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """What ``state_dict`` gave; it is put in place with the next ``refresh``."""
        self._step, self._restored, self._weights = state["step"], state["weights"], None

"""Log-probs of an experience: whole groups by token budget, their prompts forwarded once where that is exact."""

from functools import partial

import torch
from torch import Tensor, nn

from gopo_lightning.distributed.collectives import gather_objects
from gopo_lightning.distributed.fsdp import reshard
from gopo_lightning.policy.logprobs import TokenLogprobs, completion_logprobs
from gopo_lightning.policy.model import evaluating
from gopo_lightning.policy.prefix_sharing import PrefixSharing, decide_prefix_sharing
from gopo_lightning.training.micro_batches import MicroBatch, fill_up, forwarded_tokens, split_groups
from gopo_lightning.types import Rollout


class PolicyForward:
    """Reads log-probs at the sampling temperature.

    Args:
        temperature: of the sampling.
        micro_batch_tokens: most tokens of a micro-batch; None: no limit.
        prefix_sharing: whether a group's prompt is forwarded once; decided on the first rollout.
    """

    def __init__(self, temperature: float, micro_batch_tokens: int | None, prefix_sharing: PrefixSharing) -> None:
        self.temperature, self.micro_batch_tokens, self.mode = temperature, micro_batch_tokens, prefix_sharing
        self.shares_prefix: bool | None = None

    def restore(self, shares_prefix: bool | None) -> None:
        """Go on as a checkpoint says, where the mode leaves a choice: a trial on other weights might end otherwise."""
        if self.mode == "auto" or (self.mode == "always" and shares_prefix):
            self.shares_prefix = shares_prefix

    def decide(self, policy: nn.Module, rollout: Rollout) -> None:
        """Decide, once, whether to share prompts. A collective."""
        if self.shares_prefix is None:
            self.shares_prefix = decide_prefix_sharing(self.mode, policy, rollout, self.temperature)
            reshard(policy)

    def __call__(self, model: nn.Module, rollout: Rollout, *, with_entropy: bool = False) -> TokenLogprobs:
        """Of all completions in one forward, with gradient."""
        return completion_logprobs(
            model,
            rollout.prompts,
            rollout.completions,
            temperature=self.temperature,
            with_entropy=with_entropy,
            shared_prefix=bool(self.shares_prefix),
        )

    @torch.no_grad()
    def frozen(self, model: nn.Module, rollout: Rollout) -> Tensor:
        """logprobs_NT without gradient, micro-batch by micro-batch. A collective."""
        G = rollout.group_size
        logprobs_PGT = torch.zeros_like(rollout.completions.tokens_NT, dtype=torch.float32).unflatten(0, (-1, G))
        with evaluating(model):
            for groups_P, _ in self.micro_batches(rollout):
                logprobs_NT = self(model, rollout.select(groups_P)).logprobs_NT
                logprobs_PGT[groups_P, :, : logprobs_NT.shape[1]] = logprobs_NT.unflatten(0, (-1, G))
        reshard(model)
        return logprobs_PGT.flatten(0, 1)

    def micro_batches(
        self, rollout: Rollout, groups_P: Tensor | None = None, active_P: Tensor | None = None
    ) -> list[MicroBatch]:
        """The groups (None: all) by token budget, as many micro-batches on every rank. A collective.

        Groups that are not in ``active_P`` (bool; None: all are) are left out, unless all are, on all ranks.
        """
        wanted_P = torch.ones(len(rollout), dtype=torch.bool)
        if groups_P is not None:
            wanted_P = torch.zeros_like(wanted_P).index_fill(0, groups_P, True)
        active_P = wanted_P if active_P is None else wanted_P & active_P
        split = partial(split_groups, rollout, budget=self.micro_batch_tokens, shared=bool(self.shares_prefix))
        active, wanted = (split(active_P=some_P) for some_P in (active_P, wanted_P))
        numbers = gather_objects((len(active), len(wanted)))
        num_active, num_wanted = (max(column) for column in zip(*numbers, strict=True))
        return fill_up(rollout, active if num_active else wanted, num_active or num_wanted)

    def tokens(self, rollout: Rollout) -> tuple[int, int]:
        """``(real, all)`` tokens of one forward of ``rollout``; the difference is padding."""
        return forwarded_tokens(rollout, shared=bool(self.shares_prefix))

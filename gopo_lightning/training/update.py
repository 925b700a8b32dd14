"""One optimiser step on some groups of an experience, micro-batch by micro-batch."""

from collections import defaultdict
from typing import Any

import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn

from gopo_lightning.distributed.collectives import all_reduce_sum, world_size
from gopo_lightning.distributed.fsdp import clip_grad_norm
from gopo_lightning.distributed.strategies import gradient_sync
from gopo_lightning.objectives.base import Mean, Objective
from gopo_lightning.training.checks import check_finite
from gopo_lightning.training.forward import PolicyForward
from gopo_lightning.types import Experience

Sums = dict[str, Tensor]
"""float64 [2] of each metric: its sum and its count over micro-batches, and over ranks in the end. The count of the
loss, which is a sum by itself, is 0."""
_LOSS = "loss"


class GradientUpdate:
    """Backward and step.

    Args:
        objective: what is minimised.
        forward: reads log-probs.
        max_grad_norm: gradients are scaled down to this L2 norm; None for none.
        log_entropy: whether to measure the policy's entropy.
    """

    def __init__(
        self, objective: Objective, forward: PolicyForward, *, max_grad_norm: float | None, log_entropy: bool
    ) -> None:
        self.objective, self.forward = objective, forward
        self.max_grad_norm, self.log_entropy = max_grad_norm, log_entropy

    def __call__(
        self, module: LightningModule, policy: nn.Module, experience: Experience, groups_P: Tensor
    ) -> dict[str, Tensor]:
        """Update ``policy`` by the groups (int64 row numbers, maybe none on this rank); a collective.

        The denominator is that of the whole minibatch over all ranks. Returns its metrics over all ranks.
        """
        minibatch = experience.select(groups_P)
        total = all_reduce_sum(self.objective.denominator(minibatch, self.objective.mask(minibatch)))
        active_P = self.objective.active(experience)
        micro_batches = self.forward.micro_batches(experience, groups_P, active_P)
        sums: Sums = defaultdict(lambda: torch.zeros(2, dtype=torch.float64, device=module.device))
        for i, (micro_P, counts) in enumerate(micro_batches):
            with gradient_sync(module.trainer.strategy, policy, sync=i + 1 == len(micro_batches)):
                self._accumulate(module, policy, experience.select(micro_P), total, sums, counts)
        return self._step(module, policy, experience, sums)

    def _accumulate(
        self,
        module: LightningModule,
        policy: nn.Module,
        experience: Experience,
        total: Tensor,
        sums: Sums,
        counts: bool,
    ) -> None:
        """Forward and backward of one micro-batch, with weight 0 unless it ``counts``; adds its metrics to ``sums``."""
        completions, mask_NT = experience.completions, self.objective.mask(experience) & counts
        current = self.forward(policy, experience, with_entropy=self.log_entropy)
        loss = self.objective(current.logprobs_NT, experience, mask_NT, total)
        module.manual_backward(loss.value * world_size())  # DDP and FSDP average over ranks; the denominator is global
        real, forwarded = self.forward.tokens(experience)
        num_tokens = mask_NT.sum()
        means = {
            _LOSS: Mean(loss.value, torch.zeros_like(loss.value)),
            "padding_fraction": Mean(*torch.tensor([forwarded - real * counts, forwarded], device=module.device)),
        }
        if current.entropy_NT is not None:
            means["entropy"] = Mean(current.entropy_NT.detach()[mask_NT].sum(), num_tokens)
        if completions.sampler_logprobs_NT is not None:
            difference_NT = current.logprobs_NT.detach() - completions.sampler_logprobs_NT
            means["sampler_logprob_diff"] = Mean(difference_NT[mask_NT].abs().sum(), num_tokens)
        if taken := sorted(means.keys() & loss.metrics.keys()):
            raise ValueError(f"{type(self.objective).__name__} names metrics {taken}, which are ours. Rename them.")
        for name, mean in (means | dict(loss.metrics)).items():
            sums[name] += torch.stack([mean.sum.detach().double(), mean.count.detach().double()])

    def _step(
        self, module: LightningModule, policy: nn.Module, experience: Experience, sums: Sums
    ) -> dict[str, Tensor]:
        """Clip, step, and the minibatch's metrics over all ranks."""
        keys = sorted(sums)
        reduced = dict(zip(keys, all_reduce_sum(torch.stack([sums[key] for key in keys])), strict=True))
        grad_norm = clip_grad_norm(policy, self.max_grad_norm or float("inf"))
        check_finite(module.trainer, experience, reduced[_LOSS][0], grad_norm)
        optimizer: Any = module.optimizers()
        scheduler: Any = module.lr_schedulers()
        lr = optimizer.param_groups[0]["lr"]
        optimizer.step()
        optimizer.zero_grad()
        scheduler.step()
        return {"train/grad_norm": grad_norm, "train/lr": torch.tensor(lr), **_means(reduced)}


def _means(sums: Sums) -> dict[str, Tensor]:
    """`train/<name>`: each sum by its count, or as it is where that is 0."""
    return {f"train/{name}": total / torch.where(count == 0, 1.0, count) for name, (total, count) in sums.items()}

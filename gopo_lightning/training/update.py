"""One optimiser step on some groups of an experience, micro-batch by micro-batch."""

from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn

from gopo_lightning.distributed.collectives import all_reduce_sum, world_size
from gopo_lightning.distributed.fsdp import clip_grad_norm
from gopo_lightning.distributed.strategies import gradient_sync
from gopo_lightning.objectives.base import Mean
from gopo_lightning.training.checks import check_finite
from gopo_lightning.training.config import ObjectiveConfig, UpdateConfig
from gopo_lightning.training.forward import PolicyForward
from gopo_lightning.training.update_rule import Part, Term, UpdateRule, UpdateSettings
from gopo_lightning.types import Experience

Sums = dict[str, Tensor]
"""float64 [2] of each metric: its sum and its count over micro-batches, and over ranks in the end. The count of the
loss, which is a sum by itself, is 0."""
_LOSS = "loss"


class GradientUpdate(UpdateRule):
    """Backward and step: the gradient of the weighted sum of the terms' losses."""

    def __call__(self, module: LightningModule, policy: nn.Module, parts: Sequence[Part]) -> dict[str, Tensor]:
        """See `UpdateRule`. The denominator of each term is that of the whole minibatch over all ranks."""
        work = []
        for term, experience, groups_P in parts:
            minibatch = experience.select(groups_P)
            total = all_reduce_sum(term.objective.denominator(minibatch, term.objective.mask(minibatch)))
            active_P = term.objective.active(experience)
            micro_batches = self._settings.forward.micro_batches(experience, groups_P, active_P)
            work += [(term, experience, total, *micro_batch) for micro_batch in micro_batches]
        sums: Sums = defaultdict(lambda: torch.zeros(2, dtype=torch.float64, device=module.device))
        for i, (term, experience, total, micro_P, counts) in enumerate(work):
            with gradient_sync(module.trainer.strategy, policy, sync=i + 1 == len(work)):
                self._accumulate(module, policy, experience.select(micro_P), term, total, sums, counts)
        return self._step(module, policy, parts, sums)

    def _accumulate(
        self,
        module: LightningModule,
        policy: nn.Module,
        experience: Experience,
        term: Term,
        total: Tensor,
        sums: Sums,
        counts: bool,
    ) -> None:
        """Forward and backward of one micro-batch, with weight 0 unless it ``counts``; adds its metrics to ``sums``."""
        objective, forward = term.objective, self._settings.forward
        completions, mask_NT = experience.completions, objective.mask(experience) & counts
        current = forward(policy, experience, with_entropy=self._settings.log_entropy)
        loss = objective(current.logprobs_NT, experience, mask_NT, total)
        # DDP and FSDP average over ranks; the denominator is global
        module.manual_backward(loss.value * (term.weight * world_size()))
        real, forwarded = forward.tokens(experience)
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
            raise ValueError(f"{type(objective).__name__} names metrics {taken}, which are ours. Rename them.")
        for name, mean in (means | dict(loss.metrics)).items():
            sums[_named(term, name)] += torch.stack([mean.sum.detach().double(), mean.count.detach().double()])

    def _step(self, module: LightningModule, policy: nn.Module, parts: Sequence[Part], sums: Sums) -> dict[str, Tensor]:
        """Clip, step, and the minibatch's metrics over all ranks."""
        keys = sorted(sums)
        reduced = dict(zip(keys, all_reduce_sum(torch.stack([sums[key] for key in keys])), strict=True))
        losses = [part.term.weight * reduced[_named(part.term, _LOSS)][0] for part in parts]
        stepped = step(module, policy, parts[0].experience, torch.stack(losses).sum(), self._settings.max_grad_norm)
        return {**stepped, **_means(reduced)}


def step(
    module: LightningModule, policy: nn.Module, experience: Experience, loss: Tensor, max_grad_norm: float | None
) -> dict[str, Tensor]:
    """Clip the gradients, which all ranks have, and step optimiser and schedule; a collective.

    Raises:
        ValueError: ``loss``, the same on all ranks, or the gradients are not finite; ``experience`` is left on disk.
    """
    grad_norm = clip_grad_norm(policy, max_grad_norm or float("inf"))
    check_finite(module.trainer, experience, loss, grad_norm)
    optimizer: Any = module.optimizers()
    scheduler: Any = module.lr_schedulers()
    lr = optimizer.param_groups[0]["lr"]
    optimizer.step()
    optimizer.zero_grad()
    scheduler.step()
    return {"train/grad_norm": grad_norm, "train/lr": torch.tensor(lr)}


def _named(term: Term, metric: str) -> str:
    return f"{term.name}/{metric}" if term.name else metric


def _means(sums: Sums) -> dict[str, Tensor]:
    """`train/<name>`: each sum by its count, or as it is where that is 0."""
    return {f"train/{name}": total / torch.where(count == 0, 1.0, count) for name, (total, count) in sums.items()}


def build_update(update: UpdateConfig, objective: ObjectiveConfig, forward: PolicyForward, seed: int) -> UpdateRule:
    """What ``update`` names, told of the run."""
    rule = update.rule or GradientUpdate()
    rule.prepare(UpdateSettings(forward, update.max_grad_norm, objective.log_entropy, seed))
    return rule

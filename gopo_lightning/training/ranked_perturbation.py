"""Zeroth order: moves the weights along noise that made better completions, without a backward pass."""

import math
from collections.abc import Sequence

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn

from gopo_lightning.distributed.collectives import all_reduce_sum
from gopo_lightning.distributed.strategies import FSDP2Strategy
from gopo_lightning.objectives.perturbations import net_preferences, preferences_of_rewards, rank_weights_of_noise
from gopo_lightning.rollout import RolloutEngine, VLLMEngine
from gopo_lightning.rollout.engines.base import HasSampler
from gopo_lightning.rollout.engines.perturbed import Noise, PerturbedEngine
from gopo_lightning.rollout.transforms import rewards_that_count
from gopo_lightning.training.update import step
from gopo_lightning.training.update_rule import Part, UpdateRule, UpdateSettings
from gopo_lightning.types import Experience


class RankedPerturbation(UpdateRule):
    """ZO-RankSGD (arXiv 2303.03751): rank m perturbed policies, move along their noise weighted by rank.

    m is `rollout.num_completions`: completion i of every prompt comes from θ + μ ξ_i, with ξ_i ~ N(0, 1) over the
    trainable weights, best those of LoRA. Each prompt's completions are ranked by their rewards, or by the comparisons
    of the only source; the rankings are added up by Borda into one of the m policies; and the optimiser (the paper's is
    SGD) gets −Σ_i w_i ξ_i as the gradient, w by rank. With ``top`` null w is GOPO's ordinal advantage / m: GOPO as an
    evolution strategy. Nothing is kept from step to step: the noise is a function of seed, step and i.

    Differs from the paper: rankings of several prompts are combined; no line search; the learning rate takes up 1 / μ.

    Args:
        scale: μ > 0.
        top: k, of how many policies the order counts, at least 1; the others are only worse. Null: all.
        authors_weights: weights of the authors' code, see `rank_weights_of_noise`.
    """

    reads_loss = False

    def __init__(self, scale: float = 0.01, top: int | None = None, authors_weights: bool = False) -> None:
        if not 0 < scale < math.inf:
            raise ValueError(f"scale={scale} of RankedPerturbation must be above 0 and finite.")
        if top is not None and top < 1:
            raise ValueError(f"top={top} of RankedPerturbation must be at least 1; use null to rank all.")
        self.scale, self.top, self.authors_weights = scale, top, authors_weights

    def prepare(self, settings: UpdateSettings) -> None:
        """Also its noise."""
        super().prepare(settings)
        self._noise = Noise(settings.seed)

    def check(self, trainer: Trainer) -> None:
        """ValueError under a strategy that shards, whose weights cannot be moved in place."""
        if isinstance(trainer.strategy, FSDP2Strategy):
            raise ValueError(
                "update.rule RankedPerturbation moves whole weights in place, and trainer.strategy: fsdp2 shards them. "
                "Use ddp, and LoRA to save memory; there are no gradients to keep."
            )

    def engine(self, engine: RolloutEngine) -> RolloutEngine:
        """Samples each completion of a group from a policy of its own."""
        if isinstance(engine, VLLMEngine | HasSampler):
            raise ValueError(
                f"update.rule RankedPerturbation samples from perturbed weights, which {type(engine).__name__} does "
                "not do. Use TransformersEngine."
            )
        return PerturbedEngine(engine, self._noise, self.scale)

    def begin(self, step: int) -> None:
        """Draw new noise."""
        self._noise.step = step

    def __call__(self, module: LightningModule, policy: nn.Module, parts: Sequence[Part]) -> dict[str, Tensor]:
        """See `UpdateRule`."""
        ((_, experience, groups_P),) = parts
        scores_m = self._scores(experience.select(groups_P))
        weights_m = rank_weights_of_noise(scores_m, self.top, authors_weights=self.authors_weights)
        for parameter in policy.parameters():
            parameter.grad = torch.zeros_like(parameter) if parameter.requires_grad else None
        for i, weight in enumerate(weights_m.tolist()):
            for parameter, noise in self._noise(policy, i):
                assert parameter.grad is not None
                parameter.grad.sub_((weight * noise).to(parameter.dtype))
        zero = torch.zeros((), dtype=torch.float64, device=module.device)
        stepped = step(module, policy, experience, zero, self._settings.max_grad_norm)
        better = preferences_of_rewards(scores_m)
        tied = (better == 0.5).sum() / (~better.isnan()).sum().clamp(min=1)
        return {**stepped, "train/tied_policies": tied}

    def _scores(self, experience: Experience) -> Tensor:
        """float64 [m] on the CPU, mean Borda points of each policy over the prompts of all ranks; NaN: never compared.

        Raises:
            ValueError: a transform gave a completion a weight that is neither 0 nor 1.
        """
        if (
            experience.weights_PG is not None
            and not ((experience.weights_PG == 0) | (experience.weights_PG == 1)).all()
        ):
            raise ValueError(
                "update.rule RankedPerturbation ranks completions, and a transform weighs them by fractions, which "
                "would have no effect. Remove the transform."
            )
        rewards_PG = rewards_that_count(experience)
        preferences_PGG = preferences_of_rewards(rewards_PG)
        if experience.preferences_PGG is not None:
            preferences_PGG = torch.where(preferences_PGG.isnan(), torch.nan, experience.preferences_PGG.cpu())
        sums = torch.stack(net_preferences(preferences_PGG)).to(experience.completions.mask_NT.device)
        net_m, compared_m = all_reduce_sum(sums).cpu()
        return torch.where(compared_m > 0, net_m / compared_m, torch.nan)

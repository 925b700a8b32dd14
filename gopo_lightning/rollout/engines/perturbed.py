"""Samples each completion of a group from a policy of its own: the weights, moved along a noise vector."""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from gopo_lightning.rollout.engines.base import RolloutEngine, SamplingConfig, WithSampler
from gopo_lightning.rollout.engines.streams import stream_seeds
from gopo_lightning.rollout.joining import joined_completions
from gopo_lightning.types import Completions, PromptBatch


class Noise:
    """Standard normal vectors ξ_0, ξ_1, … of a step, over the trainable weights; a function of seed, step and number.

    They are drawn on the CPU, the same on every rank and device, and never kept.
    """

    def __init__(self, seed: int) -> None:
        self.seed, self.step = seed, 0

    def __call__(self, policy: nn.Module, number: int) -> Iterator[tuple[nn.Parameter, Tensor]]:
        """Trainable weights of ``policy`` in their order, each with its part of ξ_number, in float32."""
        (seed,) = stream_seeds(~self.seed, self.step, [~number], 1)
        generator = torch.Generator().manual_seed(seed)
        for parameter in policy.parameters():
            if parameter.requires_grad:
                yield parameter, torch.randn(parameter.shape, generator=generator).to(parameter.device)


class PerturbedEngine(WithSampler):
    """Completion i of each prompt is sampled from θ + μ ξ_i; ``engine`` samples. In evaluations it samples from θ."""

    def __init__(self, engine: RolloutEngine, noise: Noise, scale: float) -> None:
        self._sampler, self.noise, self.scale = engine, noise, scale

    @property
    def sampler(self) -> RolloutEngine:
        """What samples."""
        return self._sampler

    @torch.no_grad()
    def generate(
        self,
        model: nn.Module,
        tokenizer: PreTrainedTokenizerBase,
        prompts: PromptBatch,
        num_completions: int,
        sampling: SamplingConfig,
        *,
        seeds_N: list[int],
        eos_token_ids: Sequence[int],
    ) -> Completions:
        """See :class:`RolloutEngine`; the weights are put back bit for bit."""
        kept = [parameter.detach().clone() for parameter in model.parameters() if parameter.requires_grad]
        G, parts = num_completions, []
        try:
            for i in range(G):
                for (parameter, noise), theirs in zip(self.noise(model, i), kept, strict=True):
                    parameter.copy_(theirs + self.scale * noise.to(theirs.dtype))
                parts.append(
                    self.sampler.generate(
                        model, tokenizer, prompts, 1, sampling, seeds_N=seeds_N[i::G], eos_token_ids=eos_token_ids
                    )
                )
        finally:
            for parameter, theirs in zip((p for p in model.parameters() if p.requires_grad), kept, strict=True):
                parameter.copy_(theirs)
        by_prompt_N = torch.arange(G * len(prompts)).view(G, -1).T.flatten()
        return joined_completions(parts).select(by_prompt_N)

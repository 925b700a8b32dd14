"""Rollouts one step ahead: the next step's completions are sampled elsewhere while this step's are trained on.

step      t                                  t + 1
servers   samples for t + 1 from θ_t ─────▶  samples for t + 2 from θ_t+1 ──▶
trainer   scores t, trains: θ_t → θ_t+1      scores t + 1, trains: θ_t+1 → θ_t+2
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from typing import Any, NamedTuple

import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import nn
from transformers import PreTrainedTokenizerBase

from gopo_lightning.distributed.collectives import all_or_none, gather_objects
from gopo_lightning.rollout.engines.base import HasMetrics, RolloutEngine, SamplesAhead, SamplingConfig, WithSampler
from gopo_lightning.rollout.joining import joined_completions
from gopo_lightning.types import Completions, PromptBatch


class Upcoming(NamedTuple):
    """What the next step asks for."""

    prompts: PromptBatch
    seeds_N: list[int]


class _Ahead(NamedTuple):
    """A rollout that has been begun, or was when the checkpoint was written."""

    made_by: dict[str, Any]
    tokens_P: list[tuple[int, ...]]
    seeds_N: list[int]
    metrics: dict[str, float]
    completions: Callable[[], Completions]
    cancel: Callable[[], None] = lambda: None


class AheadEngine(WithSampler):
    """Has the completions of the next step sampled from the weights of this one. In evaluations nothing is ahead.

    Prompts, their order and their seeds are those of a run that samples in time; from the second step on the weights
    are one step older. A checkpoint keeps what has been begun, on any number of ranks: a resumed run trains on it.

    Args:
        engine: samples.
        upcoming: what the next step asks for.
    """

    def __init__(self, engine: SamplesAhead, upcoming: Callable[[], Upcoming]) -> None:
        self.engine, self.upcoming = engine, upcoming
        self._next: _Ahead | None = None
        self._metrics: dict[str, float] = {}

    @property
    def sampler(self) -> RolloutEngine:
        """What samples."""
        return self.engine

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
        """See :class:`RolloutEngine`. What was begun a step before, or else is sampled now; and the next is begun."""
        policy, options = (model, tokenizer), (num_completions, sampling)
        made_by = {"sampling": asdict(sampling), "eos_token_ids": list(eos_token_ids)}
        completions = self._begun(made_by, prompts, seeds_N)
        if completions is None:
            completions = self.engine.generate(*policy, prompts, *options, seeds_N=seeds_N, eos_token_ids=eos_token_ids)
            self._metrics = {**self._of_sampler(), "ahead": 0.0}
        with all_or_none("reading the next step's prompts"):
            upcoming, seeds_N = self.upcoming()
        begun = self.engine.begin(*policy, upcoming, *options, seeds_N=seeds_N, eos_token_ids=eos_token_ids)
        tokens_P = [prompt.token_ids for prompt in upcoming.prompts]
        self._next = _Ahead(made_by, tokens_P, seeds_N, self._of_sampler(), *begun)
        return completions

    def metrics(self) -> dict[str, float]:
        """Those of the sampler when this rollout was begun, and whether that was a step ahead."""
        return self._metrics

    def state_dict(self) -> dict[str, Any]:
        """The sampler's, and the completions of the next step. Waits for them. A collective.

        A checkpoint does not fail because they do: what is not in it is sampled again.
        """
        state = super().state_dict()
        if self._next is not None:
            try:
                completions = self._next.completions()
            except Exception as error:  # noqa: BLE001 - the next step raises it
                rank_zero_warn(f"the checkpoint is without what was sampled ahead: {type(error).__name__}: {error}")
            else:
                state["ahead"] = _gathered(self._next, completions)
        return state

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """What ``state_dict`` gave."""
        super().load_state_dict({name: value for name, value in state.items() if name != "ahead"})
        if kept := state.get("ahead"):
            completions = Completions(**kept["completions"])
            tokens_P = [tuple(tokens) for tokens in kept["tokens_P"]]
            self._next = _Ahead(kept["made_by"], tokens_P, kept["seeds_N"], kept["metrics"], lambda: completions)

    def _begun(self, made_by: dict[str, Any], prompts: PromptBatch, seeds_N: Sequence[int]) -> Completions | None:
        """What was begun for these prompts and seeds, by which a rank finds its own; None where nothing was."""
        ahead, self._next = self._next, None
        if ahead is None:
            return None
        G, places = len(ahead.seeds_N) // len(ahead.tokens_P), {seed: n for n, seed in enumerate(ahead.seeds_N)}
        places_N = [places.get(seed) for seed in seeds_N]
        asked_N = [prompt.token_ids for prompt in prompts.prompts for _ in range(len(seeds_N) // len(prompts))]
        is_it = ahead.made_by == made_by and all(
            n is not None and ahead.tokens_P[n // G] == asked for n, asked in zip(places_N, asked_N, strict=True)
        )
        if not all(gather_objects(is_it)):
            ahead.cancel()
            rank_zero_warn(
                "what was sampled ahead was for other prompts, or sampled in another way: this step samples anew."
            )
            return None
        self._metrics = {**ahead.metrics, "ahead": 1.0}
        return ahead.completions().select(torch.tensor(places_N)).to(prompts.tokens_PL.device)

    def _of_sampler(self) -> dict[str, float]:
        return dict(self.engine.metrics()) if isinstance(self.engine, HasMetrics) else {}


def _gathered(ahead: _Ahead, completions: Completions) -> dict[str, Any]:
    """Of all ranks, in plain values. A collective."""
    parts = gather_objects((ahead.tokens_P, ahead.seeds_N, completions.to("cpu")))
    return {
        "made_by": ahead.made_by,
        "tokens_P": [tokens for part in parts for tokens in part[0]],
        "seeds_N": [seed for part in parts for seed in part[1]],
        "completions": vars(joined_completions([part[2] for part in parts])),
        "metrics": ahead.metrics,
    }

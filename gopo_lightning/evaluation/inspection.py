"""Samples what the first training steps would sample, and describes the rewards. Trains nothing."""

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import combinations
from typing import Any

import torch
from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer
from torch import Tensor

from gopo_lightning.data.prompts import PromptDataModule
from gopo_lightning.data.recorded import recorded_answers
from gopo_lightning.data.sources import PromptSource, load_rows
from gopo_lightning.distributed.collectives import gather_objects
from gopo_lightning.evaluation import reward_shape
from gopo_lightning.evaluation.intervals import Interval
from gopo_lightning.objectives import advantages
from gopo_lightning.objectives.advantages import preferences
from gopo_lightning.rewards import PairwiseSource, RewardSource, Source, score_groups
from gopo_lightning.rewards.pairwise import Groups
from gopo_lightning.rollout.collector import Actor
from gopo_lightning.training.callbacks.predictions import PredictionWriter
from gopo_lightning.training.gopo_module import GOPOModule
from gopo_lightning.training.validation import Validation
from gopo_lightning.types import Completion, Prompt, PromptBatch, Rollout

NUM_SCORED_TWICE = 16
"""Prompts whose completions are scored once more."""


@dataclass(frozen=True)
class Sample:
    """Groups of all ranks, as they were scored."""

    prompts: Sequence[Prompt]
    groups: Groups
    lengths_PG: Tensor
    truncated_PG: Tensor
    rewards_PGK: Tensor
    rewards_PG: Tensor


class FirstSteps(LightningDataModule):
    """The prompts of the first training steps, in their order, for ``Trainer.predict``."""

    def __init__(self, data: PromptDataModule) -> None:
        super().__init__()
        self.data = data

    def prepare_data(self) -> None:
        self.data.prepare_data()

    def setup(self, stage: str) -> None:
        self.data.trainer = self.trainer
        self.data.setup("fit")

    def predict_dataloader(self) -> Any:
        warnings.filterwarnings("ignore", message="You are using a custom batch sampler `PromptSampler`")
        return self.data.train_dataloader()


class FirstRollouts(Validation):
    """What ``predict`` asks for its rollouts: gives those of the training steps, one after the other."""

    def __init__(self, module: GOPOModule) -> None:
        super().__init__(module.collector, module.rollout_config.num_completions, module.reference)
        self.step, self.num_sources = 0, len(module.reward_names)

    def rollout(self, actor: Actor, prompts: PromptBatch, *, compare: bool = True) -> Rollout:
        """Of the next step; an untrained policy samples it as training would, were nothing learned before."""
        self.step += 1
        return self.collector.collect(actor, prompts, self.num_completions, step=self.step - 1, compare=compare)


class UnscoredRollouts(FirstRollouts):
    """The same without rewards."""

    def rollout(self, actor: Actor, prompts: PromptBatch, *, compare: bool = True) -> Rollout:
        """Every reward is NaN, and no source is asked."""
        self.step += 1
        completions = self.collector.sample(actor, prompts, self.num_completions, self.step - 1)
        rewards_PG = torch.full((len(prompts), self.num_completions), torch.nan, dtype=torch.float64)
        max_new_tokens = self.collector.sampling.max_new_tokens
        rewards_PGK = rewards_PG[..., None].repeat(1, 1, self.num_sources)
        return Rollout(prompts, completions, rewards_PGK, rewards_PG, max_new_tokens)


class Keep(Callback):
    """Keeps the rollout of every batch, on the CPU, and lets nothing be written."""

    def __init__(self) -> None:
        self.rollouts: list[Rollout] = []

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        others = [callback for callback in trainer.callbacks if not isinstance(callback, PredictionWriter)]  # type: ignore[attr-defined]
        trainer.callbacks = others  # type: ignore[attr-defined]

    def on_predict_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int, *args: Any
    ) -> None:
        self.rollouts.append(batch["rollout"].to("cpu"))


def sample(
    trainer: Trainer, module: GOPOModule, data: PromptDataModule, num_prompts: int, *, scored: bool = True
) -> Sample:
    """At least ``num_prompts`` groups (whole steps, one epoch at most) by the untrained policy. A collective.

    Unless ``scored``, the reward sources are neither set up nor asked, and all rewards are NaN.
    """
    keep = Keep()
    trainer.callbacks.append(keep)  # type: ignore[attr-defined]
    trainer.limit_predict_batches = -(-num_prompts // data.prompts_per_step)
    module.validation = FirstRollouts(module) if scored else UnscoredRollouts(module)
    if not scored:
        module.collector.sources = ()
    trainer.predict(module, datamodule=FirstSteps(data), return_predictions=False)
    parts = [part for rank in gather_objects([_part(rollout) for rollout in keep.rollouts]) for part in rank]
    prompts, groups, lengths, truncated, by_source, rewards = zip(*parts, strict=True)
    return Sample(
        [prompt for some in prompts for prompt in some],
        [group for some in groups for group in some],
        *(torch.cat(tensors) for tensors in (lengths, truncated, by_source, rewards)),
    )


def _part(rollout: Rollout) -> tuple[Any, ...]:
    G, completions = rollout.group_size, rollout.completions
    shape = (len(rollout), G)
    lengths_PG, truncated_PG = completions.lengths_N.view(shape), completions.truncated_N.view(shape)
    rewards = rollout.rewards_PGK, rollout.rewards_PG
    return rollout.prompts.prompts, completions.groups(G), lengths_PG, truncated_PG, *rewards


def describe(sampled: Sample, module: GOPOModule) -> dict[str, Any]:
    """All numbers, by name; see docs/inspect.md."""
    names, G = module.reward_names, sampled.rewards_PG.shape[1]
    ordinal_PG = advantages.ordinal(sampled.rewards_PG)
    others, refused = reward_shape.advantages_of(sampled.rewards_PG, _functions(module))
    lengths_PG = sampled.lengths_PG.double()
    columns = {name: sampled.rewards_PGK[..., k] for k, name in enumerate(names)} | {"combined": sampled.rewards_PG}
    shapes = {name: asdict(reward_shape.shape_of(column_PG)) for name, column_PG in columns.items()}
    likeness = {name: reward_shape.likeness(ordinal_PG, other_PG) for name, other_PG in others.items()}
    return {
        "num_prompts": len(sampled.prompts),
        "num_completions": G,
        "length_mean": float(lengths_PG.mean()),
        "length_std": float(lengths_PG.std()),
        "truncated_fraction": float(sampled.truncated_PG.double().mean()),
        "reward": shapes["combined"],
        "sources": shapes,
        "cosine_with_ordinal": {name: found and asdict(found) for name, found in likeness.items()},
        "normal_cosine": reward_shape.normal_cosine(G),
        "effective_groups": {
            name: reward_shape.effective_fraction(other_PG)
            for name, other_PG in {"ordinal": ordinal_PG, **others}.items()
        },
        "refused": refused,
        "rank_correlation": {
            f"{a}, {b}": _plain(reward_shape.mean_rank_correlation(columns[a], columns[b]))
            for a, b in combinations(names, 2)
        },
        "rank_correlation_with_length": {
            name: _plain(reward_shape.mean_rank_correlation(column_PG, lengths_PG))
            for name, column_PG in columns.items()
        },
    }


def _functions(module: GOPOModule) -> dict[str, Callable[[Tensor], Tensor]]:
    """Every advantage that needs no option, and the run's own."""
    found: dict[str, Callable[[Tensor], Tensor]] = {
        name: function
        for name, function in advantages.KIND.known.items()
        if name != "ordinal" and not advantages.KIND.missing(name, {})
    }
    if not module.advantage.from_wins:
        name = module.objective_config.advantage
        label = name if isinstance(name, str) else str(name["function"])
        if label not in {"ordinal", *found}:
            module.advantage.set_up()
            found[label] = module.advantage
    return found


def scored_again(sampled: Sample, module: GOPOModule) -> dict[str, Any]:
    """Noise of each scalar source, on the first prompts."""
    P = min(NUM_SCORED_TWICE, len(sampled.prompts))
    found = {}
    with module.collector.scoring(module.trainer.strategy.root_device):
        for k, source in enumerate(module.collector.sources):
            if isinstance(source, RewardSource):
                scores = score_groups([source], sampled.prompts[:P], sampled.groups[:P]).rewards_PGK[..., 0]
                found[source.name] = asdict(reward_shape.noise_of(sampled.rewards_PGK[:P, :, k], scores))
    return found


def agreement_with_judge(sampled: Sample, judge: Source, module: GOPOModule) -> dict[str, Any]:
    """How often each source, and all combined, order a pair of a group as ``judge`` does."""
    judge.setup(module.trainer.strategy.root_device)
    scores = score_groups([judge], sampled.prompts, sampled.groups)
    if isinstance(judge, PairwiseSource):
        assert scores.wins_PGGK is not None
        preferred_PGG = preferences(scores.wins_PGGK[..., 0])
    else:
        preferred_PGG = _preferred(scores.rewards_PGK[..., 0])
    return _agreements(sampled.rewards_PGK, sampled.rewards_PG, preferred_PGG, module.reward_names)


def agreement_with_people(source: PromptSource, data: PromptDataModule, module: GOPOModule) -> dict[str, Any]:
    """The same with the ratings of the answers in the rows of ``source``, taken as answers that ended by themselves."""
    render = data.renderer(source)
    prompts = [render(number, row) for number, row in enumerate(load_rows(source))]
    answers = [recorded_answers(prompt) for prompt in prompts]
    shape = (len(prompts), max(len(answer.texts) for answer in answers))
    rewards_PGK = torch.full((*shape, len(module.reward_names)), torch.nan, dtype=torch.float64)
    rewards_PG, ratings_PG = (torch.full(shape, torch.nan, dtype=torch.float64) for _ in range(2))
    for p, (prompt, answer) in enumerate(zip(prompts, answers, strict=True)):
        n, group = len(answer.texts), [_ended(text, module) for text in answer.texts]
        scores = module.collector.score([prompt], [group], module.trainer.strategy.root_device, compare=True)
        rewards_PGK[p, :n], ratings_PG[p, :n] = scores.rewards_PGK[0], torch.tensor(answer.ratings)
        rewards_PG[p, :n] = module.collector.combined(scores.rewards_PGK)[0]
    return _agreements(rewards_PGK, rewards_PG, _preferred(ratings_PG), module.reward_names)


def _ended(text: str, module: GOPOModule) -> Completion:
    tokens = module.tokenizer(text, add_special_tokens=False)["input_ids"]
    return Completion(text, truncated=False, num_tokens=len(tokens) + 1)


def _preferred(ratings_PG: Tensor) -> Tensor:
    """How surely i beats j by a rating: 1, ½ or 0; NaN without one."""
    first, second = ratings_PG[:, :, None], ratings_PG[:, None, :]
    wins_PGG = (first > second).double() + 0.5 * (first == second).double()
    return wins_PGG.masked_fill(first.isnan() | second.isnan(), torch.nan)


def _agreements(rewards_PGK: Tensor, rewards_PG: Tensor, preferred_PGG: Tensor, names: Sequence[str]) -> dict[str, Any]:
    found = {name: _plain(reward_shape.agreement(rewards_PGK[..., k], preferred_PGG)) for k, name in enumerate(names)}
    return found | {"combined": _plain(reward_shape.agreement(rewards_PG, preferred_PGG))}


def _plain(interval: Interval | None) -> Mapping[str, Any] | None:
    return None if interval is None else asdict(interval)

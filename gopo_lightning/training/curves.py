"""What a training step logs of its rollout, over all ranks."""

from collections.abc import Mapping

import torch
from torch import Tensor

from gopo_lightning.distributed.collectives import gather_rows
from gopo_lightning.rewards import RewardSource, comparison_metrics
from gopo_lightning.rewards.metrics import completion_metrics, reward_metrics
from gopo_lightning.rewards.scoring import counter_metrics
from gopo_lightning.rollout.collector import Collector
from gopo_lightning.rollout.engines.base import HasMetrics
from gopo_lightning.rollout.refill import Refilled
from gopo_lightning.types import Experience


def rollout_metrics(
    experience: Experience, collector: Collector, seconds: Mapping[str, float], refilled: Refilled
) -> dict[str, Tensor]:
    """Rewards, comparisons, lengths, and how fast this rank was; a collective.

    Args:
        experience: of this rank.
        collector: what sampled and scored it.
        seconds: by phase, ``rollout``, ``reward`` and ``train``.
        refilled: what was sampled beside the experience.
    """
    rewards_PG = gather_rows(experience.rewards_PG)
    lengths_N = gather_rows(experience.completions.lengths_N)
    sources = collector.sources
    names = [source.name for source in sources]
    metrics = reward_metrics(gather_rows(experience.rewards_PGK), rewards_PG, names)
    if experience.wins_PGGK is not None:
        metrics |= comparison_metrics(sources, gather_rows(experience.wins_PGGK))
    for source in sources:
        if isinstance(source, RewardSource):
            metrics |= counter_metrics(source, rewards_PG.device)
    metrics |= completion_metrics(lengths_N, gather_rows(experience.completions.truncated_N))
    for phase, num_tokens in {"rollout": lengths_N.sum() + refilled.tokens, "train": lengths_N.sum()}.items():
        metrics[f"throughput/{phase}_tokens_per_second"] = num_tokens / seconds[phase]
    if isinstance(collector.engine, HasMetrics):
        metrics |= {f"rollout/{name}": torch.tensor(value) for name, value in collector.engine.metrics().items()}
    return metrics | refilled.metrics | {f"seconds/{phase}": torch.tensor(value) for phase, value in seconds.items()}

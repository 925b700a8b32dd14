"""Recorded groups beside the rollout: a second stream of experience, for a loss that is added to the rollout's.

OORL (arXiv 2505.12723) adds GEPO on rated answers, with weight 0.01, to a policy gradient on samples.
"""

from collections.abc import Callable, Mapping
from dataclasses import asdict
from typing import Any

from lightning.pytorch import Trainer
from transformers import PreTrainedTokenizerBase

from gopo_lightning._compat import batches_processed
from gopo_lightning.data.prompt_dataset import PromptDataset
from gopo_lightning.data.prompts import PromptDataModule
from gopo_lightning.data.sampler import Place, PromptSampler
from gopo_lightning.data.sources import load_rows
from gopo_lightning.distributed.collectives import all_or_none, rank, world_size
from gopo_lightning.rewards import RecordedReward
from gopo_lightning.rollout import RecordedEngine, SamplingConfig
from gopo_lightning.rollout.collector import Actor
from gopo_lightning.rollout.phases import Phases
from gopo_lightning.rollout.transforms import Context
from gopo_lightning.training.argument_checks import check_streams
from gopo_lightning.training.build import build_advantage, build_collector, build_shaping
from gopo_lightning.training.config import (
    ObjectiveConfig,
    RecordedTerm,
    RewardConfig,
    RolloutConfig,
    UpdateConfig,
)
from gopo_lightning.training.update_rule import Term
from gopo_lightning.types import Experience


class RecordedStream:
    """Reads a dataset in an order of its own, whose place a checkpoint keeps.

    Args:
        config: which data, and their loss.
        sampling: of the policy; its temperature and ``max_new_tokens`` hold for recorded answers too.
        seed: of the order.
        tokenizer: the policy's, loaded when it is first asked for.
    """

    def __init__(
        self,
        config: RecordedTerm,
        sampling: SamplingConfig,
        seed: int,
        tokenizer: Callable[[], PreTrainedTokenizerBase],
    ) -> None:
        rewards = RewardConfig([RecordedReward()])
        objective = ObjectiveConfig(advantage=config.advantage, loss=config.loss)
        rollout = RolloutConfig(sampling, config.num_completions, engine=RecordedEngine())
        self.config, self.seed, self.term = config, seed, Term(config.loss, config.weight, config.name)
        self.collector = build_collector(rollout, rewards, seed, Phases())
        self.advantage = build_advantage(rewards, objective)
        self.shaping = build_shaping(rollout, rewards, objective, self.advantage, tokenizer)
        self._dataset: PromptDataset | None = None
        self._sampler: PromptSampler | None = None
        self._origin = Place()

    def set_up(self, trainer: Trainer) -> dict[str, Any]:
        """Read and check the data; the fingerprint of what was read.

        Raises:
            ValueError: no `PromptDataModule` says how prompts are rendered, or the data do not make a step.
        """
        data = getattr(trainer, "datamodule", None)
        if not isinstance(data, PromptDataModule):
            raise ValueError(
                f"objective.also '{self.config.name}' renders its prompts as a PromptDataModule does, and the Trainer "
                "has none. Give it one, or leave `also` out."
            )
        source = self.config.data
        with all_or_none(f"reading the data of objective.also '{self.config.name}'"):
            self._dataset = PromptDataset(load_rows(source), data.renderer(source), data.limit)
            self._sampler = PromptSampler(
                len(self._dataset),
                self.config.prompts_per_step,
                seed=self.seed,
                rank=rank(),
                world_size=world_size(),
                position=lambda: batches_processed(trainer),
                origin=lambda: self._origin,
            )
        self.advantage.set_up()
        return {name: value for name, value in self._dataset.fingerprint.items() if name != "path"}

    def experience(self, actor: Actor, step: int) -> Experience:
        """The next groups of this rank, as ``step`` of the run reads them. A collective."""
        assert self._dataset is not None and self._sampler is not None, "set_up comes first"
        prompts = self._dataset.batch(self._sampler.step(self._sampler.position()))
        rollout = self.collector.collect(actor, prompts.to(actor.device), self.config.num_completions, step=step)
        return self.shaping(rollout, Context(self.seed, step))

    def state_dict(self) -> dict[str, Any]:
        """Where the next step begins."""
        place = self._origin if self._sampler is None else self._sampler.place(self._sampler.position())
        return asdict(place)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """What ``state_dict`` gave; nothing of one that the checkpoint does not know."""
        self._origin = Place(**state)


def build_streams(
    objective: ObjectiveConfig,
    update: UpdateConfig,
    sampling: SamplingConfig,
    seed: int,
    tokenizer: Callable[[], PreTrainedTokenizerBase],
) -> list[RecordedStream]:
    """Of ``objective.also``.

    Raises:
        ValueError: as `check_streams`.
    """
    check_streams(objective.also, update.num_minibatches)
    return [RecordedStream(term, sampling, seed, tokenizer) for term in objective.also]

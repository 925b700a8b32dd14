"""A rubric that a meta-judge revises in the course of training: MPO (arXiv 2504.20157, sec. 2.3 and 3.1).

Departures: the samples are of the rollout at which a revision is due; duplicates among the items are dropped in their
order (the authors' code keeps them in a set, in no order); a reply that cannot be read changes nothing; the optional
preference for samples that were judged bad is left out.
"""

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from lightning.pytorch.utilities import rank_zero_warn
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from torch import Tensor

from gopo_lightning.distributed.collectives import all_or_none, gather_objects, rank
from gopo_lightning.rewards.chat_model import Asker, ChatModel
from gopo_lightning.rewards.judge_prompt import conversation
from gopo_lightning.rewards.judge_server import RequestFailedError
from gopo_lightning.rewards.llm_score import RubricJudge
from gopo_lightning.rewards.rubric_prompts import Revision, Sample, read_rubric
from gopo_lightning.rewards.waiting import all_of
from gopo_lightning.types import Rollout

Rubric = tuple[str, ...]
_META_TOKENS = 4096


class EvolvingRubric(RubricJudge):
    """A rubric judge whose rubric is revised every ``every`` rollouts, against what the policy learned to exploit.

    The meta-judge reads ``num_samples`` of the rollout's responses with their scores. For each it analyses how the
    rubric served and refines it; then it merges what came out into one. That takes 2 · ``num_samples`` + 1 requests, on
    rank 0. Replies that cannot be read are left out; if none is left, or the merged rubric is none, the rubric stays.
    Validation scores by the first rubric throughout, so that its curves compare.

    Args:
        judge: the model that scores, its server and how it is asked.
        rubric: to begin with, a sentence each.
        every: rollouts from one revision to the next.
        num_samples: responses that a revision reads.
        meta: the model that revises; the judge itself when null, with replies of up to 4096 tokens.
        lowest: of an item's score, the worst.
        highest: of an item's score, the best.
        seed: of the choice of samples.
        name: in logs and error messages.
    """

    def __init__(
        self,
        judge: ChatModel,
        rubric: Sequence[str],
        every: int = 10,
        num_samples: int = 20,
        meta: ChatModel | None = None,
        lowest: int = 0,
        highest: int = 5,
        seed: int = 0,
        name: str = "rubric",
    ) -> None:
        super().__init__(judge, rubric, lowest, highest, name)
        if every < 1 or num_samples < 1:
            raise ValueError(f"every={every} and num_samples={num_samples} must be at least 1. Use 10 and 20.")
        limit = self.judge.max_tokens
        longer = replace(self.judge, max_tokens=None if limit is None else max(limit, _META_TOKENS))
        self.meta = longer if meta is None else ChatModel.of(meta)
        self.meta_asker = Asker(f"the meta-judge of reward source '{name}'", name, self.meta)
        self.every, self.num_samples, self.seed = every, num_samples, seed
        self.version, self.rollouts = 0, 0

    def setup(self, device: torch.device) -> None:
        """Connect to both models."""
        super().setup(device)
        self.meta_asker.connect()

    def observe(self, rollout: Rollout, scores_PG: Tensor, *, step: int) -> None:
        """Revise the rubric, if it is time to. A collective.

        Raises:
            SourceConfigError: the meta-judge's server refuses key or model, or its budget is spent.
        """
        self.rollouts += 1
        if self.rollouts % self.every:
            return
        offered = [sample for part in gather_objects(self._offered(rollout, scores_PG)) for sample in part]
        samples = [sample for _, sample in sorted(offered, key=lambda each: each[0])[: self.num_samples]]
        revised: Rubric | None = None
        with all_or_none(f"the revision of the rubric of reward source '{self.name}'"):
            if rank() == 0 and samples:
                revised = self._revised(samples)
        revised = gather_objects(revised)[0]
        if revised is None:
            rank_zero_warn(f"reward source '{self.name}': the meta-judge gave no rubric that could be read; it stays.")
        else:
            self.rubric, self.version = revised, self.version + 1
            items = "\n".join(f"- {item}" for item in revised)
            rank_zero_info(f"reward source '{self.name}', step {step}: rubric version {self.version}\n{items}")

    @contextmanager
    def as_first(self) -> Iterator[None]:
        """Scores by the rubric of the configuration."""
        present, self.rubric = self.rubric, self.first_rubric
        try:
            yield
        finally:
            self.rubric = present

    def state_dict(self) -> dict[str, Any]:
        """The rubric, and where it comes from."""
        state = {"first": list(self.first_rubric), "rubric": list(self.rubric)}
        return {**state, "version": self.version, "rollouts": self.rollouts}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on with the rubric of the checkpoint, unless the configuration begins with another one by now."""
        if tuple(state["first"]) != self.first_rubric:
            rank_zero_warn(
                f"reward source '{self.name}': the configured rubric is not the one that the run began with, so what "
                "was learned since is dropped, and the configured one is used."
            )
            return
        self.rubric, self.version, self.rollouts = tuple(state["rubric"]), state["version"], state["rollouts"]

    def counters(self) -> dict[str, int]:
        """Those of the judge, requests to the meta-judge among its calls; and revisions, which rank 0 makes."""
        counts = super().counters()
        counts["calls"] += self.meta_asker.counts["calls"]
        return {**counts, "revisions": self.version if rank() == 0 else 0}

    def _offered(self, rollout: Rollout, scores_PG: Tensor) -> list[tuple[str, Sample]]:
        """This rank's candidates, with keys in whose order they are taken: the same ones on any number of ranks."""
        offered = []
        groups = rollout.completions.groups(rollout.group_size)
        for prompt, group, scores in zip(rollout.prompts.prompts, groups, scores_PG.tolist(), strict=True):
            for g, (text, score) in enumerate(zip(group, scores, strict=True)):
                if score == score:  # no NaN
                    key = repr((self.seed, self.rollouts, prompt.index, g))
                    sample = Sample(conversation(prompt), str(text), score)
                    offered.append((hashlib.sha256(key.encode()).hexdigest(), sample))
        return sorted(offered, key=lambda each: each[0])[: self.num_samples]

    def _revised(self, samples: Sequence[Sample]) -> Rubric | None:
        """What the meta-judge makes of the rubric, or None."""
        revision = Revision(self.rubric, self.lowest, self.highest)

        async def revised(client: Any) -> Rubric | None:
            calls = [partial(self._refined, client, revision, sample) for sample in samples]
            refined = [rubric for rubric in await all_of(calls, self.meta.max_concurrency) if rubric is not None]
            return await self._read(client, *revision.merge(refined)) if refined else None

        return self.meta_asker.server.run(revised)

    async def _refined(self, client: Any, revision: Revision, sample: Sample) -> Rubric | None:
        analysis = await self._reply(client, revision.analysis(sample))
        return None if analysis is None else await self._read(client, *revision.refinement(sample, analysis))

    async def _read(self, client: Any, question: str, fence: str) -> Rubric | None:
        reply = await self._reply(client, question)
        return None if reply is None else read_rubric(reply, fence)

    async def _reply(self, client: Any, question: str) -> str | None:
        """The whole reply, or None."""
        try:
            request, count = self.meta.request_of(question), self.meta_asker.count_call
            reply = await self.meta_asker.server.ask(client, request, count)
        except RequestFailedError:
            return None
        return reply.text if reply.is_whole else None

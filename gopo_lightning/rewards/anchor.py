"""Comparisons with an answer that the dataset holds, as a score: Pairwise-RL (arXiv 2504.04950).

r_i = ½ [P(y_i ≻ a | y_i first) + 1 − P(a ≻ y_i | a first)], with a the prompt's anchor. Departures: the paper trains a
critic of pairs with PPO; here the group is the baseline, under any advantage. Its equations could not be read in full,
and its reward model's training is that of any comparator (docs/rewards.md).
"""

import math
from collections.abc import Sequence
from typing import Literal, get_args

import torch
from torch import Tensor, nn

from gopo_lightning.data.cells import is_blank
from gopo_lightning.objectives.named import check_choice
from gopo_lightning.rewards.base import HoldsModels, RewardSource, SourceConfigError
from gopo_lightning.rewards.learning import refuse_learner
from gopo_lightning.rewards.pairwise import Groups, PairComparator, PairwiseSource
from gopo_lightning.types import Prompt

Scale = Literal["probability", "logit"]

LARGEST_LOGIT = 6.0
"""A probability of 0.9975: a judge that is certain gives no infinite reward."""


class AnchorReward(RewardSource):
    """How surely a completion beats its prompt's anchor, an answer in a column of the dataset.

    Each completion is compared with the anchor alone: one comparison each, two with `both_orders: true` of the
    comparator, where a round-robin of G takes G (G − 1) / 2. A completion that is the anchor scores ½ without being
    asked about. One whose prompt has no anchor, or about which the comparator abstains, has no valid score.

    Args:
        comparator: what compares, such as an LLMJudge, a LocalJudge or a RewardModelComparator.
        anchor: the column with the anchor's text; a row where it is null or blank, or without
            the column, has none.
        scale: `probability` in [0, 1], or `logit`, ln(p / (1 − p)) within ±6. Under `advantage: ordinal` both are the
            same.
        name: in logs and error messages; the comparator's own when null.
    """

    def __init__(
        self, comparator: PairwiseSource, anchor: str = "anchor", scale: Scale = "probability", name: str | None = None
    ) -> None:
        check_choice("scale", scale, get_args(Scale))
        refuse_learner(comparator, "AnchorReward")
        self.name = name or comparator.name
        if comparator.reads_endings or comparator.waits_for_people:
            why = (
                "reads how texts ended, which of an anchor is not known" if comparator.reads_endings else "asks people"
            )
            raise ValueError(f"AnchorReward '{self.name}': its comparator {why}. Use a comparator that does not.")
        self.comparator, self.anchor, self.scale = comparator, anchor, scale

    def setup(self, device: torch.device) -> None:
        """Set up the comparator."""
        self.comparator.setup(device)

    def models(self) -> list[nn.Module]:
        """Those of the comparator."""
        return self.comparator.models() if isinstance(self.comparator, HoldsModels) else []

    def counters(self) -> dict[str, int]:
        """Those of the comparator."""
        return self.comparator.counters()

    @property
    def waits(self) -> bool:
        """Whether the comparator does."""
        return isinstance(self.comparator, PairComparator) and self.comparator.waits

    async def ask(self, prompts: Sequence[Prompt], groups: Groups) -> None:
        """See `early.AsksEarly`."""
        assert isinstance(self.comparator, PairComparator)
        anchored = zip(prompts, groups, self._anchors(prompts), strict=True)
        pairs = [
            (prompt, str(text), anchor) for prompt, group, anchor in anchored if anchor is not None for text in group
        ]
        await self.comparator.ask_pairs(pairs)

    def __call__(self, prompts: Sequence[Prompt], completions: Sequence[str]) -> Tensor:
        """float64 [N].

        Raises:
            SourceConfigError: an anchor that is no text, or no row of the batch has the column.
        """
        anchors = self._anchors(prompts)
        texts = [str(completion) for completion in completions]
        # A text stands in for a missing anchor: every rank asks, and nobody is asked about equal texts.
        references = [[text if anchor is None else anchor] for text, anchor in zip(texts, anchors, strict=True)]
        wins_N = self.comparator.versus(prompts, [[text] for text in texts], references)[:, 0, 0].cpu().double()
        known_N = torch.tensor([anchor is not None for anchor in anchors])
        equal_N = torch.tensor([text == reference for text, [reference] in zip(texts, references, strict=True)])
        wins_N = wins_N.masked_fill(equal_N, 0.5).masked_fill(~known_N, math.nan)
        return wins_N if self.scale == "probability" else wins_N.logit().clamp(-LARGEST_LOGIT, LARGEST_LOGIT)

    def _anchors(self, prompts: Sequence[Prompt]) -> list[str | None]:
        if not any(self.anchor in prompt.columns for prompt in prompts):
            raise SourceConfigError(
                f"reward source '{self.name}' compares with the column '{self.anchor}', but {prompts[0].place} has "
                f"only {sorted(prompts[0].columns)}. Set `anchor` to the column that holds the answer to compare with."
            )
        anchors = [prompt.columns.get(self.anchor) for prompt in prompts]
        anchors = [None if is_blank(anchor) else anchor for anchor in anchors]  # CSV has no null
        for prompt, anchor in zip(prompts, anchors, strict=True):
            if anchor is not None and not isinstance(anchor, str):
                raise SourceConfigError(
                    f"reward source '{self.name}': column '{self.anchor}' of {prompt.place} is {anchor!r:.80}, and an "
                    "anchor is a text. Store the answer's text, or null for none."
                )
        return anchors

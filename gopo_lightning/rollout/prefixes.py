"""Scores of prefixes, for a credit that rewards what each part of a completion adds."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TypeVar

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from gopo_lightning.objectives.base import Mean
from gopo_lightning.objectives.credit import budgets
from gopo_lightning.rewards import HoldsModels, RewardSource, score
from gopo_lightning.rollout.transforms import Context, Setting, Transform, mean_of, plus
from gopo_lightning.types import Completion, Completions, Rollout

R = TypeVar("R", bound=Rollout)


class PrefixScores(Transform):
    """Gives each completion the scores of its first b_1 < … < b_S tokens: the core of BRPO (arXiv 2505.13438).

    The budgets are equal parts of ``max_new_tokens``. What the score gains from one to the next is the reward of the
    last token before it, so that the rewards up to a budget add up to its score; one beyond the end has the score of
    the whole. Credit ``brpo`` makes advantages of them, or ``reward_to_go``.

    Departure: the paper lets the policy summarise each cut, four times, and scores the summaries; here the prefix
    itself is scored, as a source can that looks for an answer in what is written so far.

    A completion one of whose prefixes has no valid score has no valid reward.

    Args:
        source: what scores prefixes, one that holds no model, such as FunctionReward. A prefix that stops before the
            end counts as truncated.
        num_cuts: S.
    """

    def __init__(self, source: RewardSource, num_cuts: int = 4) -> None:
        if isinstance(source, HoldsModels):
            raise ValueError(
                f"source={source.name!r} of PrefixScores holds a model, which has no place between the phases of a "
                "step. Use a source without one, such as FunctionReward."
            )
        self.source, self.num_cuts = source, num_cuts
        self._setting: Setting | None = None
        self._is_loaded = False
        self._measured: dict[str, Mean] = {}

    def set_up(self, setting: Setting) -> None:
        """ValueError for more cuts than tokens."""
        budgets(self.num_cuts, setting.max_new_tokens)
        self._setting = setting

    def __call__(self, rollout: R, context: Context) -> R:
        """Token rewards with the gains, and rewards without those of completions that have no valid one."""
        assert self._setting is not None, "set_up comes first"
        completions = rollout.completions
        cuts_NS = [
            [min(budget, length) for budget in budgets(self.num_cuts, rollout.max_new_tokens)]
            for length in completions.lengths_N.tolist()
        ]
        scores_NS = self._scores(rollout, cuts_NS)
        self._measured = {"prefix_score": mean_of(scores_NS[~scores_NS.isnan()])}
        unknown_N = scores_NS.isnan().any(-1)
        earned_NT = gains(scores_NS.masked_fill(unknown_N[:, None], 0.0), cuts_NS, completions.mask_NT.shape[1])
        earned_NT = earned_NT.to(completions.mask_NT.device, torch.float32)
        if rollout.token_rewards_NT is not None:
            earned_NT = earned_NT + rollout.token_rewards_NT
        rollout = replace(rollout, token_rewards_NT=earned_NT)
        return plus(rollout, torch.where(unknown_N, torch.nan, 0.0)) if unknown_N.any() else rollout

    def metrics(self) -> Mapping[str, Mean]:
        """The mean score over all cuts."""
        return self._measured

    def _scores(self, rollout: Rollout, cuts_NS: Sequence[Sequence[int]]) -> Tensor:
        """float64 scores_NS on the CPU; each prefix is scored once.

        Raises:
            ValueError: a score is infinite.
        """
        assert self._setting is not None, "set_up comes first"
        if not self._is_loaded:
            self.source.setup(rollout.completions.mask_NT.device)
            self._is_loaded = True
        wanted = list(dict.fromkeys((n, cut) for n, cuts in enumerate(cuts_NS) for cut in cuts))
        prompts = [rollout.prompts.prompts[n // rollout.group_size] for n, _ in wanted]
        texts = prefixes(rollout.completions, wanted, self._setting.tokenizer())
        scores = score([self.source], prompts, texts)[:, 0]
        if scores.isinf().any():
            raise ValueError(
                f"source '{self.source.name}' of PrefixScores gave infinite scores, of which there are no differences. "
                "Give finite ones, or None where there is none."
            )
        found = dict(zip(wanted, scores.tolist(), strict=True))
        return torch.tensor([[found[n, cut] for cut in cuts] for n, cuts in enumerate(cuts_NS)], dtype=torch.float64)


def prefixes(
    completions: Completions, wanted: Sequence[tuple[int, int]], tokenizer: PreTrainedTokenizerBase
) -> list[Completion]:
    """The texts of (completion, tokens); that of a whole completion is its own."""
    tokens_NT, wholes = completions.tokens_NT.tolist(), completions.groups(len(completions))[0]
    texts = tokenizer.batch_decode([tokens_NT[n][:cut] for n, cut in wanted], skip_special_tokens=True)
    return [
        wholes[n] if cut == wholes[n].num_tokens else Completion(text, truncated=True, num_tokens=cut)
        for (n, cut), text in zip(wanted, texts, strict=True)
    ]


def gains(scores_NS: Tensor, cuts_NS: Sequence[Sequence[int]], width: int) -> Tensor:
    """float64 [N, T]: at the last token before each cut what the score has gained since the cut before.

    >>> gains(torch.tensor([[0.0, 1.0, 0.5, 0.5]]), [[1, 2, 3, 3]], 3).tolist()
    [[0.0, 1.0, -0.5]]
    """
    gained_NS = scores_NS.double().diff(dim=-1, prepend=torch.zeros(len(scores_NS), 1, dtype=torch.float64))
    last_NS = (torch.tensor(cuts_NS) - 1).clamp(min=0)
    return torch.zeros(len(scores_NS), width, dtype=torch.float64).scatter_add_(1, last_NS, gained_NS)

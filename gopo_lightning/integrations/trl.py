"""GOPO in TRL: its ``GRPOTrainer`` with the ordinal advantage, which takes our reward sources as reward functions.

All else is TRL's. Completions without a valid score have the advantage 0 and still count in TRL's denominators; here
they leave those too.
"""

import hashlib
import math
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from gopo_lightning._compat import trl_trainer
from gopo_lightning.objectives.advantages import net_wins
from gopo_lightning.rewards import PairwiseSource, RewardSource, comparison_metrics, score_groups
from gopo_lightning.rewards.combine import weighted_sum
from gopo_lightning.types import Completion, Prompt

_GRPOTrainer: Any = trl_trainer()


class GOPOTrainer(_GRPOTrainer):
    """``trl.GRPOTrainer`` with A_i = 2 (wins_i − losses_i) / (G_valid − 1) (GOPO, arXiv 2602.03876).

    Several rewards are added with TRL's ``reward_weights`` before they are ranked. A function that scores none of a
    group's completions is left out for that group, as in TRL's multi-task training; a completion that lacks one of the
    others has no valid score. A pairwise source that is the only reward is ranked by its comparisons themselves:
    A_i = 2 Σ_j (W_ij − W_ji) / #asked_i.

    Args:
        model: as in TRL.
        reward_funcs: TRL's, ours (`gopo_lightning.rewards`), or a list of both.
        args: positional arguments of ``GRPOTrainer``, from ``args`` on.
        options: its keyword arguments.

    Raises:
        ValueError: options without an effect on ranks, or a pairwise source whose groups processes would share.
    """

    def __init__(self, model: Any, reward_funcs: Any = None, *args: Any, **options: Any) -> None:
        functions = reward_funcs if isinstance(reward_funcs, list) else [reward_funcs] if reward_funcs else []
        ours = (RewardSource, PairwiseSource)
        functions = [_RewardFunction(f, self) if isinstance(f, ours) else f for f in functions]
        super().__init__(model, functions or None, *args, **options)
        self._check()
        for function in self.reward_funcs:
            if isinstance(function, _RewardFunction):
                function.source.setup(self.accelerator.device)

    @property
    def group_size(self) -> int:
        """G, in training or evaluation."""
        return int(self.num_generations if self.model.training else self.num_generations_eval)

    def advantages(self, rewards_NK: Tensor) -> Tensor:
        """float32 advantages_N, on the CPU; 0 for completions without a valid score, and everywhere if G is 1."""
        rewards_PGK = rewards_NK.cpu().double().unflatten(0, (-1, self.group_size))
        if self._only_compares:
            return (4 * rewards_PGK - 2).nan_to_num(0.0).flatten().float()  # of the share of wins
        absent_P1K = rewards_PGK.isnan().all(1, keepdim=True)
        rewards_PG = weighted_sum(rewards_PGK.masked_fill(absent_P1K, 0.0), weights=self.reward_weights.tolist())
        rewards_PG = rewards_PG.masked_fill(absent_P1K.all(-1), math.nan)
        return (2 * net_wins(rewards_PG)).flatten().float()

    @property
    def _only_compares(self) -> bool:
        return [getattr(function, "compares", False) for function in self.reward_funcs] == [True]

    def _check(self) -> None:
        """ValueError for options that ranks would ignore, and for groups that cannot be compared."""
        for name, default in {"scale_rewards": "group", "multi_objective_aggregation": "sum_then_normalize"}.items():
            if (value := getattr(self.args, name)) != default:
                raise ValueError(f"{name}={value!r} has no effect: ranks have no scale. Leave it at {default!r}.")
        if self._only_compares and self.reward_weights.tolist() != [1]:
            raise ValueError(
                f"reward_weights={self.reward_weights.tolist()}: the only reward compares completions, and nothing is "
                "to be added to it. Remove them."
            )


class _RewardFunction:
    """A source as TRL calls its reward functions."""

    def __init__(self, source: RewardSource | PairwiseSource, trainer: Any) -> None:
        self.source, self.trainer, self.__name__ = source, trainer, source.name
        self.compares = isinstance(source, PairwiseSource)

    def __call__(
        self,
        prompts: Sequence[Any],
        completions: Sequence[Any],
        completion_ids: Sequence[Sequence[int]],
        log_metric: Any,
        **columns: Any,
    ) -> list[float]:
        """Scores, or shares of wins within the group; NaN without any."""
        size = self.trainer.group_size if self.compares else 1
        given = ("trainer_state", "log_extra", "environments")
        rows = [{k: v[n] for k, v in columns.items() if k not in given} for n in range(len(prompts))]
        asked = [_prompt(prompt, row) for prompt, row in zip(prompts, rows, strict=True)]
        starts = range(0, len(prompts), size)
        if len(prompts) % size or any(len({p.index for p in asked[n : n + size]}) > 1 for n in starts):
            raise ValueError(
                f"'{self.source.name}' compares the {size} completions of a prompt, but this process has only some of "
                "them. Let per_device_train_batch_size · steps_per_generation be a multiple of num_generations, and "
                "per_device_eval_batch_size one of num_generations_eval."
            )
        texts = [self._completion(c, ids) for c, ids in zip(completions, completion_ids, strict=True)]
        scores = score_groups([self.source], asked[::size], [texts[n : n + size] for n in starts])
        if scores.wins_PGGK is not None:
            for tag, value in comparison_metrics([self.source], scores.wins_PGGK).items():
                log_metric(tag, float(value))
        values: list[float] = scores.rewards_PGK.flatten().tolist()
        return values

    def _completion(self, completion: Any, ids: Sequence[int]) -> Completion:
        text = completion if isinstance(completion, str) else _text(completion[-1]) if completion else ""
        ended = bool(ids) and ids[-1] in self.trainer.eos_token_ids
        return Completion(text, truncated=not ended, num_tokens=len(ids))


def _prompt(prompt: Any, columns: Mapping[str, Any]) -> Prompt:
    """Its index, which tells prompts apart and keys the order in which a pair is asked, is a hash of all of it."""
    number = int.from_bytes(
        hashlib.sha256(repr((prompt, columns)).encode("utf-8", "surrogatepass")).digest()[:6], "big"
    )
    if isinstance(prompt, str):
        return Prompt(number, (), prompt, columns=columns)
    said = [_text(message) for message in prompt if message["role"] == "user"]
    return Prompt(number, (), said[-1] if said else "", tuple(prompt), columns)


def _text(message: Mapping[str, Any]) -> str:
    """The content of ``message``, of parts those that are text."""
    content = message.get("content") or ""
    return content if isinstance(content, str) else "".join(part.get("text", "") for part in content)

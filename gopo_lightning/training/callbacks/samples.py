"""Sampled groups as tables in the loggers: what the policy wrote, how it was ranked, what it was taught."""

import re
import textwrap
from collections.abc import Sequence
from typing import Any

import lightning as L
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor

from gopo_lightning.training.callbacks.schedule import Every
from gopo_lightning.training.loggers import Cell, Table, log_table, without_tables
from gopo_lightning.types import Experience, Rollout

_MARKUP = re.compile(r"[&<>|\\`*_\[\]{}#~!+-]")
_WIDTH = 80
"""Characters of a line in a cell. Without breaks, TensorBoard gives long cells the room of the others' numbers."""


def ranks(rewards_G: Tensor) -> Tensor:
    """Ranks in a group, 1 for the best; tied rewards share the mean of their ranks, NaN keeps NaN.

    >>> ranks(torch.tensor([0.5, 2.0, 0.5, float("nan")])).tolist()
    [2.5, 1.0, 2.5, nan]
    """
    above_G = (rewards_G[None, :] > rewards_G[:, None]).sum(1)
    equal_G = (rewards_G[None, :] == rewards_G[:, None]).sum(1)
    ranks_G = 1 + above_G + (equal_G - 1) / 2
    return ranks_G.masked_fill(rewards_G.isnan(), float("nan"))


def escape(text: str, max_chars: int) -> str:
    """``text`` for a cell of a Markdown table: shown as it is, at most ``max_chars`` of it, in lines."""
    lines = re.split(r"\r\n|\r|\n", text[:max_chars].strip())
    wrapped = [part for line in lines for part in textwrap.wrap(line, _WIDTH) or [""]]
    shown = "<br>".join(_MARKUP.sub(lambda match: f"&#{ord(match[0])};", line) for line in wrapped)
    rest = f" *({len(text) - max_chars} more characters)*" if len(text) > max_chars else ""
    return (shown or "*(empty)*") + rest


def number(value: float, form: str = "+.3f") -> str:
    """``value`` in ``form``; NaN, a reward or rank that does not exist, as a word."""
    return "none" if value != value else f"{value:{form}}"


def group_table(rollout: Rollout, p: int, max_chars: int = 1000) -> str:
    """Group ``p`` as Markdown, the best completion first, those without a valid reward last."""
    prompt, completions = rollout.prompts.prompts[p], rollout.completions
    rewards_G, rewards_GK = rollout.rewards_PG[p], rollout.rewards_PGK[p]
    ranks_G, advantages_G = ranks(rewards_G).tolist(), _advantages(rollout, p)
    with_sources, taught = rewards_GK.shape[-1] > 1, ["advantage"] if advantages_G else []
    header = ["rank", "reward", *(["by source"] if with_sources else []), *taught, "tokens", "completion"]
    rows = [header, ["---"] * len(header)]
    for g in _best_first(ranks_G):
        n = p * rollout.group_size + g
        tokens = f"{int(completions.lengths_N[n])}{' (cut)' if completions.truncated_N[n] else ''}"
        sources = [", ".join(number(reward) for reward in rewards_GK[g].tolist())] if with_sources else []
        advantage = [number(advantages_G[g])] if advantages_G else []
        scores = [number(ranks_G[g], "g"), number(rewards_G[g].item()), *sources, *advantage]
        rows.append([*scores, tokens, escape(completions.texts[n], max_chars)])
    table = "\n".join(f"| {' | '.join(row)} |" for row in rows)
    return f"**Prompt, row {prompt.index}:** {escape(prompt.text, max_chars)}\n\n{table}\n"


def group_cells(
    rollout: Rollout, p: int, names: Sequence[str] = (), max_chars: int = 1000
) -> tuple[list[str], list[list[Cell]]]:
    """Group ``p`` as columns and rows of plain values, in the order of `group_table`; ``names`` are the sources'."""
    prompt, completions = rollout.prompts.prompts[p], rollout.completions
    rewards_G, rewards_GK = rollout.rewards_PG[p].tolist(), rollout.rewards_PGK[p].tolist()
    ranks_G, advantages_G = ranks(rollout.rewards_PG[p]).tolist(), _advantages(rollout, p)
    sources = [f"reward {name}" for name in names] if len(names) > 1 else []
    taught = ["advantage"] if advantages_G else []
    columns = ["row", "prompt", "rank", "reward", *sources, *taught, "tokens", "cut", "completion"]
    rows: list[list[Cell]] = []
    for g in _best_first(ranks_G):
        n = p * rollout.group_size + g
        values = [ranks_G[g], rewards_G[g], *(rewards_GK[g] if sources else []), *advantages_G[g : g + 1]]
        size = [int(completions.lengths_N[n]), bool(completions.truncated_N[n])]
        rows.append([prompt.index, prompt.text[:max_chars], *values, *size, completions.texts[n][:max_chars]])
    return columns, rows


def _best_first(ranks_G: Sequence[float]) -> list[int]:
    return sorted(range(len(ranks_G)), key=lambda g: (ranks_G[g] != ranks_G[g], ranks_G[g]))


def _advantages(rollout: Rollout, p: int) -> list[float]:
    """Of a rollout that nothing is learnt from, none."""
    return rollout.advantages_PG[p].tolist() if isinstance(rollout, Experience) else []


class SampleTable(L.Callback):
    """Logs groups of completions as tables of text: prompt, completions, rewards, ranks and advantages.

    Every logger of the run gets them (docs/loggers.md), as ``samples/group_<i>``: the first groups of rank 0's
    rollout; and of each validation, without advantages, as ``val/samples/group_<i>``, whose prompts stay the same.
    Every policy run has them, whether or not they are listed.

    Args:
        every_n_steps: Optimiser steps from one table of the training to the next; the first rollout is always logged.
        num_groups: How many groups to log each time.
        max_chars: A longer prompt or completion is cut, and the table says by how much.
        num_validation_groups: How many groups to log at each validation; 0 for none.
        enabled: false switches it off.
    """

    is_listed = True
    """Whether someone asked for it, and has to know where it writes nothing."""

    def __init__(
        self,
        every_n_steps: int = 10,
        num_groups: int = 2,
        max_chars: int = 1000,
        num_validation_groups: int = 2,
        enabled: bool = True,
    ) -> None:
        if num_groups < 1 or max_chars < 1 or num_validation_groups < 0:
            raise ValueError(
                f"num_groups is {num_groups}, max_chars is {max_chars} and num_validation_groups is "
                f"{num_validation_groups}; the first two have to be at least 1, the last 0. "
                "Set enabled to false to log no tables."
            )
        self.num_groups, self.num_validation_groups = num_groups, num_validation_groups
        self.max_chars = max_chars
        self.enabled = enabled
        self._every = Every(every_n_steps)
        self._num_validated = 0

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Start counting, and warn of loggers that can take no table."""
        self._every.start(trainer.global_step, with_first=True)
        if not (self.enabled and self.is_listed and trainer.is_global_zero):
            return
        if not trainer.loggers:
            rank_zero_warn("SampleTable writes nothing: the run has no logger. Set trainer.logger.")
        elif names := without_tables(trainer):
            rank_zero_warn(f"SampleTable writes nothing to {', '.join(names)}, which take no tables (docs/loggers.md).")

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Write the tables of this step's rollout if it is due."""
        if not self.enabled or not self._every.due(trainer.global_step) or not trainer.is_global_zero:
            return
        experience = batch.get("experience") if hasattr(batch, "get") else None
        if not isinstance(experience, Experience):
            raise ValueError(
                f"SampleTable found no rollout in the batch of {type(pl_module).__name__}; it reads "
                "batch['experience'], which only policy training has. Remove it from trainer.callbacks."
            )
        for p in range(min(self.num_groups, len(experience))):
            self._log(trainer, pl_module, f"samples/group_{p}", experience, p)

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Count from its first prompt."""
        self._num_validated = 0

    def on_validation_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Write the tables of its first prompts."""
        rollout = batch.get("rollout") if hasattr(batch, "get") else None
        if not self.enabled or not isinstance(rollout, Rollout) or not trainer.is_global_zero:
            return
        for p, is_padding in enumerate(batch["is_padding"].tolist()):
            if not is_padding and self._num_validated < self.num_validation_groups:
                self._log(trainer, pl_module, f"val/samples/group_{self._num_validated}", rollout, p)
                self._num_validated += 1

    def _log(self, trainer: L.Trainer, pl_module: L.LightningModule, tag: str, rollout: Rollout, p: int) -> None:
        columns, rows = group_cells(rollout, p, getattr(pl_module, "reward_names", ()), self.max_chars)
        log_table(trainer, tag, Table(columns, rows, group_table(rollout, p, self.max_chars)))

"""Sampled groups as tables in TensorBoard: what the policy wrote, how it was ranked, what it was taught."""

import re
import textwrap
from typing import Any

import lightning as L
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor

from gopo_lightning.training.callbacks.schedule import Every
from gopo_lightning.types import Experience

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


def group_table(experience: Experience, p: int, max_chars: int = 1000) -> str:
    """Group ``p`` as Markdown, the best completion first, those without a valid reward last."""
    prompt, completions, G = experience.prompts.prompts[p], experience.completions, experience.group_size
    rewards_G, rewards_GK = experience.rewards_PG[p], experience.rewards_PGK[p]
    ranks_G, advantages_G = ranks(rewards_G).tolist(), experience.advantages_PG[p].tolist()
    with_sources = rewards_GK.shape[-1] > 1
    header = ["rank", "reward", *(["by source"] if with_sources else []), "advantage", "tokens", "completion"]
    rows = [header, ["---"] * len(header)]
    for g in sorted(range(G), key=lambda g: (ranks_G[g] != ranks_G[g], ranks_G[g])):
        n = p * G + g
        tokens = f"{int(completions.lengths_N[n])}{' (cut)' if completions.truncated_N[n] else ''}"
        sources = [", ".join(number(reward) for reward in rewards_GK[g].tolist())] if with_sources else []
        scores = [number(ranks_G[g], "g"), number(rewards_G[g].item()), *sources, number(advantages_G[g])]
        rows.append([*scores, tokens, escape(completions.texts[n], max_chars)])
    table = "\n".join(f"| {' | '.join(row)} |" for row in rows)
    return f"**Prompt, row {prompt.index}:** {escape(prompt.text, max_chars)}\n\n{table}\n"


class SampleTable(L.Callback):
    """Logs groups of completions as tables of text: prompt, completions, rewards, ranks and advantages.

    The tables are in TensorBoard's Text tab as ``samples/group_<i>``: the first groups of rank 0's rollout.

    Args:
        every_n_steps: Optimiser steps from one table to the next; the first rollout is always logged.
        num_groups: How many groups to log each time.
        max_chars: A longer prompt or completion is cut, and the table says by how much.
    """

    def __init__(self, every_n_steps: int = 10, num_groups: int = 2, max_chars: int = 1000) -> None:
        if num_groups < 1 or max_chars < 1:
            raise ValueError(
                f"num_groups is {num_groups} and max_chars is {max_chars}; both have to be at least 1. "
                "Remove SampleTable from trainer.callbacks to log no tables."
            )
        self.num_groups = num_groups
        self.max_chars = max_chars
        self._every = Every(every_n_steps)

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Start counting, and warn if no logger can take a table."""
        self._every.start(trainer.global_step, with_first=True)
        if trainer.is_global_zero and not _text_writers(trainer):
            rank_zero_warn("SampleTable writes nothing: no logger here has `add_text`. Use TensorBoardLogger.")

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Write the tables of this step's rollout if it is due."""
        if not self._every.due(trainer.global_step) or not trainer.is_global_zero:
            return
        experience = batch.get("experience") if hasattr(batch, "get") else None
        if not isinstance(experience, Experience):
            raise ValueError(
                f"SampleTable found no rollout in the batch of {type(pl_module).__name__}; it reads "
                "batch['experience'], which only policy training has. Remove it from trainer.callbacks."
            )
        experience = experience.to("cpu")
        for p in range(min(self.num_groups, len(experience))):
            table = group_table(experience, p, self.max_chars)
            for writer in _text_writers(trainer):
                writer.add_text(f"samples/group_{p}", table, trainer.global_step)


def _text_writers(trainer: L.Trainer) -> list[Any]:
    experiments = [getattr(logger, "experiment", None) for logger in trainer.loggers]
    return [experiment for experiment in experiments if hasattr(experiment, "add_text")]

"""What the step-0 policy said to the held-out prompts: sampled once, kept for the whole run."""

import hashlib
import json
import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gopo_lightning.distributed import gather_objects
from gopo_lightning.structs import Completion, Experience, Prompt, PromptBatch


class ReferenceCompletions:
    """The reference's completions and their rewards by prompt. They travel in the checkpoint and go to a JSONL file.

    So the win rate against the reference needs no reference model in memory, also after a resume.
    """

    def __init__(self) -> None:
        self._completions: dict[str, list[dict[str, Any]]] = {}
        self._rewards: dict[str, list[list[float]]] = {}
        self._new: list[dict[str, Any]] = []

    @staticmethod
    def _key(prompt: Prompt) -> str:
        return f"{prompt.index}:{hashlib.sha256(prompt.text.encode()).hexdigest()[:16]}"

    def knows(self, prompts: PromptBatch) -> bool:
        """Whether all of ``prompts`` have been sampled."""
        return all(self._key(prompt) in self._rewards for prompt in prompts.prompts)

    def of(self, prompts: PromptBatch) -> tuple[list[list[Completion]], Tensor]:
        """The completions, and references_PRK: a score for each source, NaN in the columns of pairwise ones."""
        keys = [self._key(prompt) for prompt in prompts.prompts]
        rewards_PRK = torch.tensor([self._rewards[key] for key in keys], dtype=torch.float32)
        return [[Completion(**row) for row in self._completions[key]] for key in keys], rewards_PRK

    def add(self, experience: Experience) -> None:
        """Keep the completions of the reference model."""
        groups = experience.completions.groups(experience.group_size)
        for p, (prompt, group) in enumerate(zip(experience.prompts.prompts, groups, strict=True)):
            rows = [{"text": str(c), "truncated": c.truncated, "num_tokens": c.num_tokens} for c in group]
            self._completions[self._key(prompt)] = rows
            self._rewards[self._key(prompt)] = experience.rewards_PGK[p].tolist()
            self._new.append(
                {
                    "key": self._key(prompt),
                    "index": prompt.index,
                    "prompt": prompt.text,
                    "completions": [row["text"] for row in rows],
                    "truncated": [row["truncated"] for row in rows],
                    "num_tokens": [row["num_tokens"] for row in rows],
                    "rewards": _without_nan(experience.rewards_PG[p].tolist()),
                    "rewards_by_source": [_without_nan(row) for row in experience.rewards_PGK[p].tolist()],
                }
            )

    def share(self, path: Path | None) -> None:
        """Give every rank what any rank has added, and write it to ``path``. A collective: all ranks call it."""
        rows = [row for rows in gather_objects(self._new) for row in rows]
        self._new = []
        for row in rows:
            endings = zip(row["completions"], row["truncated"], row["num_tokens"], strict=True)
            self._completions[row["key"]] = [{"text": t, "truncated": cut, "num_tokens": n} for t, cut, n in endings]
            self._rewards[row["key"]] = [
                [math.nan if reward is None else reward for reward in rewards] for rewards in row["rewards_by_source"]
            ]
        if rows and path is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
            unique = {row.pop("key"): row for row in rows}
            lines = (json.dumps(row, ensure_ascii=False) for row in sorted(unique.values(), key=lambda r: r["index"]))
            path.write_text("\n".join(lines) + "\n", encoding="utf-8")

    def state_dict(self) -> dict[str, Any]:
        """Prompt key → completions, and rewards of each by each source."""
        return {"completions": dict(self._completions), "rewards": dict(self._rewards)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what a run had sampled."""
        if "completions" in state:  # earlier versions did not say how they ended: sampled again
            self._completions, self._rewards = dict(state["completions"]), dict(state["rewards"])


def _without_nan(rewards: list[float]) -> list[float | None]:
    return [None if math.isnan(reward) else reward for reward in rewards]

"""What the step-0 policy said to the held-out prompts: sampled once, kept for the whole run."""

import hashlib
import json
import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gopo_lightning.distributed import gather_objects
from gopo_lightning.structs import Experience, Prompt, PromptBatch


class ReferenceCompletions:
    """Rewards of the reference's completions by prompt. They travel in the checkpoint; the texts go to a JSONL file.

    So the win rate against the reference needs no reference model in memory, also after a resume.
    """

    def __init__(self) -> None:
        self._rewards: dict[str, list[float]] = {}
        self._new: list[dict[str, Any]] = []

    @staticmethod
    def _key(prompt: Prompt) -> str:
        return f"{prompt.index}:{hashlib.sha256(prompt.text.encode()).hexdigest()[:16]}"

    def rewards(self, prompts: PromptBatch) -> Tensor | None:
        """reference_PG, or None if a prompt has not been sampled yet."""
        found = [self._rewards.get(self._key(prompt)) for prompt in prompts.prompts]
        if any(rewards is None for rewards in found):
            return None
        return torch.tensor(found, dtype=torch.float32)

    def add(self, experience: Experience) -> None:
        """Keep the completions of the reference model."""
        G = experience.group_size
        for p, prompt in enumerate(experience.prompts.prompts):
            rewards = experience.rewards_PG[p].tolist()
            self._rewards[self._key(prompt)] = rewards
            self._new.append(
                {
                    "key": self._key(prompt),
                    "index": prompt.index,
                    "prompt": prompt.text,
                    "completions": list(experience.completions.texts[p * G : (p + 1) * G]),
                    "rewards": [None if math.isnan(reward) else reward for reward in rewards],
                }
            )

    def share(self, path: Path | None) -> None:
        """Give every rank what any rank has added, and write it to ``path``. A collective: all ranks call it."""
        rows = [row for rows in gather_objects(self._new) for row in rows]
        self._new = []
        for row in rows:
            self._rewards[row["key"]] = [math.nan if reward is None else reward for reward in row["rewards"]]
        if rows and path is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
            unique = {row.pop("key"): row for row in rows}
            lines = (json.dumps(row, ensure_ascii=False) for row in sorted(unique.values(), key=lambda r: r["index"]))
            path.write_text("\n".join(lines) + "\n", encoding="utf-8")

    def state_dict(self) -> dict[str, list[float]]:
        """Prompt key → rewards."""
        return dict(self._rewards)

    def load_state_dict(self, state: dict[str, list[float]]) -> None:
        """Restore what a run had sampled."""
        self._rewards = dict(state)

"""What the step-0 policy said to the held-out prompts: sampled once, kept for the whole run."""

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gopo_lightning.data.json_lines import write_jsonl
from gopo_lightning.distributed.collectives import gather_objects
from gopo_lightning.types import Completion, Completions, Prompt, PromptBatch


class ReferenceCompletions:
    """The reference's completions by prompt. They travel in the checkpoint and go to a JSONL file.

    So the win rate against the reference needs no reference model in memory, also after a resume. They are found again
    only for the same tokens under the same settings. Their scores are kept no longer than a call of the Trainer: the
    next one may have other reward sources, and scores the same texts with these.
    """

    def __init__(self) -> None:
        self._made_by = ""
        self._completions: dict[str, list[dict[str, Any]]] = {}
        self._rewards_RK: dict[str, Tensor] = {}
        self._rewards_R: dict[str, Tensor] = {}
        self._new: dict[str, Prompt] = {}

    def begin(self, made_by: Mapping[str, Any]) -> None:
        """Before the first batch of a call of the Trainer.

        Args:
            made_by: all that decides which completions a prompt gets, in values whose text is the same in every run.
        """
        self._made_by = repr(sorted(made_by.items()))
        self._rewards_RK, self._rewards_R = {}, {}

    def _key(self, prompt: Prompt) -> str:
        content = repr((self._made_by, prompt.index, prompt.token_ids))
        return hashlib.sha256(content.encode("utf-8", "surrogatepass")).hexdigest()[:32]

    def knows(self, prompts: PromptBatch) -> bool:
        """Whether all of ``prompts`` have been sampled."""
        return all(self._key(prompt) in self._completions for prompt in prompts.prompts)

    def has_scores(self, prompts: PromptBatch) -> bool:
        """Whether the completions of all of ``prompts`` have been scored by the sources at hand."""
        return all(self._key(prompt) in self._rewards_RK for prompt in prompts.prompts)

    def of(self, prompts: PromptBatch) -> list[list[Completion]]:
        """The P groups of R completions."""
        return [[Completion(**row) for row in self._completions[self._key(prompt)]] for prompt in prompts.prompts]

    def scores_of(self, prompts: PromptBatch) -> Tensor:
        """references_PRK: a score for each source, NaN in the columns of pairwise ones."""
        return torch.stack([self._rewards_RK[self._key(prompt)] for prompt in prompts.prompts])

    def add(self, prompts: PromptBatch, completions: Completions) -> None:
        """Keep what the reference model has said."""
        for prompt, group in zip(prompts.prompts, completions.groups(len(completions) // len(prompts)), strict=True):
            self._completions[self._key(prompt)] = [
                {"text": str(c), "truncated": c.truncated, "num_tokens": c.num_tokens} for c in group
            ]
            self._new[self._key(prompt)] = prompt

    def add_scores(self, prompts: PromptBatch, rewards_PRK: Tensor, rewards_PR: Tensor) -> None:
        """Keep the scores of what ``of`` gives, by each source and combined."""
        for p, prompt in enumerate(prompts.prompts):
            self._rewards_RK[self._key(prompt)] = rewards_PRK[p].cpu()
            self._rewards_R[self._key(prompt)] = rewards_PR[p].cpu()

    def share(self, path: Path | None) -> None:
        """Give every rank what any rank has added, and write it to ``path``. A collective: all ranks call it."""
        rows = {key: self._record(key, prompt) for key, prompt in self._new.items()}
        self._new = {}
        rows = {key: row for others in gather_objects(rows) for key, row in others.items()}
        for key, row in rows.items():
            endings = zip(row["completions"], row["truncated"], row["num_tokens"], strict=True)
            self._completions[key] = [{"text": t, "truncated": cut, "num_tokens": n} for t, cut, n in endings]
        if rows and path is not None:
            write_jsonl(path, sorted(rows.values(), key=lambda row: row["index"]))

    def _record(self, key: str, prompt: Prompt) -> dict[str, Any]:
        """A line of the file."""
        completions = self._completions[key]
        return {
            "index": prompt.index,
            "prompt": prompt.text,
            "completions": [row["text"] for row in completions],
            "truncated": [row["truncated"] for row in completions],
            "num_tokens": [row["num_tokens"] for row in completions],
            "rewards": self._rewards_R[key].tolist(),
            "rewards_by_source": self._rewards_RK[key].tolist(),
        }

    def state_dict(self) -> dict[str, Any]:
        """Key of prompt and settings → completions."""
        return {"completions": dict(self._completions)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what a run had sampled. What earlier versions kept is sampled again: they did not say under what."""
        self._completions = dict(state.get("completions", {}))

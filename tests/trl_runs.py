"""Small runs of TRL's trainer with our advantage, and what they trained with."""

import os
from collections import defaultdict
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import GRPOConfig

from gopo_lightning.integrations.trl import GOPOTrainer
from tests.ranks import mixed

PROMPTS = [{"prompt": f"say {word}"} for word in ("ab", "x", "yyyy", "ababab")]
"""`tests.ranks.mixed` ties the first, has no score for the last, and for some completions of the others."""


def reward(prompts: list[str], completions: list[str], **columns: Any) -> list[float | None]:
    """`tests.ranks.mixed`, as TRL calls it."""
    return mixed(prompts, completions)


class Recording(GOPOTrainer):
    """Keeps, for training and evaluation, the (prompt, tokens of the completion, advantage) that the loss gets."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.seen: dict[str, list[tuple[str, tuple[int, ...], float]]] = {"train": [], "eval": []}

    def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        rows = zip(inputs["prompt_ids"], inputs["completion_ids"], inputs["completion_mask"].bool(), strict=True)
        found = [
            (self.processing_class.decode(prompt, skip_special_tokens=True), tuple(tokens[mask].tolist()))
            for prompt, tokens, mask in rows
        ]
        mode = "train" if self.model.training else "eval"
        self.seen[mode] += [(*row, a) for row, a in zip(found, inputs["advantages"].tolist(), strict=True)]
        return super().compute_loss(model, inputs, *args, **kwargs)


def make(policy: Path, folder: Path, rewards: Any = reward, kind: Any = Recording, **options: Any) -> Any:
    """A trainer of two steps."""
    defaults = {
        "max_steps": 2,
        "num_generations": 4,
        "per_device_train_batch_size": 8,
        "per_device_eval_batch_size": 8,
        "max_completion_length": 12,
        "learning_rate": 1e-3,
        "bf16": False,
        "gradient_checkpointing": False,
        "use_cpu": True,
        "report_to": "none",
        "save_strategy": "no",
        "logging_strategy": "no",
        "disable_tqdm": True,
        "seed": 3,
    }
    return kind(
        AutoModelForCausalLM.from_pretrained(policy, dtype=torch.float32),
        rewards,
        args=GRPOConfig(output_dir=str(folder), **{**defaults, **options}),
        train_dataset=Dataset.from_list(PROMPTS),
        eval_dataset=Dataset.from_list(PROMPTS),
        processing_class=AutoTokenizer.from_pretrained(policy, padding_side="left"),
    )


def groups(seen: list[tuple[str, tuple[int, ...], float]]) -> dict[str, list[tuple[tuple[int, ...], float]]]:
    """Prompt → its completions and their advantages."""
    found = defaultdict(list)
    for prompt, tokens, advantage in seen:
        found[prompt].append((tokens, advantage))
    return dict(found)


def on_a_rank(rank: int, policy: Path, folder: Path, port: int) -> None:
    """One of two processes; leaves what it trained with in ``folder``."""
    world = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2, "MASTER_PORT": port}
    os.environ |= {name: str(value) for name, value in world.items()} | {"MASTER_ADDR": "127.0.0.1"}
    torch.set_num_threads(1)
    trainer = make(policy, folder, max_steps=1, num_generations=4, per_device_train_batch_size=6)  # 1½ groups each
    trainer.train()
    torch.save(trainer.seen["train"], folder / f"{rank}.pt")
    torch.distributed.destroy_process_group()

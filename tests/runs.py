"""Builds small training runs for the tests of module, callbacks and command line."""

from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.loggers import TensorBoardLogger

from gopo_lightning.data.prompts import PromptDataModule
from gopo_lightning.data.sources import PromptSource
from gopo_lightning.policy.model import PolicyConfig
from gopo_lightning.rewards import FunctionReward
from gopo_lightning.rollout import SamplingConfig
from gopo_lightning.training.gopo_module import GOPOModule


def count_vowels(prompts: list[str], completions: list[str]) -> list[float]:
    """A reward with many ties."""
    return [float(sum(character in "aeiou" for character in text)) for text in completions]


def some_invalid(prompts: list[str], completions: list[str]) -> list[float | None]:
    """No score for a third of the completions, none at all for one prompt."""
    scores = count_vowels(prompts, completions)
    return [
        None if prompt.endswith("ababab") or len(completion.encode()) % 3 == 0 else score
        for prompt, completion, score in zip(prompts, completions, scores, strict=True)
    ]


GROUPS = {
    "rollout": ("sampling", "num_completions", "eval_num_completions", "engine", "refill", "lag"),
    "rewards": ("sources", "combine", "transforms", "timeout_seconds", "max_invalid_steps"),
    "objective": ("advantage", "credit", "loss", "iterate_every", "log_entropy", "log_reference_kl", "also"),
    "update": (
        "optimizer",
        "lr_schedule",
        "warmup_steps",
        "warmup_start",
        "lr_schedule_options",
        "max_grad_norm",
        "num_inner_epochs",
        "num_minibatches",
        "micro_batch_tokens",
        "rule",
        "prefix_sharing",
    ),
}
"""Fields of the groups of `GOPOModule`'s arguments."""


def grouped(options: dict[str, Any]) -> dict[str, Any]:
    """Arguments of `GOPOModule`, of fields of any group by their own names; ``rewards`` are the sources."""
    options = dict(options)
    if "rewards" in options:
        options["sources"] = options.pop("rewards")
    groups = {group: {name: options.pop(name) for name in names if name in options} for group, names in GROUPS.items()}
    return {**{group: fields for group, fields in groups.items() if fields}, **options}


def make_module(folder: Path, **overrides: Any) -> GOPOModule:
    """GOPO with plain SGD; ``overrides`` as in `grouped`."""
    options: dict[str, Any] = {
        "policy": PolicyConfig(str(folder)),
        "rewards": [FunctionReward("tests.runs.count_vowels", name="vowels")],
        "sampling": SamplingConfig(max_new_tokens=24),  # few completions get there
        "optimizer": lambda params: torch.optim.SGD(params, lr=0.003),  # a larger step unlearns how to end
        "num_completions": 4,
        "eval_num_completions": 2,
        "lr_schedule": "constant",
        "warmup_steps": 0,
        "max_grad_norm": None,
        "seed": 3,
    }
    return GOPOModule(**grouped(options | overrides))


def make_data(prompts_file: Path, **overrides: Any) -> PromptDataModule:
    """Twelve training prompts, four a step; five validation prompts in batches of four."""
    source = PromptSource(str(prompts_file))
    held_out = PromptSource(str(prompts_file), limit=5)
    options = {"train": source, "validation": held_out, "predict": held_out, "prompts_per_step": 4}
    return PromptDataModule(**(options | overrides))


def make_trainer(folder: Path, **overrides: Any) -> Trainer:
    """CPU, TensorBoard, no bar."""
    options: dict[str, Any] = {
        "accelerator": "cpu",
        "devices": 1,
        "max_steps": 2,
        "val_check_interval": 2,
        "check_val_every_n_epoch": None,
        "num_sanity_val_steps": 0,
        "inference_mode": False,
        "use_distributed_sampler": False,
        "log_every_n_steps": 1,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "logger": TensorBoardLogger(str(folder), name="run"),
        "callbacks": [],
    }
    return Trainer(**(options | overrides))


def weights(module: GOPOModule) -> torch.Tensor:
    """All weights of the policy as one vector."""
    return torch.cat([parameter.detach().flatten() for parameter in module.policy.parameters()])

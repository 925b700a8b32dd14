"""Short runs whose every number, text and weight is known: what a change that is not numerical must leave as it is.

``python -m tests.golden.runs`` records them in ``runs.json`` again; a change that does so says why in the CHANGELOG.
Floats depend on torch and on the processor, so the file says which these were.
"""

import hashlib
import json
import platform
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback
from lightning.pytorch.loggers import CSVLogger

from gopo_lightning.objectives.clipped import ClippedSurrogate
from gopo_lightning.policy.model import PolicyConfig
from gopo_lightning.rewards import FunctionComparator, FunctionReward
from gopo_lightning.rollout import SamplingConfig
from tests.conftest import save_tiny_policy, write_prompts
from tests.runs import make_data, make_module, make_trainer

RECORD = Path(__file__).with_name("runs.json")
_NOT_REPRODUCIBLE = ("seconds/", "throughput/", "epoch", "system/")


def earlier_in_the_alphabet(first: list[str], second: list[str]) -> list[float]:
    """A comparator without ties between different texts."""
    return [0.5 + 0.5 * ((a < b) - (a > b)) for a, b in zip(first, second, strict=True)]


def _vowels() -> FunctionReward:
    return FunctionReward("tests.runs.count_vowels", name="vowels")


def _some_invalid() -> FunctionReward:
    return FunctionReward("tests.runs.some_invalid", name="some")


def cases(policy: Path) -> dict[str, dict[str, Any]]:
    """Options of `make_module` beside the usual ones."""
    adamw = {"optimizer": lambda params: torch.optim.AdamW(params, lr=1e-3, eps=1e-3), "max_grad_norm": 0.1}
    lora = {"r": 4, "target_modules": ["q_proj", "v_proj", "down_proj"], "init_lora_weights": "orthogonal"}
    return {
        "plain": {},
        "several updates, KL, two sources": {
            "rewards": [_some_invalid(), _vowels()],
            "combine": "lexicographic",
            "loss": ClippedSurrogate(kl_coef=0.05, clip_low=0.001, clip_high=0.001),
            "num_inner_epochs": 2,
            "num_minibatches": 2,
            "micro_batch_tokens": 60,
            **adamw,
        },
        "LoRA, GRPO, sequences": {
            "policy": PolicyConfig(str(policy), lora=lora),
            "advantage": "grpo",
            "loss": ClippedSurrogate(
                aggregation="sequence",
                importance_sampling="sequence",
                mask_truncated=True,
                kl_coef=0.1,
                kl_estimator="k2",
            ),
            "rewards": [_some_invalid()],
            **adamw,
        },
        "comparisons": {
            "rewards": [FunctionComparator("tests.golden.runs.earlier_in_the_alphabet", name="alphabet")],
            "micro_batch_tokens": 60,
        },
        "replicated prompts, batch, filters": {
            "prefix_sharing": "never",
            "advantage": "batch",
            "sampling": SamplingConfig(max_new_tokens=16, top_p=0.9, stop_strings=("e",)),
            "loss": ClippedSurrogate(
                aggregation="constant", clip_ceiling=3.0, sampler_correction_cap=2.0, token_weight="log"
            ),
            "lr_schedule": "cosine",
            "warmup_steps": 2,
            "log_reference_kl": True,
            **adamw,
        },
        "borda, several updates": {
            "rewards": [_some_invalid(), _vowels()],
            "combine": {"function": "borda", "init_args": {"weights": [1.0, 2.0]}},
            "num_minibatches": 2,
            "micro_batch_tokens": 90,
        },
    }


class _Watch(Callback):
    """Metrics and texts of each step."""

    def __init__(self) -> None:
        self.steps: list[dict[str, Any]] = []

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        texts = batch["experience"].completions.texts
        self.steps.append({"metrics": _numbers(trainer.callback_metrics), "texts": _sha(repr(texts).encode())})


def run(name: str, policy: Path, prompts_file: Path, folder: Path) -> dict[str, Any]:
    """What the case ``name`` does in four optimiser steps with two validations, in values that JSON keeps exactly."""
    torch.manual_seed(0)
    module, watch = make_module(policy, **cases(policy)[name]), _Watch()
    trainer = make_trainer(folder, max_steps=4, callbacks=[watch], logger=CSVLogger(str(folder), name="run"))
    trainer.fit(module, make_data(prompts_file))
    trainer.save_checkpoint(folder / "end.ckpt")
    checkpoint = torch.load(folder / "end.ckpt", weights_only=True)
    return {
        "steps": watch.steps,
        "validation": _numbers({k: v for k, v in trainer.callback_metrics.items() if k.startswith("val/")}),
        "weights": _digest(checkpoint["state_dict"]),
        "optimizer": _digest(checkpoint["optimizer_states"]),
    }


def machine() -> dict[str, str]:
    """What the last bits depend on."""
    return {
        "torch": torch.__version__,
        "capability": torch.backends.cpu.get_cpu_capability(),
        "machine": platform.machine(),
        "threads": str(torch.get_num_threads()),
    }


def _numbers(metrics: Mapping[str, Any]) -> dict[str, str]:
    return {k: float(v).hex() for k, v in sorted(metrics.items()) if not k.startswith(_NOT_REPRODUCIBLE)}


def _sha(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:16]


def _digest(state: Any) -> str:
    """Of nested tensors and plain values."""
    if isinstance(state, torch.Tensor):
        return _sha(
            state.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes() + repr(state.shape).encode()
        )
    if isinstance(state, Mapping):
        return _sha(repr([(key, _digest(state[key])) for key in sorted(state, key=str)]).encode())
    if isinstance(state, list | tuple):
        return _sha(repr([_digest(value) for value in state]).encode())
    return repr(state)


def record() -> dict[str, Any]:
    """All cases, each in a folder of its own."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as root:
        policy = save_tiny_policy(Path(root) / "policy")
        prompts_file = write_prompts(Path(root))
        results = {
            name: run(name, policy, prompts_file, Path(root) / f"run-{number}")
            for number, name in enumerate(cases(policy))
        }
    recorded = {"machine": machine(), "runs": results}
    torch.set_num_threads(threads)
    return recorded


if __name__ == "__main__":
    target = Path(sys.argv[1]) if len(sys.argv) > 1 else RECORD
    target.write_text(json.dumps(record(), indent=1, sort_keys=True) + "\n")

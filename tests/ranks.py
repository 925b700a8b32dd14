"""Runs training cases on several gloo processes: one launch, one process group, many cases."""

import multiprocessing
import os
import signal
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from time import perf_counter
from typing import Any

import pytest
import torch
import torch.multiprocessing as mp
from lightning.pytorch import Callback
from torch import nn
from torch.distributed.device_mesh import init_device_mesh

from gopo_lightning.distributed.checkpoints import last_checkpoint_of
from gopo_lightning.distributed.collectives import gather_objects
from gopo_lightning.distributed.fsdp import shard_fsdp2
from gopo_lightning.distributed.strategies import FSDP2Strategy
from gopo_lightning.objectives.clipped import ClippedSurrogate
from gopo_lightning.policy.model import PolicyConfig, load_policy
from gopo_lightning.rewards import FunctionReward, SequenceClassifierReward
from gopo_lightning.rollout import SamplingConfig
from gopo_lightning.training.callbacks.export import export_policy
from tests.ports import free_port
from tests.runs import make_data, make_module, make_trainer

LORA = {"r": 4, "target_modules": ["q_proj", "v_proj", "down_proj"], "init_lora_weights": "orthogonal"}


def mixed(prompts: list[str], completions: list[str]) -> list[float | None]:
    """A group without any score, groups that tie throughout, some completions without a score, and ordinary groups."""
    scores: list[float | None] = []
    for prompt, text in zip(prompts, completions, strict=True):
        if prompt == "say ababab":
            scores.append(None)
        elif prompt == "say ab":
            scores.append(1.0)
        else:
            total = sum(text.encode())
            scores.append(None if total % 7 == 0 else float(total % 5))
    return scores


@dataclass(frozen=True)
class Case:
    """One training run."""

    name: str
    strategy: str = "auto"
    lora: bool = False
    kl_coef: float = 0.0
    max_steps: int = 3
    prompts_per_step: int = 4
    resume: str | None = None
    """Checkpoint, relative to the folder of results."""
    stop: tuple[int, int] | None = None
    """(rank, step): this rank alone gets SIGTERM at the end of this step's rollout; ``resume: last`` goes on."""
    fails: bool = False
    """Every rank raises, and leaves what it raised in ``<name>.rank<r>.txt``."""
    module: dict[str, Any] = field(default_factory=dict)
    policy: dict[str, Any] = field(default_factory=dict)
    strategy_options: dict[str, Any] = field(default_factory=dict)
    trainer: dict[str, Any] = field(default_factory=dict)
    data: dict[str, Any] = field(default_factory=dict)
    classifier: str | None = None
    """Folder of a reward model to score with, beside the function."""
    export: bool = False


def on(strategy: str, case: Case, **changes: Any) -> Case:
    """The same under another strategy."""
    return replace(case, name=f"{strategy}-{case.name}", strategy=strategy, **changes)


class Record(Callback):
    """Losses, gradient norms and the sampled text of every rank, step by step."""

    def __init__(self) -> None:
        self.steps: list[dict[str, Any]] = []

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        experience = batch["experience"]
        texts = experience.completions.texts
        G = experience.group_size
        mine = {p.index: texts[i * G : i * G + G] for i, p in enumerate(experience.prompts.prompts)}
        metrics = {key: float(value) for key, value in trainer.callback_metrics.items()}
        merged = {key: value for part in gather_objects(mine) for key, value in part.items()}
        self.steps.append({"metrics": metrics, "texts": dict(sorted(merged.items()))})


class Signal(Callback):
    """Sends SIGTERM to its own process in the middle of a step."""

    def __init__(self, rank: int, step: int) -> None:
        self.rank, self.step = rank, step

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if trainer.global_rank == self.rank and trainer.global_step == self.step - 1:
            os.kill(os.getpid(), signal.SIGTERM)


def run_case(case: Case, tiny_policy: Path, prompts_file: Path, folder: Path, world: int) -> None:
    """Train; rank 0 leaves ``<name>.pt`` (what was recorded) and ``<name>.ckpt`` in ``folder``."""
    start = perf_counter()
    torch.manual_seed(0)
    options: dict[str, Any] = {
        "policy": PolicyConfig(str(tiny_policy), **({"lora": LORA if case.lora else None} | case.policy)),
        "rewards": [FunctionReward("tests.ranks.mixed", name="mixed")],
        "loss": ClippedSurrogate(kl_coef=case.kl_coef),
        "optimizer": lambda params: torch.optim.AdamW(params, lr=1e-3, eps=1e-3),
        "max_grad_norm": 0.1,
        "micro_batch_tokens": 60,
        "sampling": SamplingConfig(max_new_tokens=24, stop_strings=("a", "e", "W")),
    }
    if case.classifier is not None:
        options["rewards"].append(SequenceClassifierReward(case.classifier, micro_batch_size=3))
    module = make_module(tiny_policy, **(options | case.module))
    record = Record()
    trainer = make_trainer(
        folder / case.name.split(".")[0],  # runs that differ after the dot share their folder
        callbacks=[record] if case.stop is None else [record, Signal(*case.stop)],
        strategy=FSDP2Strategy(**case.strategy_options) if case.strategy_options else case.strategy,
        devices=world,
        max_steps=case.max_steps,
        enable_checkpointing=False,
        **case.trainer,
    )
    data = make_data(prompts_file, prompts_per_step=case.prompts_per_step, **case.data)
    path = last_checkpoint_of(trainer) if case.resume == "last" else case.resume and folder / case.resume
    if case.stop is not None:
        with pytest.raises(SystemExit, match=str(128 + signal.SIGTERM)):
            trainer.fit(module, data)
        return
    if case.fails:
        with pytest.raises(Exception) as error:  # noqa: PT011 - of any kind
            trainer.fit(module, data)
        report = f"{type(error.value).__name__} after {perf_counter() - start:.1f} s: {error.value}"
        (folder / f"{case.name}.rank{trainer.global_rank}.txt").write_text(report)
        return
    trainer.fit(module, data, ckpt_path=path)
    trainer.save_checkpoint(folder / f"{case.name}.ckpt")
    if case.export:
        export_policy(module.policy, module.tokenizer, folder / f"{case.name}-export", is_writer=trainer.is_global_zero)
    trainer.strategy.barrier()
    if trainer.is_global_zero:
        validation = {key: float(value) for key, value in trainer.callback_metrics.items() if key.startswith("val/")}
        torch.save({"steps": record.steps, "validation": validation}, folder / f"{case.name}.pt")


def sharded_policy(config: PolicyConfig, dtype: torch.dtype | None = None) -> nn.Module:
    """The policy over two ranks, gathered in ``dtype``; to be called by both."""
    model: nn.Module = load_policy(config)
    shard_fsdp2(model, init_device_mesh("cpu", (2,)), dtype=dtype)
    return model


Check = Callable[[int, Path], dict[str, Any]]
"""(rank, folder of the policy) → what is to be asserted; runs after the first case, which starts the process group."""


def launch(cases: Sequence[Case | Check], tiny_policy: Path, prompts_file: Path, folder: Path, world: int) -> None:
    """Run ``cases`` one after the other on ``world`` processes; what a check returns goes to ``<name>.<rank>.pt``."""
    start_processes(_rank, (cases, tiny_policy, prompts_file, folder, world, free_port()), world)


def start_processes(function: Callable[..., object], arguments: tuple[Any, ...], world: int) -> None:
    """Call ``function`` with rank and ``arguments`` on ``world`` processes, forked from one that has imported all."""
    multiprocessing.set_forkserver_preload(["tests.ranks"])
    arguments = function, dict(os.environ), arguments  # that process has the variables of when it was started
    mp.start_processes(_forked, arguments, nprocs=world, start_method="forkserver")


def _forked(rank: int, function: Callable[..., object], variables: dict[str, str], arguments: tuple[Any, ...]) -> None:
    os.environ.clear()
    os.environ.update(variables)
    function(rank, *arguments)


def _rank(
    rank: int, cases: Sequence[Case | Check], tiny_policy: Path, prompts_file: Path, folder: Path, world: int, port: int
) -> None:
    """A process as torchrun would have started it."""
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "GROUP_RANK": "0",
        "WORLD_SIZE": str(world),
        "LOCAL_WORLD_SIZE": str(world),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "TORCHELASTIC_RUN_ID": "test",
    }
    torch.set_num_threads(1)
    for case in cases:
        start, name = perf_counter(), case.name if isinstance(case, Case) else case.__name__
        try:
            if isinstance(case, Case):
                run_case(case, tiny_policy, prompts_file, folder, world)
            else:
                torch.save(case(rank, tiny_policy), folder / f"{name}.{rank}.pt")
            print(f"rank {rank} {name} {perf_counter() - start:.1f} s")
        except BaseException:
            (folder / f"{name}.rank{rank}.error").write_text(traceback.format_exc())
            raise


def read(folder: Path, name: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """What was recorded, and the checkpoint."""
    return torch.load(folder / f"{name}.pt"), torch.load(folder / f"{name}.ckpt", weights_only=True)


def assert_same_run(folder: Path, name: str, expected: str, tolerance: float = 1e-5) -> None:
    (record, checkpoint), (record_1, checkpoint_1) = read(folder, name), read(folder, expected)
    steps = record["steps"]
    for step, step_1 in zip(steps, record_1["steps"][-len(steps) :], strict=True):
        assert step["texts"] == step_1["texts"]
        for key in ("train/loss", "train/grad_norm", "reward/mean", "reward/nan_fraction"):
            assert step["metrics"][key] == pytest.approx(step_1["metrics"][key], abs=tolerance), key
    if len(steps) == len(record_1["steps"]):  # else the run was resumed after its last validation
        assert record["validation"] and record["validation"] == pytest.approx(record_1["validation"], abs=tolerance)
    assert_same_tensors(checkpoint["state_dict"], checkpoint_1["state_dict"], tolerance)
    moments, moments_1 = (c["optimizer_states"][0]["state"] for c in (checkpoint, checkpoint_1))
    assert moments.keys() == moments_1.keys()
    for number, values in moments_1.items():
        assert_same_tensors(moments[number], values, tolerance)


def assert_same_tensors(actual: dict[str, Any], expected: dict[str, Any], tolerance: float) -> None:
    assert actual.keys() == expected.keys()
    for key, value in expected.items():
        torch.testing.assert_close(actual[key], value, rtol=0, atol=tolerance)

"""Small runs that a fault is done to: forked from this process, which has paid for the imports."""

import os
import sys
import traceback
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from gopo_lightning.distributed.checkpoints import last_checkpoint_of, newest
from gopo_lightning.rewards import FunctionReward
from tests.conftest import prompts_file as make_prompts
from tests.conftest import tiny_policy as make_policy
from tests.runs import make_data, make_module, make_trainer

STEPS = 36


@dataclass
class Row:
    """A line of the table."""

    fault: str
    tried: int = 0
    survived: int = 0
    lost_steps: int = 0
    notes: list[str] = field(default_factory=list)


class Lab:
    """A policy, prompts, and a folder per run."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        factory = _Folders(folder)
        self.policy: Path = make_policy.__wrapped__(factory)
        self.prompts: Path = make_prompts.__wrapped__(factory)

    def train(
        self,
        name: str,
        reward: str = "tests.runs.count_vowels",
        timeout_seconds: float | None = None,
        prompts: Path | None = None,
        on_data_change: str = "refuse",
    ) -> None:
        """Go on with run ``name`` up to its last step; in this process."""
        keeper = ModelCheckpoint(every_n_train_steps=1, save_top_k=2, monitor="step", mode="max", filename="{step}")
        trainer = make_trainer(self.folder / name, callbacks=[keeper], max_steps=STEPS, val_check_interval=6)
        module = make_module(
            self.policy,
            rewards=[FunctionReward(reward, name="reward")],
            optimizer=lambda parameters: torch.optim.AdamW(parameters, lr=1e-2),
            timeout_seconds=timeout_seconds,
        )
        data = make_data(prompts or self.prompts, on_data_change=on_data_change)
        trainer.fit(module, data, ckpt_path=last_checkpoint_of(trainer))

    def fork(self, name: str, **options: Any) -> int:
        """The process id of a child that trains; it exits with 1 where training raises."""
        child = os.fork()
        if child:
            return child
        with (self.folder / f"{name}.log").open("a") as log:
            os.dup2(log.fileno(), 1)
            os.dup2(log.fileno(), 2)
            code = 1
            try:
                self.train(name, **options)
                code = 0
            finally:
                traceback.print_exc()
                sys.stderr.flush()
                os._exit(code)

    def last(self, name: str) -> Path | None:
        """The newest whole checkpoint of run ``name``."""
        return newest((self.folder / name).rglob("*.ckpt"))

    def step(self, name: str) -> int:
        """Of the newest whole checkpoint."""
        path = self.last(name)
        return 0 if path is None else int(torch.load(path, weights_only=True)["global_step"])

    def said(self, name: str) -> str:
        """What the run printed."""
        return (self.folder / f"{name}.log").read_text()

    def same_end(self, name: str) -> bool:
        """Whether run ``name`` ended like the undisturbed one."""
        ends = []
        for run in (name, "whole"):
            path = self.last(run)
            if path is None:
                return False
            checkpoint = torch.load(path, weights_only=True)
            moments = checkpoint["optimizer_states"][0]["state"].values()
            tensors = [*checkpoint["state_dict"].values(), *(value for values in moments for value in values.values())]
            ends.append((checkpoint["global_step"], torch.cat([tensor.flatten().double() for tensor in tensors])))
        return ends[0][0] == ends[1][0] == STEPS and torch.equal(ends[0][1], ends[1][1])


class _Folders:
    """Stands in for pytest's factory of temporary folders."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def mktemp(self, name: str) -> Path:
        (self.folder / name).mkdir()
        return self.folder / name


def wait(child: int) -> int:
    """Its exit code, negative for a signal."""
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])

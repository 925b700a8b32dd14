"""Does each fault to a small run, goes on with the last checkpoint, and compares the end with an undisturbed run.

A fault is *survived* if the run ends with the same weights, optimiser state and text, bit for bit. Lost steps are those
that had been done and had to be done again. Runs are forked from this process, which has paid for the imports.
"""

import os
import random
import resource
import signal
import socket
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import yaml
from lightning.pytorch.callbacks import ModelCheckpoint

from gopo_lightning.checkpoints import last_of, newest
from gopo_lightning.rewards import FunctionReward
from tests.conftest import prompts_file as make_prompts
from tests.conftest import tiny_policy as make_policy
from tests.runs import count_vowels, make_data, make_module, make_trainer

STEPS = 36
KILLS = 20
MAX_RANK_SECONDS = 60.0

attempts = 0
"""Calls of the faulty reward in this process."""


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

    def train(self, name: str, reward: str = "tests.runs.count_vowels") -> None:
        """Go on with run ``name`` up to its last step; in this process."""
        keeper = ModelCheckpoint(every_n_train_steps=1, save_top_k=2, monitor="step", mode="max", filename="{step}")
        trainer = make_trainer(self.folder / name, callbacks=[keeper], max_steps=STEPS, val_check_interval=6)
        module = make_module(
            self.policy,
            rewards=[FunctionReward(reward, name="reward")],
            optimizer=lambda parameters: torch.optim.AdamW(parameters, lr=1e-2),
        )
        trainer.fit(module, make_data(self.prompts), ckpt_path=last_of(trainer))

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


def kill_at_random(lab: Lab) -> Row:
    """SIGKILL, 20 times over one run."""
    row, rng = Row("kill -9 at a random moment"), random.Random(0)
    while row.tried < KILLS:
        start, child = lab.step("killed"), lab.fork("killed")
        deadline = time.monotonic() + 60
        while lab.step("killed") == start and time.monotonic() < deadline and row.tried % 2:
            time.sleep(0.01)  # one of two lives makes progress, the other dies wherever it is
        time.sleep(rng.uniform(0, 0.3))
        os.kill(child, signal.SIGKILL)
        if wait(child) == 0 or lab.step("killed") == STEPS:
            row.notes.append(f"the run was over after {row.tried} kills")
            break
        row.tried += 1
        row.lost_steps += 1  # every step is saved
    row.notes.append("lost: at most the step under way")
    code = wait(lab.fork("killed"))
    row.survived = row.tried if code == 0 and lab.same_end("killed") else 0
    return row


def torn(lab: Lab) -> Row:
    """The newest checkpoint is cut at a random byte: the one before it is taken."""
    row, rng = Row("checkpoint cut at a random byte"), random.Random(1)
    wait(lab.fork("torn"))
    for _ in range(5):
        row.tried += 1
        path = lab.last("torn")
        assert path is not None
        content = path.read_bytes()
        path.write_bytes(content[: rng.randrange(len(content))])
        before = lab.step("torn")
        row.lost_steps += STEPS - before
        row.survived += wait(lab.fork("torn")) == 0 and lab.same_end("torn") and before > 0
    return row


def failing(function: str, fault: str) -> Callable[[Lab], Row]:
    """A reward source that fails at its third call: the run ends with 1, and goes on once it is mended."""

    def run(lab: Lab) -> Row:
        row, name = Row(fault, tried=1), function.rsplit(".", 1)[1]
        code = wait(lab.fork(name, reward=function))
        kept = lab.step(name)
        row.survived = int(code == 1 and kept > 0 and wait(lab.fork(name)) == 0 and lab.same_end(name))
        return row

    return run


def raises(prompts: list[str], completions: list[str]) -> list[float]:
    """A reward that raises at its fourth call."""
    global attempts
    attempts += 1
    if attempts == 4:
        raise ConnectionError("the reward server is gone")
    return count_vowels(prompts, completions)


def miscounts(prompts: list[str], completions: list[str]) -> list[float]:
    """A reward that leaves one completion out at its fourth call."""
    global attempts
    attempts += 1
    return count_vowels(prompts, completions)[int(attempts == 4) :]


def all_nan(prompts: list[str], completions: list[str]) -> list[float | None]:
    """No score for anything."""
    return [None] * len(completions)


def nan_scores(lab: Lab) -> Row:
    """Nothing has a score: nothing is learnt, and the run ends well."""
    row = Row("reward is NaN throughout", tried=1)
    code = wait(lab.fork("nan", reward="tests.faults.__main__.all_nan"))
    row.survived = int(code == 0 and lab.step("nan") == STEPS)
    return row


def full_disk(lab: Lab) -> Row:
    """Files may not grow beyond half a checkpoint: the run ends with 1, the checkpoint before stays, and it goes on."""
    row = Row("disk full while saving")
    kept = 0
    for _ in range(3):
        child = lab.fork("disk")
        while lab.step("disk") < kept + 2:
            time.sleep(0.01)
        path = lab.last("disk")
        assert path is not None
        half = path.stat().st_size // 2
        resource.prlimit(child, resource.RLIMIT_FSIZE, (half, half))
        signalled = wait(child)
        row.tried += 1
        row.survived += signalled != 0 and lab.step("disk") >= kept + 2
        kept = lab.step("disk")
    if wait(lab.fork("disk")) != 0 or not lab.same_end("disk"):
        row.survived = 0
    return row


def peer_death(launcher: str) -> Callable[[Lab], Row]:
    """SIGKILL to one of two ranks: the whole job ends, not with 0, within a minute, and its checkpoint is whole."""

    def run(lab: Lab) -> Row:
        row = Row(f"one rank killed ({launcher})", tried=1)
        config = _write_config(lab, launcher)
        fit = ["-m", "gopo_lightning", "fit", "--config", str(config), "--ckpt_path", "last"]
        command = [sys.executable, *fit, "--trainer.devices=2"]
        if launcher == "torchrun, two nodes":
            with socket.socket() as probe:
                probe.bind(("127.0.0.1", 0))
                endpoint = f"127.0.0.1:{probe.getsockname()[1]}"
            torchrun = [sys.executable, "-m", "torch.distributed.run", "--nnodes=2", "--nproc-per-node=1"]
            torchrun += ["--rdzv-backend=c10d", f"--rdzv-endpoint={endpoint}", "--rdzv-conf=join_timeout=60"]
            command = [*torchrun, *fit, "--trainer.devices=1", "--trainer.num_nodes=2"]
        jobs = [_start(command, lab, launcher) for _ in range(1 + launcher.startswith("torchrun"))]
        while lab.step(launcher) < 2 and all(job.poll() is None for job in jobs):
            time.sleep(0.2)
        kept, victim = lab.step(launcher), _ranks(jobs[-1].pid)[-1]
        os.kill(victim, signal.SIGKILL)
        start = time.monotonic()
        try:
            codes = [job.wait(timeout=MAX_RANK_SECONDS - (time.monotonic() - start)) for job in jobs]
        except subprocess.TimeoutExpired:
            codes = [0]
        seconds = time.monotonic() - start
        for pid in [pid for job in jobs for pid in (*_ranks(job.pid), job.pid) if _alive(pid)]:
            os.kill(pid, signal.SIGKILL)
        row.notes.append(f"ended after {seconds:.0f} s with {codes}, at step {kept}")
        advised = "with --ckpt_path last" in (lab.folder / f"{launcher}.log").read_text()
        row.notes.append("says what to do" if advised else "says nothing")
        row.survived = int(all(codes) and seconds < MAX_RANK_SECONDS and lab.step(launcher) >= kept >= 2)
        return row

    return run


def _start(command: list[str], lab: Lab, name: str) -> subprocess.Popen[bytes]:
    with (lab.folder / f"{name}.log").open("a") as log:
        return subprocess.Popen(command, stdout=log, stderr=log)


def _ranks(pid: int) -> list[int]:
    """Processes started by ``pid``."""
    path = Path(f"/proc/{pid}/task/{pid}/children")
    return [int(child) for child in path.read_text().split()] if path.exists() else []


def _alive(pid: int) -> bool:
    path = Path(f"/proc/{pid}/stat")
    return path.exists() and path.read_text().split()[2] != "Z"


def _write_config(lab: Lab, name: str) -> Path:
    logger = {"class_path": "TensorBoardLogger", "init_args": {"save_dir": str(lab.folder), "name": name}}
    keeper = {"class_path": "ModelCheckpoint", "init_args": {"every_n_train_steps": 1}}
    reward = {
        "class_path": "gopo_lightning.rewards.FunctionReward",
        "init_args": {"function": "tests.runs.count_vowels", "name": "vowels"},
    }
    module = {
        "policy": {"name": str(lab.policy)},
        "rewards": [reward],
        "sampling": {"max_new_tokens": 8},
        "num_completions": 4,
    }
    values = {
        "trainer": {
            "accelerator": "cpu",
            "strategy": "ddp",
            "max_steps": 100000,
            "logger": logger,
            "callbacks": [keeper],
        },
        "model": {"class_path": "gopo_lightning.GOPOModule", "init_args": module},
        "data": {
            "class_path": "gopo_lightning.PromptDataModule",
            "init_args": {"train": {"path": str(lab.prompts)}, "prompts_per_step": 4},
        },
    }
    path = lab.folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump(values))
    return path


def main() -> int:
    """Run all; 1 if one was not survived."""
    torch.set_num_threads(1)
    faults = [
        kill_at_random,
        torn,
        failing("tests.faults.__main__.raises", "reward raises"),
        failing("tests.faults.__main__.miscounts", "reward of the wrong count"),
        nan_scores,
        full_disk,
        peer_death("subprocesses"),
        peer_death("torchrun, two nodes"),
    ]
    with tempfile.TemporaryDirectory() as folder:
        lab = Lab(Path(folder))
        assert wait(lab.fork("whole")) == 0, (lab.folder / "whole.log").read_text()
        print(f"{'fault':38} {'tried':>6} {'survived':>9} {'lost steps':>11}")
        good = True
        for fault in faults:
            row = fault(lab)
            good &= row.survived == row.tried
            print(
                f"{row.fault:38} {row.tried:6} {row.survived:9} {row.lost_steps:11}  {'; '.join(row.notes)}", flush=True
            )
            if row.survived < row.tried:
                for log in lab.folder.glob("*.log"):
                    print(f"--- {log.name}\n{log.read_text()[-1500:]}")
    return int(not good)


if __name__ == "__main__":
    sys.exit(main())

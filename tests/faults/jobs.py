"""Faults of one rank of two, in jobs that are started as users start them: all ranks end within a minute."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import yaml

from tests.faults.lab import Lab, Row
from tests.ports import free_port
from tests.runs import grouped

MAX_SECONDS = 60.0
TIMEOUT_SECONDS = 5.0
TORCHRUN = Path(__file__).parents[2] / "scripts" / "torchrun.sh"


def peer_death(launcher: str) -> Callable[[Lab], Row]:
    """SIGKILL to one of two ranks: the whole job ends, not with 0, within a minute, and its checkpoint is whole."""

    def run(lab: Lab) -> Row:
        row = Row(f"one rank killed ({launcher})", tried=1)
        if launcher == "torchrun, two nodes":
            command, nodes, environment = torchrun_node(_write_config(lab, launcher))
        else:
            command, nodes, environment = _fit(_write_config(lab, launcher)), 1, {}
        jobs = [_start(command, lab, launcher, environment) for _ in range(nodes)]
        while lab.step(launcher) < 2 and all(job.poll() is None for job in jobs):
            time.sleep(0.2)
        kept, victim = lab.step(launcher), _children(jobs[-1].pid)[-1]
        os.kill(victim, signal.SIGKILL)
        codes, seconds = _wait(jobs, time.time())
        row.notes.append(f"ended after {seconds:.0f} s with {codes}, at step {kept}")
        advised = "with --ckpt_path last" in lab.said(launcher)
        row.notes.append("says what to do" if advised else "says nothing")
        row.survived = int(all(codes) and advised and lab.step(launcher) >= kept >= 2)
        return row

    return run


def ctrl_c(launcher: str) -> Callable[[Lab], Row]:
    """SIGINT to every process, as a terminal sends it: the job saves what it has, and not with 0 ends."""

    def run(lab: Lab) -> Row:
        name = f"ctrl-c {launcher}"
        row = Row(f"Ctrl-C ({launcher})", tried=1)
        config = _write_config(lab, name)
        if launcher == "torchrun":
            command, _, environment = torchrun_node(config)
            command, environment = [*command, "--trainer.devices=2"], environment | {"NODES": "1", "GPUS": "2"}
        else:
            command, environment = _fit(config), {}
        job = _start(command, lab, name, environment, foreground=True)
        while lab.step(name) < 2 and job.poll() is None:
            time.sleep(0.2)
        os.killpg(job.pid, signal.SIGINT)
        codes, seconds = _wait([job], time.time())
        saved = list((lab.folder / name).rglob("interrupted-step=*.ckpt"))
        row.notes.append(f"ended after {seconds:.0f} s with {codes}, {'saved' if saved else 'nothing saved'}")
        row.survived = int(all(codes) and len(saved) == 1 and lab.last(name) == saved[0].resolve())
        return row

    return run


def rank_error(function: str, fault: str, reason: str) -> Callable[[Lab], Row]:
    """A reward fails on rank 1 alone: both ranks end with 1 within a minute, and both say why."""

    def run(lab: Lab) -> Row:
        row, marker = Row(fault, tried=1), lab.folder / f"{function}.marker"
        config = _write_config(lab, function, f"tests.faults.rewards.{function}")
        codes, _ = _wait([job := _start(_fit(config), lab, function, {"FAULT_FILE": str(marker)})], time.time(), 300)
        seconds = time.time() - marker.stat().st_mtime
        row.notes.append(f"ended {seconds:.0f} s after it with {codes[0]}, at step {lab.step(function)}")
        said = lab.said(function)
        both = reason in said and "error: rank 1 failed in reward source" in said
        row.notes.append("both ranks say why" if both else "a rank says nothing")
        row.survived = int(codes == [1] and job.returncode == 1 and both and seconds < MAX_SECONDS)
        return row

    return run


def torchrun_node(config: Path) -> tuple[list[str], int, dict[str, str]]:
    """The command of each of two machines, how many there are, and their environment: scripts/torchrun.sh."""
    endpoint = f"127.0.0.1:{free_port()}"
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    return (
        ["sh", str(TORCHRUN), "--config", str(config)],
        2,
        {
            "NODES": "2",
            "GPUS": "1",
            "RENDEZVOUS": endpoint,
            "PATH": path,
        },
    )


def _fit(config: Path) -> list[str]:
    fit = ["-m", "gopo_lightning", "fit", "--config", str(config), "--ckpt_path", "last", "--trainer.devices=2"]
    return [sys.executable, *fit]


def _start(
    command: list[str], lab: Lab, name: str, environment: dict[str, str], *, foreground: bool = False
) -> subprocess.Popen[bytes]:
    """``foreground``: a group of its own, which hears Ctrl-C."""
    with (lab.folder / f"{name}.log").open("a") as log:
        return subprocess.Popen(
            command,
            stdout=log,
            stderr=log,
            env=os.environ | environment,
            start_new_session=foreground,
            preexec_fn=(lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)) if foreground else None,
        )


def _wait(
    jobs: list[subprocess.Popen[bytes]], start: float, limit_seconds: float = MAX_SECONDS
) -> tuple[list[int], float]:
    """Exit codes (0 for one that had to be killed) and seconds; nothing is left running."""
    try:
        codes = [job.wait(timeout=limit_seconds - (time.time() - start)) for job in jobs]
    except subprocess.TimeoutExpired:
        codes = [0]
    seconds = time.time() - start
    for pid in [pid for job in jobs for pid in (*_children(job.pid), job.pid) if _alive(pid)]:
        os.kill(pid, signal.SIGKILL)
    return codes, seconds


def _children(pid: int) -> list[int]:
    """Processes started by ``pid``."""
    path = Path(f"/proc/{pid}/task/{pid}/children")
    return [int(child) for child in path.read_text().split()] if path.exists() else []


def _alive(pid: int) -> bool:
    path = Path(f"/proc/{pid}/stat")
    return path.exists() and path.read_text().split()[2] != "Z"


def _write_config(lab: Lab, name: str, function: str = "tests.runs.count_vowels") -> Path:
    path = lab.folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump(config_values(lab.folder, name, lab.policy, lab.prompts, function)))
    return path


def config_values(folder: Path, name: str, policy: Path, prompts: Path, function: str) -> dict[str, object]:
    """An endless run under DDP that saves every step."""
    logger = {"class_path": "TensorBoardLogger", "init_args": {"save_dir": str(folder), "name": name}}
    keeper = {"class_path": "ModelCheckpoint", "init_args": {"every_n_train_steps": 1}}
    reward = {
        "class_path": "gopo_lightning.rewards.FunctionReward",
        "init_args": {"function": function, "name": "vowels"},
    }
    module = {
        "policy": {"name": str(policy)},
        "rewards": [reward],
        "sampling": {"max_new_tokens": 8},
        "num_completions": 4,
        "timeout_seconds": TIMEOUT_SECONDS,
    }
    return {
        "trainer": {
            "accelerator": "cpu",
            "strategy": "ddp",
            "max_steps": 100000,
            "logger": logger,
            "callbacks": [keeper],
        },
        "model": {"class_path": "gopo_lightning.GOPOModule", "init_args": grouped(module)},
        "data": {
            "class_path": "gopo_lightning.PromptDataModule",
            "init_args": {"train": {"path": str(prompts)}, "prompts_per_step": 4},
        },
    }

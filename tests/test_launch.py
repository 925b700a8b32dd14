"""The launchers of scripts/ train like plain DDP: torchrun on two machines (here: two agents on loopback), and SLURM
(here: a stand-in for srun that starts the tasks with SLURM's variables).
"""

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from tests.faults.jobs import config_values, torchrun_node
from tests.runs import count_vowels
from tests.test_cli import gopo
from tests.test_resume import assert_identical

SBATCH = Path(__file__).parents[1] / "scripts" / "slurm.sbatch"
SRUN = """#!/bin/bash
# Starts a task per node, as srun does, and kills all when one fails (--kill-on-bad-exit=1).
[ "$1" = --kill-on-bad-exit=1 ] && shift
for node in 0 1; do
  SLURM_PROCID=$node SLURM_NODEID=$node SLURM_LOCALID=0 "$@" &
done
wait -n; first=$?
[ $first -eq 0 ] || { sleep 20; kill $(jobs -p) 2>/dev/null; }
wait
exit $first
"""

calls = 0


def preempted(prompts: list[str], completions: list[str]) -> list[float]:
    """SLURM sends SIGUSR1 to the second task in the middle of its second step, once."""
    global calls
    calls += 1
    marker = Path(os.environ["PREEMPTED"])
    if os.environ["SLURM_PROCID"] == "1" and calls == 2 and not marker.exists():
        marker.touch()
        os.kill(os.getpid(), signal.SIGUSR1)
    return count_vowels(prompts, completions)


def final(folder: Path, name: str) -> dict[str, Any]:
    """The checkpoint of the last step of run ``name``."""
    (path,) = (folder / name).rglob("epoch=*-step=4.ckpt")
    return torch.load(path, weights_only=True)


def write_config(folder: Path, name: str, policy: Path, prompts: Path, reward: str = "tests.runs.count_vowels") -> Path:
    """Four steps on two ranks."""
    values: dict[str, Any] = config_values(folder, name, policy, prompts, reward)
    values["trainer"] |= {"max_steps": 4}
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump(values))
    return path


@pytest.fixture(scope="module")
def plain(tiny_policy: Path, prompts_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run that Lightning launched by itself."""
    folder = tmp_path_factory.mktemp("launch")
    gopo("fit", "--config", str(write_config(folder, "plain", tiny_policy, prompts_file)), "--trainer.devices=2")
    return folder


def assert_same(folder: Path, name: str) -> None:
    run, expected = final(folder, name), final(folder, "plain")
    for key in ("state_dict", "optimizer_states", "lr_schedulers"):
        assert_identical(run[key], expected[key])


def test_two_machines_of_torchrun_train_like_one(plain: Path, tiny_policy: Path, prompts_file: Path) -> None:
    command, nodes, environment = torchrun_node(write_config(plain, "torchrun", tiny_policy, prompts_file))
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    jobs = [subprocess.Popen(command, env=os.environ | environment, **pipes) for _ in range(nodes)]
    said = [job.communicate(timeout=300)[0] for job in jobs]
    assert [job.returncode for job in jobs] == [0, 0], said
    assert_same(plain, "torchrun")


def test_torchrun_without_gpus_says_what_to_set(tmp_path: Path) -> None:
    command, _, environment = torchrun_node(tmp_path / "config.yaml")
    result = subprocess.run(command, env=os.environ | environment | {"GPUS": "0"}, capture_output=True, text=True)
    assert result.returncode == 2 and "set GPUS" in result.stderr


def test_a_slurm_job_is_requeued_and_goes_on_like_one_that_was_not(
    plain: Path, tiny_policy: Path, prompts_file: Path
) -> None:
    assert subprocess.run(["bash", "-n", str(SBATCH)]).returncode == 0
    config = write_config(plain, "slurm", tiny_policy, prompts_file, "tests.test_launch.preempted")
    tools = plain / "bin"
    tools.mkdir()
    for name, text in (("srun", SRUN), ("scontrol", f"#!/bin/sh\necho $@ >> {plain}/scontrol.calls\n")):
        (tools / name).write_text(text)
        (tools / name).chmod(0o755)
    environment = {
        "PATH": os.pathsep.join([str(tools), str(Path(sys.executable).parent), os.environ["PATH"]]),
        "PREEMPTED": str(plain / "preempted"),
        "MASTER_PORT": "0",
        "SLURM_JOB_ID": "17",
        "SLURM_JOB_NAME": "gopo",
        "SLURM_NTASKS": "2",
        "SLURM_NTASKS_PER_NODE": "1",
        "SLURM_NNODES": "2",
        "SLURM_NODELIST": "127.0.0.1",
        "SLURM_JOB_NODELIST": "127.0.0.1",
    }
    for expected in (128 + signal.SIGUSR1, 0):
        environment["MASTER_PORT"] = torchrun_node(config)[2]["RENDEZVOUS"].rpartition(":")[2]
        job = subprocess.run(
            ["bash", str(SBATCH), "--config", str(config)],
            env=os.environ | environment,
            capture_output=True,
            text=True,
            timeout=300,
        )
        assert job.returncode == expected, job.stdout + job.stderr
    assert (plain / "scontrol.calls").read_text() == "requeue 17\n"
    assert list((plain / "slurm" / "version_0").rglob("interrupted-step=2.ckpt"))
    assert_same(plain, "slurm")

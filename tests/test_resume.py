"""Stop a run anywhere, go on, and end where the uninterrupted run ends: weights, optimiser, curves and text."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint

from gopo_lightning.commands.lightning_cli import run
from gopo_lightning.distributed.checkpoints import last_checkpoint_of, newest
from gopo_lightning.policy.model import PolicyConfig
from gopo_lightning.training.callbacks.save_on_signal import SaveOnSignal
from tests.faults.jobs import config_values
from tests.ranks import LORA, Record
from tests.runs import make_data, make_module, make_trainer


class Killed(BaseException):
    """Stands for a kill: nothing catches it, nothing saves."""


class Die(Callback):
    """Ends the run in one of its hooks at one of its steps."""

    def __init__(self, hook: str, step: int) -> None:
        self.step = step
        setattr(self, hook, self.die)

    def die(self, trainer: Any, *_: Any, **__: Any) -> None:
        if trainer.global_step == self.step:
            raise Killed


def train(folder: Path, tiny_policy: Path, prompts_file: Path, *callbacks: Callback, **options: Any) -> dict[str, Any]:
    """Go on from the last checkpoint, if there is one; what the run logged by step, and its last checkpoint."""
    record, curves = Record(), Curves()
    keeper = ModelCheckpoint(every_n_train_steps=1, save_top_k=-1, filename="{step}")
    trainer = make_trainer(folder, callbacks=[record, curves, keeper, *callbacks], max_steps=5, val_check_interval=2)
    module = make_module(tiny_policy, optimizer=lambda p: torch.optim.AdamW(p, lr=1e-2), warmup_steps=3, **options)
    trainer.fit(module, make_data(prompts_file), ckpt_path=last_checkpoint_of(trainer))
    checkpoint = torch.load(last_checkpoint_of(trainer), weights_only=True)
    return {"texts": [step["texts"] for step in record.steps], "curves": curves.values, "checkpoint": checkpoint}


class Curves(Callback):
    """The validation's metrics by step."""

    def __init__(self) -> None:
        self.values: dict[int, dict[str, float]] = {}

    def on_validation_end(self, trainer: Any, pl_module: Any) -> None:
        metrics = {key: float(value) for key, value in trainer.callback_metrics.items() if key.startswith("val/")}
        self.values[trainer.global_step] = metrics


@pytest.mark.parametrize(
    ("hook", "step"),
    [
        ("on_train_batch_start", 1),  # in mid-epoch
        ("on_train_batch_start", 3),  # between two epochs
        ("on_validation_batch_start", 2),  # in the middle of a validation
        ("on_validation_end", 4),
        ("on_train_end", 5),
    ],
)
def test_a_killed_run_ends_like_one_that_was_not(
    hook: str, step: int, tiny_policy: Path, prompts_file: Path, tmp_path: Path
) -> None:
    whole = train(tmp_path / "whole", tiny_policy, prompts_file)
    with pytest.raises(Killed):
        train(tmp_path / "parts", tiny_policy, prompts_file, Die(hook, step))
    rest = train(tmp_path / "parts", tiny_policy, prompts_file)
    assert rest["texts"] == whole["texts"][len(whole["texts"]) - len(rest["texts"]) :]
    for key in ("state_dict", "optimizer_states", "lr_schedulers"):
        assert_identical(rest["checkpoint"][key], whole["checkpoint"][key])
    assert rest["curves"] == {step: whole["curves"][step] for step in rest["curves"]}
    if hook == "on_validation_batch_start":
        assert 2 in rest["curves"]  # the interrupted validation is made up for


def assert_identical(actual: Any, expected: Any) -> None:
    torch.testing.assert_close(actual, expected, rtol=0, atol=0) if isinstance(expected, torch.Tensor) else None
    if isinstance(expected, dict):
        assert actual.keys() == expected.keys()
        for key, value in expected.items():
            assert_identical(actual[key], value)
    elif isinstance(expected, list):
        for a, b in zip(actual, expected, strict=True):
            assert_identical(a, b)
    elif not isinstance(expected, torch.Tensor):
        assert actual == expected


def test_another_policy_is_refused(tiny_policy: Path, prompts_file: Path, tmp_path: Path) -> None:
    train(tmp_path, tiny_policy, prompts_file, policy=PolicyConfig(str(tiny_policy), lora=LORA))
    with pytest.raises(ValueError, match="policy.lora.r 4 → absent"):
        train(tmp_path, tiny_policy, prompts_file)


def test_sigusr1_requeues_a_slurm_job_and_only_that(
    tiny_policy: Path, prompts_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scontrol = tmp_path / "bin" / "scontrol"
    scontrol.parent.mkdir()
    scontrol.write_text(f"#!/bin/sh\necho $@ >> {tmp_path}/calls\n")
    scontrol.chmod(0o755)
    monkeypatch.setenv("PATH", str(scontrol.parent), prepend=os.pathsep)
    before = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGUSR1)

    class Interrupt(Callback):
        def on_validation_start(self, trainer: Any, *_: Any, **__: Any) -> None:
            if trainer.global_step == 2:
                monkeypatch.setenv("SLURM_JOB_ID", "17")
                os.kill(os.getpid(), signal.SIGUSR1)

    with pytest.raises(SystemExit, match=str(128 + signal.SIGUSR1)):
        train(tmp_path, tiny_policy, prompts_file, Interrupt())
    assert (tmp_path / "calls").read_text() == "requeue 17\n"
    assert newest(tmp_path.rglob("*.ckpt")).name == "interrupted-step=2.ckpt"  # type: ignore[union-attr]
    assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGUSR1)) == before


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_second_signal_does_not_wait(number: signal.Signals) -> None:
    child = os.fork()
    if child == 0:
        signal.signal(number, SaveOnSignal()._note)
        os.kill(os.getpid(), number)
        os.kill(os.getpid(), number)
        os._exit(0)
    assert os.WTERMSIG(os.waitpid(child, 0)[1]) == number


def test_under_torchrun_the_echo_of_a_signal_is_no_second_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    callback = SaveOnSignal()
    callback._note(signal.SIGINT, None)
    callback._note(signal.SIGINT, None)  # would end this process
    assert callback._received == signal.SIGINT


def test_a_signal_that_the_shell_told_to_ignore_is_ignored(
    tiny_policy: Path, prompts_file: Path, tmp_path: Path
) -> None:
    class CtrlC(Callback):
        def on_train_batch_start(self, *_: Any, **__: Any) -> None:
            os.kill(os.getpid(), signal.SIGINT)

    before = signal.signal(signal.SIGINT, signal.SIG_IGN)  # as `command &` does in a script
    try:
        train(tmp_path, tiny_policy, prompts_file, CtrlC())
        assert signal.getsignal(signal.SIGINT) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)
    assert not list(tmp_path.rglob("interrupted*"))


class Waiting(Callback):
    """In the third step, until someone presses Ctrl-C."""

    def __init__(self, marker: str) -> None:
        self.marker = Path(marker)

    def on_train_batch_start(self, trainer: Any, *_: Any, **__: Any) -> None:
        """Only in the process that is to be interrupted."""
        if trainer.global_step == 2 and "GOPO_TEST_WAITS" in os.environ:
            self.marker.touch()
            signal.pause()


def test_ctrl_c_saves_and_the_run_goes_on_from_there(tiny_policy: Path, prompts_file: Path, tmp_path: Path) -> None:
    values: Any = config_values(tmp_path, "run", tiny_policy, prompts_file, "tests.runs.count_vowels")
    waiting = {"class_path": "tests.test_resume.Waiting", "init_args": {"marker": f"{tmp_path}/waits"}}
    values["trainer"] |= {"strategy": "auto", "max_steps": 4}
    values["trainer"]["callbacks"].append(waiting)
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(values))
    fit = ["fit", "--config", str(tmp_path / "config.yaml")]

    with (tmp_path / "said").open("w") as file:
        job = subprocess.Popen(
            [sys.executable, "-m", "gopo_lightning", *fit],
            env=os.environ | {"GOPO_TEST_WAITS": "1"},
            stdout=file,
            stderr=file,
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # as in the foreground of a terminal
        )
    deadline = time.monotonic() + 120
    while not (tmp_path / "waits").exists() and job.poll() is None and time.monotonic() < deadline:
        time.sleep(0.05)
    time.sleep(0.1)
    job.send_signal(signal.SIGINT)
    code, said = job.wait(timeout=60), (tmp_path / "said").read_text()
    assert code == 130, said
    (saved,) = tmp_path.rglob("interrupted-step=3.ckpt")
    assert "Ctrl-C: finishing this step or validation, then saving." in said
    assert f"saved as {saved}" in said and "with --ckpt_path last." in said and "weights_only" not in said

    rest, whole = run([*fit, "--ckpt_path=last"]), run([*fit, "--trainer.logger.init_args.name=whole"])
    assert rest.config_init["fit"]["ckpt_path"] == saved
    assert_identical(rest.model.state_dict(), whole.model.state_dict())

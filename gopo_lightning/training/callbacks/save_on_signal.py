"""A run that is told to stop (Ctrl-C, SIGTERM, SLURM's SIGUSR1) saves at the end of its batch, and can go on."""

import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import FrameType
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities.rank_zero import rank_zero_info

from gopo_lightning.distributed.checkpoints import step_of
from gopo_lightning.distributed.collectives import gather_objects
from gopo_lightning.distributed.run_folder import checkpoint_folder

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
_ECHO_SECONDS = 1.0
"""torchrun sends its workers a Ctrl-C that the terminal has sent them already."""


class SaveOnSignal(Callback):
    """Ends a fit that gets SIGINT (Ctrl-C), SIGTERM or SIGUSR1 on any rank: all ranks save together and exit.

    They do so with 128 + the signal, at the end of the step under way (rollout and updates) or of the validation under
    way. The checkpoint goes beside the others, as ``interrupted-step=<n>.ckpt``; ``--ckpt_path last`` finds it. In a
    SLURM job, SIGUSR1 also puts the job back into the queue. A second signal ends the process at once.

    It comes after all other callbacks, `ModelCheckpoint` too: what it saves knows of the best checkpoint so far, and of
    a validation that has just ended.

    (Lightning's own handlers save, or broadcast, from within the signal handler: in the middle of a step. Its Ctrl-C
    saves nothing.)
    """

    def __init__(self) -> None:
        self._received = 0
        self._received_at = 0.0
        self._previous: dict[signal.Signals, Any] = {}

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Take the last place."""
        others = [callback for callback in trainer.callbacks if callback is not self]  # type: ignore[attr-defined]
        trainer.callbacks = [*others, self]  # type: ignore[attr-defined]

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Take the signals over from Lightning, which registers its handlers just before."""
        if threading.current_thread() is threading.main_thread():
            heard = [number for number in SIGNALS if signal.getsignal(number) != signal.SIG_IGN]  # nohup, or `&`
            self._previous = {number: signal.signal(number, self._note) for number in heard}

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Give them back."""
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous = {}

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Give them back; where another rank may have died each rank says what to do, else rank 0 how to go on."""
        self.on_train_end(trainer, pl_module)
        if isinstance(exception, RuntimeError) and trainer.world_size > 1:
            print(
                f"rank {trainer.global_rank}: the run has ended. If another rank died, run the same command on all "
                "machines with --ckpt_path last; it resumes from the newest complete checkpoint.",
                file=sys.stderr,
            )
        elif isinstance(exception, Exception) and trainer.is_global_zero:
            folders = {
                folder for keeper in trainer.checkpoint_callbacks if (folder := getattr(keeper, "dirpath", None))
            }
            steps = [step_of(path) for folder in folders for path in Path(folder).rglob("*.ckpt")]
            saved = max((step for step in steps if step is not None), default=None)
            if saved is not None:
                print(
                    f"the run ended after step {trainer.global_step}, and its newest checkpoint is of step {saved}. To "
                    "go on from there, run the same command with --ckpt_path last.",
                    file=sys.stderr,
                )

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """All ranks look together whether one of them was told to stop."""
        self._stop_if_told(trainer)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """A validation may be long."""
        if trainer.state.fn == "fit":
            self._stop_if_told(trainer)

    def _note(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if self._received:
            if "TORCHELASTIC_RUN_ID" in os.environ and now - self._received_at < _ECHO_SECONDS:
                return
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
        self._received, self._received_at = number, now
        name, again = signal.Signals(number).name, "A second one"
        if number == signal.SIGINT:
            name, again = "Ctrl-C", "A second Ctrl-C"
        said = f"\n{name}: finishing this step or validation, then saving. {again} stops at once, without saving.\n"
        os.write(2, said.encode())  # to stderr; print may be at work below this handler

    def _stop_if_told(self, trainer: Trainer) -> None:
        number = max(gather_objects(self._received))
        if not number:
            return
        self._received = 0
        path = checkpoint_folder(trainer) / f"interrupted-step={trainer.global_step}.ckpt"
        trainer.save_checkpoint(path, weights_only=False)  # whole, optimiser and all
        reason = f"Stopped by {signal.Signals(number).name} at step {trainer.global_step}"
        rank_zero_info(f"{reason}, saved as {path}. To resume, run the same command with --ckpt_path last.")
        if number == signal.SIGUSR1 and trainer.is_global_zero:
            _requeue()
        trainer.strategy.barrier("SaveOnSignal")
        raise SystemExit(128 + number)


def _requeue() -> None:
    """Put this SLURM job back into the queue; nothing outside of one.

    Raises:
        CalledProcessError: SLURM refused.
    """
    job = os.environ.get("SLURM_JOB_ID")
    array, task = os.environ.get("SLURM_ARRAY_JOB_ID"), os.environ.get("SLURM_ARRAY_TASK_ID")
    if job is not None and shutil.which("scontrol"):
        subprocess.run(["scontrol", "requeue", f"{array}_{task}" if array and task else job], check=True)

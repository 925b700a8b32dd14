"""A full validation before the first step, so that every curve starts where the untrained policy stands."""

from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from gopo_lightning._compat import batches_begun, run_validation


class ValidateFirst(Callback):
    """Runs the validation loop at step 0 of ``fit``, and in a resumed run the one that its checkpoint was due for.

    (Lightning's sanity check stops after a few batches and logs nothing. A checkpoint is written before the validation
    that is due at the same step, and Lightning leaves that validation out when it resumes.)
    """

    def __init__(self) -> None:
        self._validated_step = -1

    def state_dict(self) -> dict[str, Any]:
        """The step of the last validation."""
        return {"validated_step": self._validated_step}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """What ``state_dict`` gave."""
        self._validated_step = state_dict["validated_step"]

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """The whole of it has run."""
        if trainer.state.fn == "fit":
            self._validated_step = trainer.global_step

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Validate, if that is due at this step and has not been done."""
        if not self._is_due(trainer) or trainer.limit_val_batches == 0 or not trainer.enable_validation:
            return
        run_validation(trainer)
        pl_module.train()

    def _is_due(self, trainer: Trainer) -> bool:
        if trainer.global_step == 0:
            return True
        interval = trainer.val_check_batch
        if trainer.check_val_every_n_epoch is not None or not isinstance(interval, int):
            return False
        return batches_begun(trainer) % interval == 0 and self._validated_step != trainer.global_step

"""A full validation before the first step, so that every curve starts where the untrained policy stands."""

from lightning.pytorch import Callback, LightningModule, Trainer


class ValidateFirst(Callback):
    """Runs the validation loop at step 0 of ``fit``; a resumed run goes on without it.

    (Lightning's sanity check stops after a few batches and logs nothing.)
    """

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        loop = trainer.fit_loop.epoch_loop.val_loop
        if trainer.global_step > 0 or trainer.limit_val_batches == 0 or not trainer.enable_validation:
            return
        trainer.validating = True
        loop.run()
        trainer.training = True
        pl_module.train()

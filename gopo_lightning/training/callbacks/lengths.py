"""Before the first forward: no prompt with its completion is longer than the policy takes."""

from typing import TYPE_CHECKING, cast

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_warn

from gopo_lightning.policy.positions import check_length, usual_length

if TYPE_CHECKING:
    from gopo_lightning.training.gopo_module import GOPOModule


class LengthCheck(Callback):
    """Holds the longest prompts of a data module that knows them (``longest_prompts``) against the policy."""

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._check(trainer, pl_module)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.state.fn != "fit":
            self._check(trainer, pl_module)

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._check(trainer, pl_module)

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._check(trainer, pl_module)

    def _check(self, trainer: Trainer, pl_module: LightningModule) -> None:
        module = cast("GOPOModule", pl_module)
        longest: dict[str, tuple[int, str]] = getattr(getattr(trainer, "datamodule", None), "longest_prompts", {})
        for num_tokens, where in longest.values():
            check_length(module.policy, num_tokens, module.sampling.max_new_tokens, where)
            total, usual = num_tokens + module.sampling.max_new_tokens, usual_length(module.policy)
            if usual is not None and total > usual:
                rank_zero_warn(
                    f"{where} has {num_tokens} tokens, with its completion up to {total}, more than the {usual} that "
                    f"{type(module.policy).__name__} was made for (max_position_embeddings)."
                )

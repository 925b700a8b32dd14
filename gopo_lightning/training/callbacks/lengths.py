"""Before the first forward: no prompt with its completion is longer than the policy takes."""

from typing import Any, cast

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_warn

from gopo_lightning.policy.positions import check_length, usual_length


class LengthCheck(Callback):
    """Holds the longest prompts of a data module that knows them (``longest_prompts``) against the module's policy.

    Args:
        max_new_tokens: most tokens of a completion.
    """

    def __init__(self, max_new_tokens: int) -> None:
        self.max_new_tokens = max_new_tokens

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
        policy = cast(Any, pl_module).policy
        longest: dict[str, tuple[int, str]] = getattr(getattr(trainer, "datamodule", None), "longest_prompts", {})
        for num_tokens, where in longest.values():
            check_length(policy, num_tokens, self.max_new_tokens, where)
            total, usual = num_tokens + self.max_new_tokens, usual_length(policy)
            if usual is not None and total > usual:
                rank_zero_warn(
                    f"{where} has {num_tokens} tokens, with its completion up to {total}, more than the {usual} that "
                    f"{type(policy).__name__} was made for (max_position_embeddings)."
                )

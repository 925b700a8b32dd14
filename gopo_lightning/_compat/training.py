"""Names of lightning, jsonargparse and trl."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.metadata import version
from typing import Any

from jsonargparse import _typehints
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint, RichProgressBar
from lightning.pytorch.cli import LightningCLI
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import Tensor

from gopo_lightning._compat.names import get

# ------------------------------------------------------------------------------------------------------------ lightning


def attached_trainer(module: LightningModule) -> Trainer | None:
    """The trainer of ``module``, or None.

    `LightningModule._trainer`: the property `trainer` raises where there is none. Can go when that can be asked.
    Without it: an error.
    """
    trainer: Trainer | None = get("lightning", module, "_trainer")
    return trainer


def uses_distributed_sampler(trainer: Trainer) -> bool:
    """The option `use_distributed_sampler` of ``trainer``.

    `Trainer._accelerator_connector.use_distributed_sampler`: it would divide the data a second time. Can go when the
    Trainer tells. Without it: an error.
    """
    return bool(get("lightning", trainer, "_accelerator_connector.use_distributed_sampler"))


def batches_processed(trainer: Trainer) -> int:
    """Training batches of the whole run that are done, those before a resume among them.

    `Trainer.fit_loop.epoch_loop.batch_progress`: where a resumed run goes on in its data. Can go when the Trainer
    tells, as it does of `global_step`. Without it: an error.
    """
    return int(get("lightning", trainer, "fit_loop.epoch_loop.batch_progress.total.processed"))


def batches_begun(trainer: Trainer) -> int:
    """Training batches of the whole run that were begun; Lightning validates by their number (`batches_processed`)."""
    return int(get("lightning", trainer, "fit_loop.epoch_loop.batch_progress.total.ready"))


def set_up_training_data(trainer: Trainer) -> None:
    """Let ``trainer.num_training_batches`` be known before training begins.

    `Trainer.fit_loop.setup_data`, which does nothing the second time: a schedule over epochs needs the number when the
    optimiser is made. Can go when the Trainer knows it by then, as `estimated_stepping_batches` does by the same call.
    Without it: an error.
    """
    get("lightning", trainer, "fit_loop.setup_data")()


def run_validation(trainer: Trainer) -> None:
    """A whole validation within `fit`.

    `Trainer.fit_loop.epoch_loop.val_loop`: the sanity check stops after a few batches and logs nothing. Can go when the
    Trainer has `validate at the start`. Without it: an error.
    """
    loop = get("lightning", trainer, "fit_loop.epoch_loop.val_loop")
    loop.restarting = False
    trainer.validating = True
    loop.run()
    trainer.training = True


def save_interval(callback: ModelCheckpoint) -> int:
    """Training steps from one checkpoint to the next; 0 where they do not count.

    `ModelCheckpoint._every_n_train_steps`: the argument, which has no property. Can go when it has one. Without it: an
    error.
    """
    return int(get("lightning", callback, "_every_n_train_steps"))


def set_data_parallel_size(strategy: ModelParallelStrategy, size: int) -> None:
    """Before the device mesh is made: ranks that read different data.

    `ModelParallelStrategy._data_parallel_size`: an argument, but the number of ranks is known only after the strategy
    was made; its default is the number of nodes. Can go when there is a value for all ranks. Without it: an error.
    """
    get("lightning", strategy, "_data_parallel_size")
    strategy._data_parallel_size = size


class StepBar(RichProgressBar):
    """A bar that says "Training" and can be set.

    `RichProgressBar._get_train_description` and `_update`: it counts batches of an epoch, and ours optimiser steps of a
    run. Can go when both can be overridden by public names. Without the first the bar says "Epoch 0"; without the
    second: an error.
    """

    def set_trained(self, num_steps: int) -> None:
        """Show that ``num_steps`` are done."""
        get("lightning", self, "_update")(self.train_progress_bar_id, num_steps)

    def _get_train_description(self, current_epoch: int) -> str:
        return "Training"


class CommandLine(LightningCLI):
    """LightningCLI to which a checkpoint is data.

    `LightningCLI._parse_ckpt_path`: it would let the hyperparameters in a checkpoint override the configuration, class
    paths too. Can go when an option turns that off. Without it: an error, for it is a matter of security.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        get("lightning", LightningCLI, "_parse_ckpt_path")
        super().__init__(*args, **kwargs)

    def _parse_ckpt_path(self) -> None:
        """Nothing is read."""


# --------------------------------------------------------------------------------------------------------- jsonargparse


@contextmanager
def lists_are_replaced() -> Iterator[None]:
    """A list in a later config has nothing of the list that it replaces.

    `jsonargparse._typehints.adapt_typehints`: where the two happen to be equally long, an entry gets the options that
    it leaves out from the earlier entry of the same class at the same place. Can go when an option turns that off.
    Without it: an error, for a reward would be configured by what nobody wrote there.
    """
    adapt = get("jsonargparse", _typehints, "adapt_typehints")

    def adapted(value: Any, *args: Any, **options: Any) -> Any:
        if isinstance(value, list) and not options.get("append"):
            options["prev_val"] = []
        return adapt(value, *args, **options)

    _typehints.adapt_typehints = adapted  # type: ignore[assignment]
    try:
        yield
    finally:
        _typehints.adapt_typehints = adapt


# ------------------------------------------------------------------------------------------------------------------ trl


def trl_trainer() -> Any:
    """TRL's `GRPOTrainer` with a method `advantages`: all processes' rewards_NK, None as NaN → float32 advantages_N.

    `GRPOTrainer._calculate_rewards` gathers rewards, `_generate_and_score_completions` makes advantages of them, and
    `_logs` shows them. Can go when TRL takes an advantage function. Without them, or where they do otherwise: an error.
    """
    from trl import GRPOTrainer

    score = get("trl", GRPOTrainer, "_calculate_rewards")
    generate = get("trl", GRPOTrainer, "_generate_and_score_completions")

    class OtherAdvantages(GRPOTrainer):
        advantages: Callable[[Tensor], Tensor]

        def _calculate_rewards(self, *args: Any, **kwargs: Any) -> Tensor:
            self.rewards_NK = score(self, *args, **kwargs)
            return self.rewards_NK

        def _generate_and_score_completions(self, inputs: list[Any]) -> dict[str, Any]:
            self.rewards_NK, n, rank = None, len(inputs), self.accelerator.process_index
            output = generate(self, inputs)
            logged = get("trl", self, "_logs").get("advantages")
            shapes = [getattr(x, "shape", None) for x in (output.get("advantages"), self.rewards_NK)]
            if shapes != [(n,), (n * self.accelerator.num_processes, len(self.reward_funcs))] or logged is None:
                raise RuntimeError(
                    f"trl {version('trl')} computes advantages otherwise than the version that gopo-lightning was "
                    "tested with: install that one (requirements.lock)"
                )
            advantages_N = self.advantages(self.rewards_NK)
            for _ in range(min(len(logged), len(advantages_N))):
                logged.pop()
            logged.extend(advantages_N.tolist())
            return output | {"advantages": advantages_N[rank * n : rank * n + n].to(output["advantages"])}

    return OtherAdvantages

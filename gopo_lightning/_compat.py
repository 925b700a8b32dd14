"""Every name that this package takes from a library without being promised it, each behind a function of its own.

Each says which name it is, why it is needed, when it can go, and what happens without it: a slower way, or the error of
`_get`. `tests/test_compat.py` probes what is relied on; `pyproject.toml` admits the minor versions that were tested.
"""

from collections.abc import Callable
from importlib.metadata import version
from operator import attrgetter
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint, RichProgressBar
from lightning.pytorch.cli import LightningCLI
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import Tensor, nn
from torch.optim.lr_scheduler import LRScheduler


def _get(library: str, owner: Any, path: str) -> Any:
    """``owner.path``, or a RuntimeError that names the version of ``library``, which no longer has it."""
    try:
        return attrgetter(path)(owner)
    except AttributeError as error:
        kind = owner if isinstance(owner, type) else type(owner)
        raise RuntimeError(
            f"{library} {version(library)} has no {kind.__name__}.{path}, which gopo-lightning relies on; install a "
            f"version of {library} that it was tested with (requirements.lock)"
        ) from error


# ---------------------------------------------------------------------------------------------------------------- torch


def persistent_buffers(module: nn.Module) -> dict[str, Tensor]:
    """Those of ``module`` itself that belong into a checkpoint.

    `Module._non_persistent_buffers_set`: a state dict would tell, but it walks through all children, and sharded ones
    must be gathered first. Can go when `named_buffers` tells persistent ones. Without it: an error.
    """
    temporary = _get("torch", module, "_non_persistent_buffers_set")
    return {name: buffer for name, buffer in module.named_buffers(recurse=False) if name not in temporary}


def set_last_lr(scheduler: LRScheduler, lrs: list[float | Tensor]) -> None:
    """Let ``scheduler.get_last_lr()`` be ``lrs``.

    `LRScheduler._last_lr`: only `step` sets it, and a resumed run has another learning rate before its first step. Can
    go when schedulers can be set anew. Without it: an error.
    """
    _get("torch", scheduler, "_last_lr")
    scheduler._last_lr = lrs


HAS_CPU_FLASH_ATTENTION = all(
    hasattr(torch.ops.aten, f"_scaled_dot_product_flash_attention_for_cpu{end}") for end in ("", "_backward")
)
"""Without these, products of matrices, which are slower."""


def cpu_flash_attention(
    query_BHMD: Tensor, key_BKND: Tensor, value_BKND: Tensor, bias: Tensor | None, scale: float, causal: bool = False
) -> tuple[Tensor, Tensor]:
    """Attention, and the logarithm of its normaliser.

    `aten::_scaled_dot_product_flash_attention_for_cpu`: `scaled_dot_product_attention` keeps the normaliser to itself.
    Can go when a public function returns it on CPUs too (flex_attention does so on GPUs).
    """
    kernel = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    output, normaliser = kernel(query_BHMD, key_BKND, value_BKND, 0.0, causal, attn_mask=bias, scale=scale)
    return output, normaliser


def cpu_flash_attention_backward(
    grad_BHMD: Tensor, *saved: Tensor, bias: Tensor | None, scale: float, causal: bool = False
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients by query, key and value; ``saved`` is query, key, value, output and normaliser.

    `aten::_scaled_dot_product_flash_attention_for_cpu_backward`: the gradient of a part of a softmax, whose normaliser
    is that of the whole. Can go with the one above.
    """
    kernel = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
    d_query, d_key, d_value = kernel(grad_BHMD, *saved, 0.0, causal, attn_mask=bias, scale=scale)
    return d_query, d_key, d_value


def onednn_linear(weight: Tensor, bias: Tensor | None) -> Callable[[Tensor], Tensor] | None:
    """x ↦ x @ weight.T + bias on CPUs, with ``weight`` laid out once; None where torch is built without oneDNN.

    `mkldnn::_reorder_linear_weight` and `mkldnn::_linear_pointwise`: `F.linear` lays a bfloat16 weight out anew in each
    call, a quarter of its time for few rows. Can go when a public function keeps the layout. Without them: `F.linear`.
    """
    ops = torch.ops.mkldnn
    if not (hasattr(ops, "_reorder_linear_weight") and hasattr(ops, "_linear_pointwise")):
        return None
    laid_out = ops._reorder_linear_weight(weight)
    return lambda x: ops._linear_pointwise(x, laid_out, bias, "none", [], "")


# --------------------------------------------------------------------------------------------------------- transformers


def unsplittable_layers(model: nn.Module) -> set[str]:
    """Names of the classes of layers that stay whole; empty if ``model`` names none.

    `PreTrainedModel._no_split_modules`: what to shard and to compile by. Can go when there is a public list of decoder
    layers. Without it: the error for models that name none, which says what to use instead.
    """
    return set(getattr(model, "_no_split_modules", None) or ())


def is_recurrent(model: nn.Module) -> bool:
    """Whether ``model`` carries a state from token to token that cannot be cut as keys and values can.

    `PreTrainedModel._is_stateful`. Can go when configurations tell. Without it: such a model is found by the comparison
    of numbers that follows, and by its `layer_types`.
    """
    return bool(getattr(model, "_is_stateful", False))


def attention_of(config: Any) -> str:
    """The name of the attention function that models of ``config`` call.

    `PreTrainedConfig._attn_implementation`: `PreTrainedModel.set_attn_implementation` sets it for a whole model and
    checks it each time; ours changes twice a forward, and again in each recomputed layer. Can go when there is a
    context manager for it. Without it: an error.
    """
    return str(_get("transformers", config, "_attn_implementation"))


def set_attention(config: Any, name: str) -> None:
    """Models of ``config`` call the attention function of this name from now on (`attention_of`)."""
    _get("transformers", config, "_attn_implementation")
    config._attn_implementation = name


def checkpoint_function(module: nn.Module) -> Callable[..., Any] | None:
    """What ``module`` checkpoints its layers with; None where it was not told to.

    `GradientCheckpointingLayer._gradient_checkpointing_func`: layers that are computed again in backward need the
    attention function of their forward. Can go when `gradient_checkpointing_enable` takes a context. Without it: the
    recomputed layers call an attention without our layout, and their checkpoint refuses the other shapes.
    """
    found: Callable[..., Any] | None = vars(module).get("_gradient_checkpointing_func")
    return found


def set_checkpoint_function(module: nn.Module, function: Callable[..., Any]) -> None:
    """``module`` checkpoints its layers with ``function`` from now on (`checkpoint_function`)."""
    module._gradient_checkpointing_func = function  # type: ignore[assignment]


# ------------------------------------------------------------------------------------------------------------ lightning


def attached_trainer(module: LightningModule) -> Trainer | None:
    """The trainer of ``module``, or None.

    `LightningModule._trainer`: the property `trainer` raises where there is none. Can go when that can be asked.
    Without it: an error.
    """
    trainer: Trainer | None = _get("lightning", module, "_trainer")
    return trainer


def uses_distributed_sampler(trainer: Trainer) -> bool:
    """The option `use_distributed_sampler` of ``trainer``.

    `Trainer._accelerator_connector.use_distributed_sampler`: it would divide the data a second time. Can go when the
    Trainer tells. Without it: an error.
    """
    return bool(_get("lightning", trainer, "_accelerator_connector.use_distributed_sampler"))


def batches_processed(trainer: Trainer) -> int:
    """Training batches of the whole run that are done, those before a resume among them.

    `Trainer.fit_loop.epoch_loop.batch_progress`: where a resumed run goes on in its data. Can go when the Trainer
    tells, as it does of `global_step`. Without it: an error.
    """
    return int(_get("lightning", trainer, "fit_loop.epoch_loop.batch_progress.total.processed"))


def batches_begun(trainer: Trainer) -> int:
    """Training batches of the whole run that were begun; Lightning validates by their number (`batches_processed`)."""
    return int(_get("lightning", trainer, "fit_loop.epoch_loop.batch_progress.total.ready"))


def set_up_training_data(trainer: Trainer) -> None:
    """Let ``trainer.num_training_batches`` be known before training begins.

    `Trainer.fit_loop.setup_data`, which does nothing the second time: a schedule over epochs needs the number when the
    optimiser is made. Can go when the Trainer knows it by then, as `estimated_stepping_batches` does by the same call.
    Without it: an error.
    """
    _get("lightning", trainer, "fit_loop.setup_data")()


def run_validation(trainer: Trainer) -> None:
    """A whole validation within `fit`.

    `Trainer.fit_loop.epoch_loop.val_loop`: the sanity check stops after a few batches and logs nothing. Can go when the
    Trainer has `validate at the start`. Without it: an error.
    """
    loop = _get("lightning", trainer, "fit_loop.epoch_loop.val_loop")
    loop.restarting = False
    trainer.validating = True
    loop.run()
    trainer.training = True


def save_interval(callback: ModelCheckpoint) -> int:
    """Training steps from one checkpoint to the next; 0 where they do not count.

    `ModelCheckpoint._every_n_train_steps`: the argument, which has no property. Can go when it has one. Without it: an
    error.
    """
    return int(_get("lightning", callback, "_every_n_train_steps"))


def set_data_parallel_size(strategy: ModelParallelStrategy, size: int) -> None:
    """Before the device mesh is made: ranks that read different data.

    `ModelParallelStrategy._data_parallel_size`: an argument, but the number of ranks is known only after the strategy
    was made; its default is the number of nodes. Can go when there is a value for all ranks. Without it: an error.
    """
    _get("lightning", strategy, "_data_parallel_size")
    strategy._data_parallel_size = size


class StepBar(RichProgressBar):
    """A bar that says "Training" and can be set.

    `RichProgressBar._get_train_description` and `_update`: it counts batches of an epoch, and ours optimiser steps of a
    run. Can go when both can be overridden by public names. Without the first the bar says "Epoch 0"; without the
    second: an error.
    """

    def set_trained(self, num_steps: int) -> None:
        """Show that ``num_steps`` are done."""
        _get("lightning", self, "_update")(self.train_progress_bar_id, num_steps)

    def _get_train_description(self, current_epoch: int) -> str:
        return "Training"


class CommandLine(LightningCLI):
    """LightningCLI to which a checkpoint is data.

    `LightningCLI._parse_ckpt_path`: it would let the hyperparameters in a checkpoint override the configuration, class
    paths too. Can go when an option turns that off. Without it: an error, for it is a matter of security.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        _get("lightning", LightningCLI, "_parse_ckpt_path")
        super().__init__(*args, **kwargs)

    def _parse_ckpt_path(self) -> None:
        """Nothing is read."""


# ------------------------------------------------------------------------------------------------------------------ trl


def trl_trainer() -> Any:
    """TRL's `GRPOTrainer` with a method `advantages`: all processes' rewards_NK, None as NaN → float32 advantages_N.

    `GRPOTrainer._calculate_rewards` gathers rewards, `_generate_and_score_completions` makes advantages of them, and
    `_logs` shows them. Can go when TRL takes an advantage function. Without them, or where they do otherwise: an error.
    """
    from trl import GRPOTrainer

    score = _get("trl", GRPOTrainer, "_calculate_rewards")
    generate = _get("trl", GRPOTrainer, "_generate_and_score_completions")

    class OtherAdvantages(GRPOTrainer):
        advantages: Callable[[Tensor], Tensor]

        def _calculate_rewards(self, *args: Any, **kwargs: Any) -> Tensor:
            self.rewards_NK = score(self, *args, **kwargs)
            return self.rewards_NK

        def _generate_and_score_completions(self, inputs: list[Any]) -> dict[str, Any]:
            self.rewards_NK, n, rank = None, len(inputs), self.accelerator.process_index
            output = generate(self, inputs)
            logged = _get("trl", self, "_logs").get("advantages")
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

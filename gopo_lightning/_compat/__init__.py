"""Every name that this package takes from a library without being promised it, each behind a function of its own.

Each says which name it is, why it is needed, when it can go, and what happens without it: a slower way, or the error of
`names.get`. `tests/test_compat.py` probes what is relied on; `pyproject.toml` admits the minor versions that were
tested.
"""

from gopo_lightning._compat.models import (
    HAS_CPU_FLASH_ATTENTION,
    attention_of,
    checkpoint_function,
    cpu_flash_attention,
    cpu_flash_attention_backward,
    is_recurrent,
    onednn_linear,
    persistent_buffers,
    set_attention,
    set_checkpoint_function,
    set_last_lr,
    unsplittable_layers,
)
from gopo_lightning._compat.training import (
    CommandLine,
    StepBar,
    attached_trainer,
    batches_begun,
    batches_processed,
    lists_are_replaced,
    run_validation,
    save_interval,
    set_data_parallel_size,
    set_up_training_data,
    trl_trainer,
    uses_distributed_sampler,
)

__all__ = [
    "HAS_CPU_FLASH_ATTENTION",
    "CommandLine",
    "StepBar",
    "attached_trainer",
    "attention_of",
    "batches_begun",
    "batches_processed",
    "checkpoint_function",
    "cpu_flash_attention",
    "cpu_flash_attention_backward",
    "is_recurrent",
    "lists_are_replaced",
    "onednn_linear",
    "persistent_buffers",
    "run_validation",
    "save_interval",
    "set_attention",
    "set_checkpoint_function",
    "set_data_parallel_size",
    "set_last_lr",
    "set_up_training_data",
    "trl_trainer",
    "unsplittable_layers",
    "uses_distributed_sampler",
]

"""The Trainer's options that training needs; the command line sets them, and Python code asks for them."""

from typing import Any


def trainer_defaults() -> dict[str, Any]:
    """``Trainer(**trainer_defaults(), max_steps=500)`` behaves as the command line's; any of them may be replaced: as
    in ``Trainer(**trainer_defaults() | {"enable_model_summary": True})``.

    `use_distributed_sampler`, `inference_mode` and `num_sanity_val_steps` have no other value that works.
    """
    return {
        "use_distributed_sampler": False,  # the data modules bring their own samplers
        "inference_mode": False,  # sharded weights are gathered in place
        "num_sanity_val_steps": 0,  # a full validation runs at step 0 instead
        "check_val_every_n_epoch": None,  # val_check_interval counts batches across epochs
        "log_every_n_steps": 1,
        "enable_model_summary": False,  # it counts modules, modes and FLOPs; a run says its parameters itself
    }

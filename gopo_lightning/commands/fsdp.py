"""`fsdp` of a configuration is FSDP2: what Lightning calls `fsdp` is FSDP1, under which no policy is trained here."""

from inspect import signature
from typing import Any

from jsonargparse import Namespace
from lightning.pytorch.strategies import FSDPStrategy
from lightning.pytorch.utilities.rank_zero import rank_zero_info

from gopo_lightning.distributed.strategies import FSDP2Strategy

NAMES: dict[str, dict[str, Any]] = {"fsdp": {}, "fsdp_cpu_offload": {"cpu_offload": True}}
"""Lightning's names of its FSDPStrategy, and what they set."""
SHARED = ("cpu_offload", "process_group_backend", "timeout")
"""Arguments that mean the same to FSDPStrategy and FSDP2Strategy."""


def as_fsdp2(strategy: Any) -> Any:
    """`trainer.strategy` of a parsed configuration: Lightning's FSDPStrategy as FSDP2Strategy, any other as it is.

    Args:
        strategy: a name, or a class with its arguments.

    Raises:
        ValueError: an argument that FSDP2Strategy does not have.
    """
    if isinstance(strategy, str) and strategy in NAMES:
        return _fsdp2(NAMES[strategy], strategy)
    if isinstance(strategy, Namespace) and _is_of_lightning(strategy.class_path):
        given = vars(strategy.get("init_args", Namespace())) | strategy.get("dict_kwargs", {})
        return _fsdp2({name: value for name, value in given.items() if not _is_default(name, value)}, "FSDPStrategy")
    return strategy


def _is_of_lightning(class_path: str) -> bool:
    return class_path.startswith("lightning.") and class_path.endswith(f".{FSDPStrategy.__name__}")


def _is_default(name: str, value: Any) -> bool:
    """Whether FSDPStrategy would take ``value``, which may be of an enumeration, for ``name`` by itself."""
    parameter = signature(FSDPStrategy).parameters.get(name)
    return parameter is not None and parameter.default == getattr(value, "name", value)


def _fsdp2(options: dict[str, Any], named: str) -> Namespace:
    for name, value in options.items():
        if name not in SHARED:
            raise ValueError(
                f"trainer.strategy: {named} has {name}={value}, but policies are sharded by FSDP2, which takes only "
                f"{', '.join(SHARED)}; leave {name} out, or use another strategy such as ddp"
            )
    if "cpu_offload" in options:  # a truth value, or torch's CPUOffload
        offload = options["cpu_offload"]
        options = {**options, "cpu_offload": bool(getattr(offload, "offload_params", offload))}
    said = ", ".join(f"{name}={value}" for name, value in options.items())
    rank_zero_info(f"trainer.strategy: {named} becomes fsdp2, FSDP2Strategy({said})")
    class_path = f"{FSDP2Strategy.__module__}.{FSDP2Strategy.__name__}"
    return Namespace(class_path=class_path, init_args=Namespace(**options))

"""The LightningModules and what they are made of."""

from importlib import import_module
from typing import Any

_EXPORTS = {
    "GradientUpdate": "gopo_lightning.training.update",
    "RankedPerturbation": "gopo_lightning.training.ranked_perturbation",
    "UpdateRule": "gopo_lightning.training.update_rule",
}
"""For the ``class_path`` of YAML files; imported on first use, as in `gopo_lightning`."""


def __getattr__(name: str) -> Any:
    if name not in _EXPORTS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_EXPORTS[name]), name)

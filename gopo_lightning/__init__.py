"""GOPO: post-train language models on ranked rewards, as a PyTorch Lightning app.

The names below are what YAML files use as ``class_path``; they are imported on first use, so that
``python -m gopo_lightning --help`` answers at once.
"""

from importlib import import_module
from typing import Any

__version__ = "0.1.0"

_EXPORTS = {
    "GOPOModule": "gopo_lightning.module",
    "RewardModelModule": "gopo_lightning.reward_model",
    "PromptDataModule": "gopo_lightning.data.prompts",
    "PreferenceDataModule": "gopo_lightning.data.preferences",
}

__all__ = ["__version__", *_EXPORTS]


def __getattr__(name: str) -> Any:
    if name not in _EXPORTS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_EXPORTS[name]), name)

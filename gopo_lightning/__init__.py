"""GOPO: post-train language models on ranked rewards, as a PyTorch Lightning app.

The names below are for Python code and the ``class_path`` of YAML files; they are imported on first use, so that
``python -m gopo_lightning --help`` answers at once.
"""

from importlib import import_module
from typing import Any

__version__ = "0.2.0"

_EXPORTS = {
    "GOPOModule": "gopo_lightning.training.gopo_module",
    "RewardModelModule": "gopo_lightning.training.reward_model",
    "PromptDataModule": "gopo_lightning.data.prompts",
    "PreferenceDataModule": "gopo_lightning.data.preferences",
    "trainer_defaults": "gopo_lightning.training.trainer_defaults",
}
_PACKAGES = {
    "callbacks": "gopo_lightning.training.callbacks",
    "reward_model": "gopo_lightning.training.reward_model",
}
"""Under shorter names, for paths such as `gopo_lightning.callbacks.SampleTable`."""

__all__ = ["__version__", *_EXPORTS]


def __getattr__(name: str) -> Any:
    if name in _PACKAGES:
        return import_module(_PACKAGES[name])
    if name not in _EXPORTS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_EXPORTS[name]), name)

"""Data modules: prompts for the policy, comparisons for reward models."""

from gopo_lightning.data.preferences import Comparisons, PreferenceDataModule
from gopo_lightning.data.prompts import PromptDataModule

__all__ = ["Comparisons", "PreferenceDataModule", "PromptDataModule"]

"""Data modules: prompts for the policy, comparisons for reward models."""

from gopo_lightning.data.comparison_batches import Comparisons
from gopo_lightning.data.preferences import PreferenceDataModule
from gopo_lightning.data.prompts import PromptDataModule

__all__ = ["Comparisons", "PreferenceDataModule", "PromptDataModule"]

"""The rewards of `rewards.py` for a policy that repeats the beginning of its sentence: they read the answer alone."""

from collections.abc import Sequence

import torch
from torch import Tensor

from gopo_lightning.types import Prompt
from scripts.study import rewards


class Proxy(rewards.Proxy):
    """See `rewards.Proxy`."""

    def scores(self, prompts: Sequence[Prompt], completions: Sequence[str]) -> Tensor:
        """float64 [N]."""
        return torch.as_tensor(self.classifier(prompts, completions)).double()


class Judge(rewards.Judge):
    """See `rewards.Judge`."""

    def scores(self, prompts: Sequence[Prompt], completions: Sequence[str]) -> Tensor:
        """float64 [N]."""
        return torch.as_tensor(self.classifier(prompts, completions)).double()

"""Decides, once and on the real model, whether training may forward a group's prompt once."""

from typing import Literal

from lightning.pytorch.utilities import rank_zero_warn
from torch import nn

from gopo_lightning.distributed import gather_objects
from gopo_lightning.logprobs import check_shared_prefix
from gopo_lightning.shared_prefix import supports_shared_prefix
from gopo_lightning.structs import Experience

PrefixSharing = Literal["auto", "always", "never"]


def decide_prefix_sharing(mode: PrefixSharing, model: nn.Module, experience: Experience, temperature: float) -> bool:
    """Whether to share, by ``mode``: ``auto`` compares both forms on a small group; all ranks must call this.

    Raises:
        ValueError: ``always`` with a model that cannot.
    """
    if mode == "never":
        return False
    num_tokens = experience.prompts.tokens_PL.shape[1] + experience.completions.tokens_NT.shape[1]
    supported, reason = supports_shared_prefix(model, max(gather_objects(num_tokens)))  # ranks must decide alike
    if supported and mode == "auto":
        agreement = check_shared_prefix(model, experience.prompts, experience.completions, temperature=temperature)
        supported = agreement.ok
        reason = (
            f"log-probs differ by {agreement.logprobs:.1e} nats and gradients by {agreement.gradient:.1e} from those "
            f"of the replicated form, more than {agreement.tolerance:.0e}"
        )
    if not supported and mode == "always":
        raise ValueError(f"prefix_sharing=always, but {type(model).__name__} cannot: {reason}. Use auto or never.")
    if not supported:
        rank_zero_warn(f"the prompt is forwarded with each of its completions, which is slower: {reason}")
    return supported

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
    """Whether to share, after comparing both forms on a small group; all ranks must call this, and decide alike.

    Raises:
        ValueError: ``always`` with a model that cannot, or whose numbers differ.
    """
    if mode == "never":
        return False
    num_tokens = experience.prompts.tokens_PL.shape[1] + experience.completions.tokens_NT.shape[1]
    _, reason = supports_shared_prefix(model, max(gather_objects(num_tokens)))  # ranks must decide alike
    if not reason:
        reason = max(gather_objects(_tried(model, experience, temperature)))
    if reason and mode == "always":
        raise ValueError(f"prefix_sharing=always, but {type(model).__name__} cannot: {reason}. Use auto or never.")
    if reason:
        rank_zero_warn(f"the prompt is forwarded with each of its completions, which is slower: {reason}")
    return not reason


def _tried(model: nn.Module, experience: Experience, temperature: float) -> str:
    """What speaks against sharing by a trial on the model itself; empty if nothing does."""
    try:
        agreement = check_shared_prefix(model, experience.prompts, experience.completions, temperature=temperature)
    except Exception as error:  # noqa: BLE001 - whatever a foreign model does not take is a reason not to share
        return f"{type(error).__name__}: {error}".partition("\n")[0]
    if agreement.ok:
        return ""
    return (
        f"log-probs differ by {agreement.logprobs:.1e} nats and gradients by {agreement.gradient:.1e} from those "
        f"of the replicated form, more than {agreement.tolerance:.0e}"
    )

"""Whether training may forward a group's prompt once: decided once, by comparing both forms on the real model."""

from dataclasses import dataclass
from typing import Any, Literal

import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn

from gopo_lightning.distributed.collectives import gather_objects
from gopo_lightning.distributed.decoder_layers import uncompiled
from gopo_lightning.policy.lm_head import logit_rule
from gopo_lightning.policy.logprobs import completion_logprobs, layout_of
from gopo_lightning.policy.shared_prefix import supports_shared_prefix
from gopo_lightning.types import Completions, PromptBatch, Rollout

PrefixSharing = Literal["auto", "always", "never"]


def decide_prefix_sharing(mode: PrefixSharing, model: nn.Module, rollout: Rollout, temperature: float) -> bool:
    """Whether to share, after comparing both forms on a small group; all ranks must call this, and decide alike.

    Raises:
        ValueError: ``always`` with a model that cannot, or whose numbers differ.
    """
    if mode == "never":
        return False
    _, reason = supports_shared_prefix(model)
    if not reason:
        reason = max(gather_objects(_tried(model, rollout, temperature)))  # ranks must decide alike
    if reason and mode == "always":
        name = type(model).__name__.removeprefix("FSDP")
        raise ValueError(f"prefix_sharing=always, but {name} cannot: {reason}. Use auto or never.")
    if reason:
        rank_zero_warn(f"the prompt is forwarded with each of its completions, which is slower: {reason}")
    return not reason


def _tried(model: nn.Module, rollout: Rollout, temperature: float) -> str:
    """What speaks against sharing by a trial on the model itself; empty if nothing does."""
    try:
        agreement = check_shared_prefix(model, rollout.prompts, rollout.completions, temperature=temperature)
    except Exception as error:  # noqa: BLE001 - whatever a foreign model does not take is a reason not to share
        return f"{type(error).__name__}: {error}".partition("\n")[0]
    if agreement.ok:
        return ""
    return (
        f"log-probs differ by {agreement.logprobs:.1e} nats and gradients by {agreement.gradient:.1e} from those "
        f"of the replicated form, more than {agreement.tolerance:.0e}"
    )


@dataclass(frozen=True)
class Agreement:
    """How far the shared-prefix form is from the replicated one."""

    logprobs: float
    """Mean absolute difference of the log-probs, in nats."""
    gradient: float
    """Norm of the difference of the gradients by the norm of the gradient."""
    tolerance: float
    """Most that either may be: 1e-3 in float32, 5e-2 in a shorter type."""

    @property
    def ok(self) -> bool:
        """Whether the shared form may stand in for the other."""
        return max(self.logprobs, self.gradient) <= self.tolerance  # False for NaN


def check_shared_prefix(
    model: nn.Module, prompts: PromptBatch, completions: Completions, *, temperature: float = 1.0
) -> Agreement:
    """Both forms on a small group each of the first two prompts, outside autocast, in the model's present mode.

    The gradient is that of the input embeddings, at each position: it has come back through every layer, whether the
    weights are sharded, frozen under LoRA or not, and no parameter's ``grad`` is touched. All ranks must call this.
    """
    P, G = len(prompts), len(completions) // len(prompts)
    few_P = torch.arange(min(P, 2))
    rows_N = (few_P[:, None] * G + torch.arange(min(G, 2))).flatten()
    prompts, completions = prompts.select(few_P), completions.select(rows_N)
    with torch.enable_grad(), torch.autocast(prompts.tokens_PL.device.type, enabled=False), uncompiled():
        logprobs, gradient, dtype = _embedding_gradient(model, prompts, completions, temperature, False)
        shared_logprobs, shared_gradient, _ = _embedding_gradient(model, prompts, completions, temperature, True)
    return Agreement(
        logprobs=float((logprobs - shared_logprobs).abs().sum() / completions.mask_NT.sum()),
        gradient=float((gradient - shared_gradient).norm() / gradient.norm()),
        tolerance=1e-3 if dtype == torch.float32 else 5e-2,
    )


def _embedding_gradient(
    model: nn.Module, prompts: PromptBatch, completions: Completions, temperature: float, shared: bool
) -> tuple[Tensor, Tensor, torch.dtype]:
    """Log-probs [N, T], the gradient of a fixed sum of them by the embeddings of both forms' tokens, their dtype."""
    leaves: list[Tensor] = []

    def detach(module: nn.Module, args: Any, output: Tensor) -> Tensor:
        leaves.append(output.detach().requires_grad_())
        return leaves[-1]

    logit_rule(model, prompts.tokens_PL[:1, -1:])  # its forward is not to be seen by the hook
    handle = model.get_input_embeddings().register_forward_hook(detach)  # type: ignore[operator]
    try:
        result = completion_logprobs(model, prompts, completions, temperature=temperature, shared_prefix=shared)
    finally:
        handle.remove()
    logprobs_NT = result.logprobs_NT
    weights_NT = torch.arange(logprobs_NT.numel(), device=logprobs_NT.device).view_as(logprobs_NT).cos()
    (grad,) = torch.autograd.grad((logprobs_NT * weights_NT).sum(), leaves)
    prompt, completion = _of_tokens(grad, prompts, completions, shared)
    return logprobs_NT.detach(), torch.cat([prompt.flatten(), completion.flatten()]).float(), leaves[0].dtype


def _of_tokens(grad: Tensor, prompts: PromptBatch, completions: Completions, shared: bool) -> tuple[Tensor, Tensor]:
    """Of gradients [rows, columns, H] those of the prompts' real tokens and of the completions', prompt by prompt.

    The gradients of a prompt's copies add up.
    """
    P, N = len(prompts), len(completions)
    if shared:
        prompt_S = layout_of(prompts, completions).prompt_S
        return grad[0, prompt_S], grad[0, ~prompt_S]
    column_S = torch.arange(grad.shape[1], device=grad.device)
    prompt_PS = column_S < prompts.mask_PL.sum(-1, keepdim=True)
    prompt_NS = prompt_PS.repeat_interleave(N // P, 0)
    ends_N1 = prompt_NS.sum(-1, keepdim=True) + completions.mask_NT.sum(-1, keepdim=True)
    return grad.unflatten(0, (P, N // P)).sum(1)[prompt_PS], grad[~prompt_NS & (column_S < ends_N1)]

"""Token log-probabilities of completions under a policy, at the sampling temperature, and their gradient.

Two forms with the same result. *Replicated*: a row per completion, [prompt | completion], G*(L + T) tokens a group.
*Shared prefix*: a row per prompt, [prompt | completion 1 | ... | completion G], L + G*T tokens (``shared_prefix.py``).
Either way a completion's first token is predicted by the prompt's last position, token t by its token t - 1, and the
LM head runs on those positions of real tokens alone, chunk by chunk; a chunk's logits are recomputed in backward. The
head is entered through the model's own forward, so LoRA, tied embeddings and FSDP's gather keep working.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from gopo_lightning.shared_prefix import PackedGroups, require_called, shared_prefix_attention
from gopo_lightning.structs import Completions, PromptBatch


@dataclass(frozen=True)
class TokenLogprobs:
    """What the losses read of a forward pass; 0 outside the completions' mask."""

    logprobs_NT: Tensor
    """float32, differentiable."""
    entropy_NT: Tensor | None = None
    """float32 in nats, of the distribution at the temperature, detached; None unless asked for."""


def completion_logprobs(
    model: nn.Module,
    prompts: PromptBatch,
    completions: Completions,
    *,
    temperature: float = 1.0,
    with_entropy: bool = False,
    shared_prefix: bool = False,
    chunk_tokens: int = 512,
) -> TokenLogprobs:
    """Log-probabilities of ``completions`` given ``prompts`` at ``temperature`` (0 counts as 1, as in the sampler).

    ``model`` is a causal LM of transformers or a PeftModel; ``chunk_tokens`` bounds the tokens whose logits over the
    vocabulary exist at once. Runs under grad or no_grad, autocast, gradient checkpointing, in train or eval mode.
    """
    if len(completions) % len(prompts):
        raise ValueError(
            f"{len(completions)} completions of {len(prompts)} prompts are no whole groups; select by prompt."
        )
    pack = _pack_shared if shared_prefix else _pack_replicated
    inputs, index_NT = pack(prompts, completions)
    mask_NT = completions.mask_NT
    reader = _Reader(index_NT[mask_NT], completions.tokens_NT[mask_NT], temperature or 1.0, with_entropy, chunk_tokens)
    rule = _logit_rule(model, prompts.tokens_PL[:1, -1:])
    with shared_prefix_attention(model) if shared_prefix else nullcontext():
        result_KM = _read(model, inputs, reader, rule)
    if shared_prefix:
        require_called(model, inputs["shared_prefix"])
    logprobs_NT, *entropy = (
        torch.zeros(mask_NT.shape, device=mask_NT.device).masked_scatter(mask_NT, row_M) for row_M in result_KM
    )
    return TokenLogprobs(logprobs_NT, entropy[0].detach() if entropy else None)


def _pack_replicated(prompts: PromptBatch, completions: Completions) -> tuple[dict[str, Any], Tensor]:
    """Arguments of the forward, and where in the last T + 1 positions of its rows each token is predicted."""
    N, T = completions.tokens_NT.shape
    G = N // len(prompts)
    mask = torch.cat([prompts.mask_PL.repeat_interleave(G, 0), completions.mask_NT], 1)
    inputs = {
        "input_ids": torch.cat([prompts.tokens_PL.repeat_interleave(G, 0), completions.tokens_NT], 1),
        "attention_mask": mask.long(),
        "position_ids": positions(mask),
        "logits_to_keep": T + 1,
    }
    index_NT = torch.arange(N * (T + 1), device=mask.device).view(N, T + 1)[:, :T]
    return inputs, index_NT


def _pack_shared(prompts: PromptBatch, completions: Completions) -> tuple[dict[str, Any], Tensor]:
    """The same for one row per prompt, of whose positions the last 1 + G*T predict."""
    (N, T), P = completions.tokens_NT.shape, len(prompts)
    G = N // P
    mask_PGT = completions.mask_NT.view(P, G, T)
    suffix_positions_PGT = prompts.mask_PL.sum(-1)[:, None, None] + positions(mask_PGT)
    inputs = {
        "input_ids": torch.cat([prompts.tokens_PL, completions.tokens_NT.view(P, G * T)], 1),
        # read by nobody but transformers' warning about padding: the layout is the mask
        "attention_mask": torch.cat([prompts.mask_PL, mask_PGT.flatten(1)], 1).long(),
        "position_ids": torch.cat([positions(prompts.mask_PL), suffix_positions_PGT.flatten(1)], 1),
        "logits_to_keep": 1 + G * T,
        "shared_prefix": PackedGroups(prompts.mask_PL, G, T),
    }
    index_PGT = torch.arange(G * T, device=mask_PGT.device).view(G, T).repeat(P, 1, 1)
    index_PGT[:, :, 0] = 0
    index_PGT += torch.arange(P, device=mask_PGT.device)[:, None, None] * (1 + G * T)
    return inputs, index_PGT.view(N, T)


def positions(mask: Tensor) -> Tensor:
    """int64 position of each token among the real ones of its row; padding has a valid one, which nobody reads."""
    return (mask.long().cumsum(-1) - 1).clamp(min=0)


class _Reader:
    """Stands in for the LM head: hidden states in, log-probs (and entropy) of M chosen tokens out, [1 or 2, M]."""

    def __init__(
        self, index_M: Tensor, targets_M: Tensor, temperature: float, with_entropy: bool, chunk_tokens: int
    ) -> None:
        self.index_M, self.targets_M = index_M, targets_M
        self.temperature, self.with_entropy, self.chunk_tokens = temperature, with_entropy, chunk_tokens

    def __call__(self, head: Callable[[Tensor], Tensor], hidden_BSH: Tensor) -> Tensor:
        hidden_MH = hidden_BSH.flatten(0, 1)[self.index_M]
        chunks = zip(hidden_MH.split(self.chunk_tokens), self.targets_M.split(self.chunk_tokens), strict=True)
        return torch.cat([self._chunk(head, hidden_CH, targets_C) for hidden_CH, targets_C in chunks], -1)

    def _chunk(self, head: Callable[[Tensor], Tensor], hidden_CH: Tensor, targets_C: Tensor) -> Tensor:
        def run(hidden_CH: Tensor) -> Tensor:
            return torch.stack(_TokenLogprob.apply(head(hidden_CH), targets_C, self.temperature, self.with_entropy))

        if not torch.is_grad_enabled():
            return run(hidden_CH)
        return checkpoint(run, hidden_CH, use_reentrant=False, preserve_rng_state=False)


class _TokenLogprob(torch.autograd.Function):
    """log softmax(logits / temperature) at the targets, in float32, saving no more than the logits as they came."""

    @staticmethod
    def forward(ctx: Any, logits_CV: Tensor, targets_C: Tensor, temperature: float, with_entropy: bool) -> Any:
        scaled_CV = logits_CV.float() / temperature
        normaliser_C = scaled_CV.logsumexp(-1)
        logprobs_C = scaled_CV.gather(-1, targets_C[:, None])[:, 0] - normaliser_C
        ctx.save_for_backward(logits_CV, targets_C, normaliser_C)
        ctx.temperature = temperature
        if not with_entropy:
            return (logprobs_C,)
        probs_CV = (scaled_CV - normaliser_C[:, None]).exp_()
        entropy_C = normaliser_C - torch.linalg.vecdot(probs_CV, scaled_CV)
        ctx.mark_non_differentiable(entropy_C)
        return logprobs_C, entropy_C

    @staticmethod
    def backward(ctx: Any, grad_C: Tensor, *_: Tensor) -> Any:
        """d/dlogits = (one-hot - softmax) / temperature."""
        logits_CV, targets_C, normaliser_C = ctx.saved_tensors
        grad_C1 = grad_C[:, None].float() / ctx.temperature
        grad_CV = (logits_CV.float() / ctx.temperature).sub_(normaliser_C[:, None]).exp_().mul_(-grad_C1)
        grad_CV.scatter_add_(-1, targets_C[:, None], grad_C1)
        return grad_CV.to(logits_CV.dtype), None, None, None


@dataclass(frozen=True)
class _LogitRule:
    """What a model does to the head's output, and how to keep it from doing that to ours: a scale, then a soft cap."""

    scale: float = 1.0
    softcap: float | None = None

    def __call__(self, logits: Tensor) -> Tensor:
        logits = logits if self.scale == 1.0 else logits * self.scale
        return logits if self.softcap is None else (logits / self.softcap).tanh() * self.softcap


_rules: "WeakKeyDictionary[nn.Module, _LogitRule | None]" = WeakKeyDictionary()


def _read(model: nn.Module, inputs: dict[str, Any], reader: _Reader, rule: _LogitRule | None) -> Tensor:
    """``reader``'s result, [1 or 2, M], by one forward of ``model``."""
    if rule is None:
        return reader(lambda logits: logits, model(**inputs, use_cache=False).logits)
    head = model.get_output_embeddings()  # type: ignore[operator]
    original = head.forward
    with _replaced(head, lambda hidden: reader(lambda x: rule(original(x)), hidden)[None]), _uncapped(model, rule):
        return model(**inputs, use_cache=False).logits[0] / rule.scale


def _logit_rule(model: nn.Module, tokens_11: Tensor) -> _LogitRule | None:
    """The rule of ``model``, found at the first call."""
    if model not in _rules:
        _rules[model] = _find_rule(model, tokens_11.to(next(model.parameters()).device))
    return _rules[model]


def _find_rule(model: nn.Module, tokens_11: Tensor) -> _LogitRule | None:
    """The rule under which the head's output gives the model's logits, proved on a token; None if unknown.

    Known: nothing at all, the soft cap of Gemma 2, the factors of Cohere and Granite.
    """
    if (head := model.get_output_embeddings()) is None:  # type: ignore[operator]
        return None
    seen: list[Tensor] = []
    original = head.forward

    def spy(hidden: Tensor) -> Tensor:
        seen.append(original(hidden))
        return seen[-1]

    with torch.no_grad(), _replaced(head, spy):
        logits = model(input_ids=tokens_11, use_cache=False).logits
        rule = _declared_rule(model)
        if len(seen) != 1 or not _same(rule(seen[0]), logits):
            return None
        with _uncapped(model, rule):
            uncapped = model(input_ids=tokens_11, use_cache=False).logits
        return rule if _same(seen[1] * rule.scale, uncapped) else None


def _same(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and torch.allclose(a.float(), b.float(), rtol=1e-2, atol=1e-5)


def _declared_rule(model: nn.Module) -> _LogitRule:
    """By the names that models of transformers use for it."""
    config = model.config.get_text_config()  # type: ignore[union-attr,operator]
    scale = float(getattr(config, "logit_scale", None) or 1.0) / float(getattr(config, "logits_scaling", None) or 1.0)
    return _LogitRule(scale, getattr(config, "final_logit_softcapping", None))


@contextmanager
def _uncapped(model: nn.Module, rule: _LogitRule) -> Iterator[None]:
    """The model leaves soft-capping to us: it cannot be undone afterwards, as a factor can."""
    config = model.config.get_text_config()  # type: ignore[union-attr,operator]
    if rule.softcap is not None:
        config.final_logit_softcapping = None
    try:
        yield
    finally:
        if rule.softcap is not None:
            config.final_logit_softcapping = rule.softcap


@contextmanager
def _replaced(module: nn.Module, forward: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """``module`` computes ``forward`` inside; its hooks (FSDP's gather) still run."""
    before = vars(module).get("forward")
    module.forward = forward
    try:
        yield
    finally:
        del module.forward
        if before is not None:
            module.forward = before


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
    with torch.enable_grad(), torch.autocast(prompts.tokens_PL.device.type, enabled=False):
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

    _logit_rule(model, prompts.tokens_PL[:1, -1:])  # its forward is not to be seen by the hook
    handle = model.get_input_embeddings().register_forward_hook(detach)  # type: ignore[operator]
    try:
        result = completion_logprobs(model, prompts, completions, temperature=temperature, shared_prefix=shared)
    finally:
        handle.remove()
    logprobs_NT = result.logprobs_NT
    weights_NT = torch.arange(logprobs_NT.numel(), device=logprobs_NT.device).view_as(logprobs_NT).cos()
    (grad,) = torch.autograd.grad((logprobs_NT * weights_NT).sum(), leaves)
    (P, L), (N, T) = prompts.tokens_PL.shape, logprobs_NT.shape
    # the gradients of a prompt's copies add up
    prompt = grad[:, :L] if shared else grad[:, :L].unflatten(0, (P, N // P)).sum(1)
    completion = grad[:, L:].reshape(N, T, -1)
    return logprobs_NT.detach(), torch.cat([prompt.flatten(), completion.flatten()]).float(), leaves[0].dtype

"""The LM head on chosen positions, chunk by chunk, entered through the model's own forward.

For one forward the head is replaced by a reader of hidden states, and what the model returns as logits is the
reader's result. Models that scale or soft-cap their logits afterwards do so by a rule, which is proved on a token.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from gopo_lightning.distributed.decoder_layers import replaced_forward, uncompiled


class TokenReader:
    """Stands in for the LM head: hidden states in, log-probs (and entropy) of M chosen tokens out, [1 or 2, M].

    ``at_M`` is the row of each token's hidden state, and its column counted from the end (-1, -2, ...): a model may
    forward all columns to the head, or only the last ones.
    """

    def __init__(
        self,
        at_M: tuple[Tensor, Tensor],
        targets_M: Tensor,
        temperature: float,
        with_entropy: bool,
        chunk_tokens: int,
    ) -> None:
        self.at_M, self.targets_M = at_M, targets_M
        self.temperature, self.with_entropy, self.chunk_tokens = temperature, with_entropy, chunk_tokens

    def __call__(self, head: Callable[[Tensor], Tensor], hidden_BSH: Tensor) -> Tensor:
        hidden_MH = hidden_BSH[self.at_M]
        chunks = zip(hidden_MH.split(self.chunk_tokens), self.targets_M.split(self.chunk_tokens), strict=True)
        return torch.cat([self._chunk(head, hidden_CH, targets_C) for hidden_CH, targets_C in chunks], -1)

    def _chunk(self, head: Callable[[Tensor], Tensor], hidden_CH: Tensor, targets_C: Tensor) -> Tensor:
        statistics: list[tuple[Tensor, ...]] = []

        def run(hidden_CH: Tensor) -> Tensor:
            logits_CV = head(hidden_CH)
            if not statistics:  # what backward computes again is the logits alone
                statistics.append(token_statistics(logits_CV.detach(), targets_C, self.temperature, self.with_entropy))
            normaliser_C, logprobs_C, *entropy = statistics[0]
            logprobs_C = TokenLogprob.apply(logits_CV, targets_C, self.temperature, normaliser_C, logprobs_C)
            return torch.stack([logprobs_C, *entropy])

        if not torch.is_grad_enabled():
            return run(hidden_CH)
        return checkpoint(run, hidden_CH, use_reentrant=False, preserve_rng_state=False)


def token_statistics(
    logits_CV: Tensor, targets_C: Tensor, temperature: float, with_entropy: bool
) -> tuple[Tensor, ...]:
    """Of softmax(logits / temperature): log of the normaliser, log-prob of the target and, if asked, entropy; [C] each.

    In float32 (float64 stays), by blocks of rows that stay in a CPU core's cache: no copy of the logits as a whole.
    """
    blocks = []
    wide = torch.promote_types(logits_CV.dtype, torch.float32)
    for logits_BV, targets_B in row_blocks(logits_CV, targets_C):
        logits_BV = logits_BV.to(wide, copy=True).div_(temperature)
        peak_B1 = logits_BV.amax(-1, keepdim=True)
        target_B = logits_BV.gather(-1, targets_B[:, None])[:, 0]
        weights_BV = logits_BV.sub_(peak_B1).exp()
        total_B = weights_BV.sum(-1)
        normaliser_B = peak_B1[:, 0] + total_B.log()
        block = [normaliser_B, target_B - normaliser_B]
        if with_entropy:
            logits_BV.clamp_(min=torch.finfo(torch.float32).min)  # 0 · (-inf) is 0
            block.append(total_B.log() - torch.linalg.vecdot(weights_BV, logits_BV) / total_B)
        blocks.append(torch.stack(block))
    return tuple(torch.cat(blocks, -1))


class TokenLogprob(torch.autograd.Function):
    """``logprobs_C`` of ``token_statistics``, with the gradient by the logits; saves them no more than as they came."""

    @staticmethod
    def forward(
        ctx: Any, logits_CV: Tensor, targets_C: Tensor, temperature: float, normaliser_C: Tensor, logprobs_C: Tensor
    ) -> Tensor:
        ctx.save_for_backward(logits_CV, targets_C, normaliser_C)
        ctx.temperature = temperature
        return logprobs_C.clone()

    @staticmethod
    def backward(ctx: Any, grad_C: Tensor) -> Any:
        """d/dlogits = (one-hot - softmax) / temperature."""
        logits_CV, targets_C, normaliser_C = ctx.saved_tensors
        grad_CV = torch.empty_like(logits_CV)
        columns = (targets_C[:, None], normaliser_C[:, None], (grad_C / ctx.temperature)[:, None])
        for out_BV, logits_BV, targets_B1, normaliser_B1, grad_B1 in row_blocks(grad_CV, logits_CV, *columns):
            weights_BV = logits_BV.to(normaliser_C.dtype, copy=True).div_(ctx.temperature).sub_(normaliser_B1).exp_()
            out_BV.copy_(weights_BV.mul_(-grad_B1).scatter_add_(-1, targets_B1, grad_B1))
        return grad_CV, None, None, None, None


@dataclass(frozen=True)
class LogitRule:
    """What a model does to the head's output, and how to keep it from doing that to ours: a scale, then a soft cap."""

    scale: float = 1.0
    softcap: float | None = None

    def __call__(self, logits: Tensor) -> Tensor:
        logits = logits if self.scale == 1.0 else logits * self.scale
        return logits if self.softcap is None else (logits / self.softcap).tanh() * self.softcap


_rules: "WeakKeyDictionary[nn.Module, LogitRule | None]" = WeakKeyDictionary()


def read_logprobs(model: nn.Module, inputs: dict[str, Any], reader: TokenReader, rule: LogitRule | None) -> Tensor:
    """``reader``'s result, [1 or 2, M], by one forward of ``model``."""
    if rule is None:
        return reader(lambda logits: logits, model(**inputs, use_cache=False).logits)
    head = model.get_output_embeddings()  # type: ignore[operator]
    original = head.forward
    with (
        replaced_forward(head, lambda hidden: reader(lambda x: rule(original(x)), hidden)[None]),
        _uncapped(model, rule),
    ):
        return model(**inputs, use_cache=False).logits[0] / rule.scale


def logit_rule(model: nn.Module, tokens_11: Tensor) -> LogitRule | None:
    """The rule of ``model``, found at the first call."""
    if model not in _rules:
        _rules[model] = _find_rule(model, tokens_11.to(next(model.parameters()).device))
    return _rules[model]


def _find_rule(model: nn.Module, tokens_11: Tensor) -> LogitRule | None:
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

    with torch.no_grad(), uncompiled(), replaced_forward(head, spy):
        logits = model(input_ids=tokens_11, use_cache=False).logits
        rule = _declared_rule(model)
        if len(seen) != 1 or not _same(rule(seen[0]), logits):
            return None
        with _uncapped(model, rule):
            uncapped = model(input_ids=tokens_11, use_cache=False).logits
        return rule if _same(seen[1] * rule.scale, uncapped) else None


def _same(ours: Tensor, theirs: Tensor) -> bool:
    """Up to rounding in our type; a soft cap far above the logits changes little, but more than that."""
    rtol = 1e-2 if ours.dtype.itemsize < 4 else 1e-5
    return ours.shape == theirs.shape and torch.allclose(ours.float(), theirs.float(), rtol=rtol, atol=rtol * 1e-3)


def _declared_rule(model: nn.Module) -> LogitRule:
    """By the names that models of transformers use for it."""
    config = model.config.get_text_config()  # type: ignore[union-attr,operator]
    scale = float(getattr(config, "logit_scale", None) or 1.0) / float(getattr(config, "logits_scaling", None) or 1.0)
    return LogitRule(scale, getattr(config, "final_logit_softcapping", None))


@contextmanager
def _uncapped(model: nn.Module, rule: LogitRule) -> Iterator[None]:
    """The model leaves soft-capping to us: it cannot be undone afterwards, as a factor can."""
    config = model.config.get_text_config()  # type: ignore[union-attr,operator]
    if rule.softcap is not None:
        config.final_logit_softcapping = None
    try:
        yield
    finally:
        if rule.softcap is not None:
            config.final_logit_softcapping = rule.softcap


_BLOCK = 2**19
"""Logits of a block on CPU: 2 MiB in float32. Other devices take all rows at once."""


def row_blocks(logits_NV: Tensor, *others: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Rows of the arguments, block by block, small enough that several passes over one read a CPU core's cache."""
    N, V = logits_NV.shape
    rows = max(_BLOCK // V, 1) if logits_NV.device.type == "cpu" else max(N, 1)
    return zip(logits_NV.split(rows), *(other.split(rows) for other in others), strict=True)

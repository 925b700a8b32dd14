"""Scores of texts by a sequence classifier; those of a group as one row, with what they share only once.

What they share is the longest run of tokens with which all of them begin. Under causal attention its hidden states do
not depend on what follows, so the scores and gradients are those of separate rows, for fewer tokens. Legend, beyond
that of ``types``: N texts, S tokens of a packed row.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import accumulate, pairwise
from typing import Any, get_args

import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from torch import Tensor, nn
from transformers import BatchEncoding, PreTrainedTokenizerBase

from gopo_lightning.distributed.decoder_layers import plain_outputs
from gopo_lightning.distributed.fsdp import is_sharded
from gopo_lightning.policy.model import evaluating
from gopo_lightning.policy.prefix_sharing import PrefixSharing
from gopo_lightning.policy.shared_prefix import (
    PackedGroups,
    require_called,
    shared_prefix_attention,
    supports_shared_prefix,
)
from gopo_lightning.rewards.loading import pad
from gopo_lightning.rewards.padding import may_pad
from gopo_lightning.types import TensorStruct


@dataclass(frozen=True)
class PackedTexts(TensorStruct):
    """One row without padding: [prefix | rest of text 1 | rest of text 2 | ... | prefix of the next | ...].

    The texts [5, 6, 7] and [5, 6, 8, 9] give

        tokens_1S    = [[5, 6, 7, 8, 9]]
        positions_1S = [[0, 1, 2, 2, 3]]
        last_N       = [2, 4]
        lengths      = [[2, 1, 2]]
    """

    tokens_1S: Tensor
    """int64."""
    positions_1S: Tensor
    """int64, of each token in its own text."""
    last_N: Tensor
    """int64, where in the row the score of each text is read: at its last token that is not padding, which is where
    transformers' classifiers read it."""
    lengths: list[list[int]]
    """Of each pair or list: tokens of the prefix, then of the rest of each text."""


def pack(texts: Sequence[Sequence[int]], group_sizes: Sequence[int], pad_token_id: int) -> PackedTexts:
    """The tokens of N texts, of which so many at a time belong together, as one row."""
    tokens, positions, last, lengths = list[int](), list[int](), list[int](), list[list[int]]()
    for start, end in pairwise([0, *accumulate(group_sizes)]):
        group, begin = texts[start:end], len(tokens)
        L = _common_prefix(group)
        tokens += group[0][:L]
        positions += range(L)
        for text in group:
            n = _last(text, pad_token_id)
            last.append(begin + n if n < L else len(tokens) + n - L)
            tokens += text[L:]
            positions += range(L, len(text))
        lengths.append([L, *(len(text) - L for text in group)])
    return PackedTexts(torch.tensor([tokens]), torch.tensor([positions]), torch.tensor(last), lengths)


def _common_prefix(texts: Sequence[Sequence[int]]) -> int:
    """Number of tokens with which all ``texts`` begin."""
    shortest = min(map(len, texts))
    return next((n for n in range(shortest) if len({text[n] for text in texts}) > 1), shortest)


def _last(text: Sequence[int], pad_token_id: int) -> int:
    """Index of the last token that is not padding; 0 if there is none."""
    return next((n for n in reversed(range(len(text))) if text[n] != pad_token_id), 0)


def shared_scores(model: nn.Module, packed: PackedTexts) -> Tensor:
    """scores_N of one forward over a packed row, entered through the model's own forward and read at its head."""
    prefixes, endings = zip(*((prefix, rest) for prefix, *rest in packed.lengths), strict=True)
    layout, seen = PackedGroups(prefixes, endings, packed.tokens_1S.device), []
    handle = _head(model).register_forward_hook(lambda module, args, logits_1S1: seen.append(logits_1S1))
    try:
        with plain_outputs(model), shared_prefix_attention(model, layout):
            model(
                input_ids=packed.tokens_1S,
                attention_mask=torch.ones_like(packed.tokens_1S),  # read by nobody: the layout is the mask
                position_ids=packed.positions_1S,
                use_cache=False,
                shared_prefix=layout,
            )
    finally:
        handle.remove()
    require_called(model, layout)
    return seen[0].flatten()[packed.last_N]


def separate_scores(model: nn.Module, tokenizer: PreTrainedTokenizerBase, encoded: BatchEncoding) -> Tensor:
    """scores_N of N texts, each in a row of its own."""
    inputs = pad(tokenizer, encoded, range(len(encoded["input_ids"])))
    with plain_outputs(model):
        return model(**inputs.to(next(model.parameters()).device)).logits.squeeze(-1)


class Scorer:
    """Scores texts, those of a pair, list or group together where that is allowed and, under `auto`, saves tokens.

    Args:
        tokenizer: pads on the right.
        mode: `auto` checks once, on two pairs or lists, that both forms agree, else scores texts apart and says why;
            `always` raises a ValueError where they do not, or the data have nothing to share; `never` does not share.
        trains: the check compares gradients too.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, mode: PrefixSharing, *, trains: bool = True) -> None:
        if mode not in get_args(PrefixSharing):
            raise ValueError(f"prefix_sharing={mode!r} is unknown; use one of {list(get_args(PrefixSharing))}.")
        self.tokenizer, self.mode, self.trains = tokenizer, mode, trains
        self._allowed: bool | None = None
        self._pads: bool | None = None

    def __call__(self, model: nn.Module, encoded: BatchEncoding, group_sizes: Sequence[int] | None) -> Tensor:
        """scores_N of N texts, which belong together as ``group_sizes`` says (None: each stands alone)."""
        if self.mode == "always" and group_sizes is None:
            raise ValueError(
                "prefix_sharing=always, but the data are no pairs or lists: their texts share no prompt. Use auto."
            )
        if group_sizes is None or not self.may_share(model, encoded, group_sizes):
            self._check_padding(model, encoded)
            return separate_scores(model, self.tokenizer, encoded)
        packed = self.packed(encoded, group_sizes)
        num_separate = len(encoded["input_ids"]) * max(map(len, encoded["input_ids"]))
        if self.mode == "always" or packed.tokens_1S.numel() < num_separate:
            return shared_scores(model, packed.to(next(model.parameters()).device))
        return separate_scores(model, self.tokenizer, encoded)

    def may_share(self, model: nn.Module, encoded: BatchEncoding, group_sizes: Sequence[int]) -> bool:
        """Whether pairs or lists may be forwarded as one, as these first ones say."""
        if self._allowed is None:
            self._allowed = self.mode != "never" and self._decide(model, encoded, group_sizes)
        return self._allowed

    def _check_padding(self, model: nn.Module, encoded: BatchEncoding) -> None:
        """Find out, once, on which side texts are padded; ValueError where a score depends on the others anyway."""
        if self._pads is not None or len({*map(len, encoded["input_ids"])}) == 1 or is_sharded(model):
            return
        parameter = next(model.parameters())
        with evaluating(model), torch.no_grad(), torch.autocast(parameter.device.type, enabled=False):
            score = partial(separate_scores, model, self.tokenizer)
            self._pads = may_pad(model, self.tokenizer, encoded, lambda few: score(few).float())
        if not self._pads:
            raise ValueError(
                f"{type(model).__name__} gives a text another score beside a longer one, whichever side is padded, so "
                "batches cannot train it. Use another model."
            )

    def packed(self, encoded: BatchEncoding, group_sizes: Sequence[int]) -> PackedTexts:
        """`pack` with the tokenizer's padding."""
        pad_token_id = self.tokenizer.pad_token_id
        return pack(encoded["input_ids"], group_sizes, -1 if pad_token_id is None else int(pad_token_id))

    def _decide(self, model: nn.Module, encoded: BatchEncoding, group_sizes: Sequence[int]) -> bool:
        allowed, reason = supports_shared_prefix(model)
        if allowed and _head(model) is None:
            allowed, reason = False, "its head is not called score"
        if allowed and not self.trains and is_sharded(model):
            allowed, reason = False, "its weights are sharded, and ranks may have other numbers of texts"
        if allowed:
            try:
                allowed, reason = self._agrees(model, encoded, group_sizes[:2])
            except Exception as error:  # noqa: BLE001 - whatever a foreign model does not take is a reason not to share
                allowed, reason = False, f"{type(error).__name__}: {error}".partition("\n")[0]
        if not allowed and self.mode == "always":
            raise ValueError(f"prefix_sharing=always, but {type(model).__name__} cannot: {reason}. Use auto or never.")
        if not allowed:
            rank_zero_info(f"texts are forwarded apart, each with its prompt: {reason}")
        return allowed

    def _agrees(self, model: nn.Module, encoded: BatchEncoding, group_sizes: Sequence[int]) -> tuple[bool, str]:
        """Both forms on these first groups, outside autocast and without dropout; and what to say if they differ."""
        few = BatchEncoding({key: values[: sum(group_sizes)] for key, values in encoded.items()})
        parameter = next(model.parameters())
        packed = self.packed(few, group_sizes).to(parameter.device)
        padding = torch.full((1, 1), self.tokenizer.pad_token_id or 0, device=parameter.device)
        vocabulary_V = torch.cat([packed.tokens_1S, padding], -1).unique()
        forms = (lambda: separate_scores(model, self.tokenizer, few)), (lambda: shared_scores(model, packed))
        with evaluating(model), torch.autocast(parameter.device.type, enabled=False):
            if self.trains:
                with torch.enable_grad():
                    found = [_with_gradient(model, vocabulary_V, form) for form in forms]
            else:
                found = [(form(), torch.ones(1)) for form in forms]
        (scores, gradient), (shared, shared_gradient) = found
        differences = (
            float((shared - scores).abs().mean() / scores.abs().mean().clamp(min=1.0)),
            float((shared_gradient - gradient).norm() / gradient.norm()),
        )
        tolerance = 1e-3 if parameter.dtype == torch.float32 else 5e-2
        return max(differences) <= tolerance, (  # False for NaN
            f"scores differ by {differences[0]:.1e} of their size and gradients by {differences[1]:.1e} when texts "
            f"share their prompt, more than {tolerance:.0e}"
        )


def _head(model: nn.Module) -> Any:
    """What maps hidden states to scores at every position, or None."""
    base: Any = model
    return getattr(base.get_base_model() if hasattr(base, "get_base_model") else base, "score", None)


def _with_gradient(model: nn.Module, vocabulary_V: Tensor, forward: Callable[[], Tensor]) -> tuple[Tensor, Tensor]:
    """Scores, and the gradient of a fixed sum of them by the embeddings of the V tokens that occur, ascending.

    It has come back through every layer, whichever weights are trained, and no parameter's ``grad`` is touched.
    """
    seen: list[tuple[Tensor, Tensor]] = []

    def detach(module: nn.Module, args: Any, output: Tensor) -> Tensor:
        seen.append((args[0], output.detach().requires_grad_()))
        return seen[-1][1]

    handle = model.get_input_embeddings().register_forward_hook(detach)  # type: ignore[operator]
    try:
        scores_N = forward()
    finally:
        handle.remove()
    tokens, leaf = seen[0]
    weights_N = torch.arange(1, len(scores_N) + 1, device=scores_N.device).cos()
    (grad,) = torch.autograd.grad((scores_N * weights_N).sum(), leaf)
    rows = torch.searchsorted(vocabulary_V.to(tokens.device), tokens.flatten())
    gradient_VH = grad.new_zeros(len(vocabulary_V), grad.shape[-1]).index_add_(0, rows, grad.flatten(0, 1))
    return scores_N.detach(), gradient_VH

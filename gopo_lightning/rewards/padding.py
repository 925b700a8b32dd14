"""Whether a classifier's score of a text is the same beside a longer one, and its head in float32."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import BatchEncoding, PreTrainedModel, PreTrainedTokenizerBase

from gopo_lightning.rewards.loading import select


def may_pad(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    encoded: BatchEncoding,
    score: Callable[[BatchEncoding], Tensor],
) -> bool:
    """Whether texts of unequal lengths may stand in one micro-batch; sets the tokenizer's side of padding.

    Most classifiers read their score at a text's last or first token and are padded on the right; some, such as
    XLNet's, read it in the last column and need padding on the left. Whichever gives the shortest text the score that
    it has alone is taken.

    Args:
        model: the classifier.
        tokenizer: pads on the right so far.
        encoded: texts, of at least two lengths.
        score: float32 scores of some texts, in one forward.
    """
    lengths = [len(ids) for ids in encoded["input_ids"]]
    short, long = lengths.index(min(lengths)), lengths.index(max(lengths))
    alone = score(select(encoded, [short]))[0]
    tolerance = 1e-2 if next(model.parameters()).dtype == torch.float32 else 0.2  # rounding, by TF32 too, is within
    for side in ("right", "left"):
        tokenizer.padding_side = side
        beside = score(select(encoded, [short, long]))[0]
        if bool((beside - alone).abs() <= tolerance * alone.abs().clamp(min=1.0)):  # False for NaN
            return True
    tokenizer.padding_side = "right"
    return False


def float32_head(model: PreTrainedModel) -> None:
    """Let the head compute in float32, whatever the dtype of the other layers.

    It is called `score` or `classifier`; elsewhere it is the last linear layer with a single output.
    """
    named = [getattr(model, name, None) for name in ("score", "classifier")]
    heads: list[Any] = [head for head in named if isinstance(head, nn.Module)]
    if not heads:
        heads = [m for m in model.modules() if isinstance(m, nn.Linear) and m.out_features == 1][-1:]
    for head in heads:
        head.float()
        head.register_forward_pre_hook(lambda _, inputs: tuple(x.float() for x in inputs))

"""What comes after texts of different lengths, from one forward without a cache."""

import torch
from torch import Tensor, nn

from gopo_lightning.distributed.decoder_layers import plain_outputs


def next_token_logits(model: nn.Module, tokens_NS: Tensor, lengths_N: Tensor) -> Tensor:
    """logits_NV after the first ``lengths_N`` tokens of each row; the rest is padding on the right, which is not seen.

    So a row's logits are those that it has alone, also where ``model`` takes padding for text.
    """
    longest, shortest = int(lengths_N.max()), int(lengths_N.min())
    mask_NS = torch.arange(longest, device=lengths_N.device) < lengths_N[:, None]
    with plain_outputs(model):
        logits_NSV = model(
            input_ids=tokens_NS[:, :longest],
            attention_mask=mask_NS.long(),
            use_cache=False,
            logits_to_keep=longest - shortest + 1,
        ).logits
    # counted from the end: a model may return the logits of all tokens, or of the last ones
    return logits_NSV[torch.arange(len(mask_NS), device=mask_NS.device), lengths_N - 1 - longest]

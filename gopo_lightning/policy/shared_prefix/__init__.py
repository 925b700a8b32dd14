"""Attention in which the completions of a group share their prompt: computed once, stored once, never expanded.

One registered attention function serves training and decoding. transformers hands it the queries, keys and values of
an ordinary forward of the model, together with whatever object we passed as the keyword ``shared_prefix``:

* ``PackedGroups``: one row without padding, [prompt | text 1 | ... | text G | next prompt | ...], for log-probs of
  completions or scores of texts, and their gradient.
* ``PrefixCache``: first the prompts alone (prefill), then one token of every completion at a time (decode).

A text attends to its prompt, and causally to itself, under one softmax; in a layer with a sliding window, to what
of both is near. That is exact: the same numbers as G separate sequences, for L + G*T tokens in place of G*(L + T).
Legend, beyond that of ``types``:

    H  query heads     K  key/value heads     R = H / K  query heads that read the same keys and values
    S  tokens of a packed row                 D  width of a head
"""

from gopo_lightning.policy.shared_prefix.attention import AttentionRule
from gopo_lightning.policy.shared_prefix.packing import PackedGroups
from gopo_lightning.policy.shared_prefix.patching import (
    IMPLEMENTATION,
    require_called,
    shared_prefix_attention,
    supports_shared_prefix,
)
from gopo_lightning.policy.shared_prefix.prefix_cache import PrefixCache

__all__ = [
    "IMPLEMENTATION",
    "AttentionRule",
    "PackedGroups",
    "PrefixCache",
    "require_called",
    "shared_prefix_attention",
    "supports_shared_prefix",
]

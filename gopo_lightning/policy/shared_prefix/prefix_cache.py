"""What a forward in decoding carries: the prompts, and then a token of each completion."""

from collections.abc import Iterable

from torch import Tensor, nn

from gopo_lightning.policy.shared_prefix.attention import (
    AttentionRule,
    attend_prompt,
    attend_token,
    attention_mask,
    key_bias,
)


class PrefixCache:
    """Keys and values of a rollout: the prompts' once per prompt, the completions' in buffers filled token by token.

    Args:
        prompt_mask_PL: bool, True on real tokens.
        max_new_tokens: T, the width of the buffers.
    """

    fused = False

    def __init__(self, prompt_mask_PL: Tensor, max_new_tokens: int) -> None:
        self.max_new_tokens, self.prompt_mask_PL = max_new_tokens, prompt_mask_PL
        self.longest = prompt_mask_PL.shape[1] + max_new_tokens
        """L + T: a window of as many tokens hides nothing."""
        self.prompts: dict[int, tuple[Tensor, Tensor]] = {}
        self.suffixes: dict[int, tuple[Tensor, Tensor]] = {}
        self.num_tokens = 0
        """Completion tokens written so far, by each row; ``advance`` before each decoding step."""
        self.called = False
        self.windows = set[int | None]()
        """As in ``PackedGroups``, both."""
        self._seen: dict[int | None, Tensor | None] = {}

    def prepare(self, windows: Iterable[int | None]) -> None:
        """Nothing: what layers need is made when they come by."""

    def advance(self) -> None:
        """The next forward carries one more token of each completion."""
        self.num_tokens += 1
        if self.num_tokens == 1 or any(window is not None for window in self._seen):
            self._seen.clear()

    def attend(self, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, rule: AttentionRule) -> Tensor:
        """[P, H, L, D] for the prompts, then [A, H, 1, D] for a token of each row, in the layer of this ``module``."""
        layer = int(module.layer_idx)  # type: ignore[arg-type]
        window = None if rule.window is None or rule.window >= self.longest else rule.window
        if window not in self._seen:
            self._seen[window] = self._prompt_seen(window)
        if self.num_tokens == 0:
            self.prompts[layer] = key.contiguous(), value.contiguous()
            return attend_prompt(query, key, value, self._seen[window], rule)
        suffix = self._append(layer, key, value)
        prompt: tuple[Tensor, Tensor] | None = self.prompts[layer]
        if window is not None:
            key_AKTD, value_AKTD = suffix
            suffix = key_AKTD[:, :, -window:], value_AKTD[:, :, -window:]
            prompt = prompt if self.num_tokens < window else None
        return attend_token(query, prompt, suffix, self._seen[window], rule)

    def _prompt_seen(self, window: int | None) -> Tensor | None:
        """What is seen of the prompts: `attention_mask` for themselves, `key_bias` for the present tokens."""
        if self.num_tokens == 0:
            return attention_mask(self.prompt_mask_PL, window)
        seen_PL = self.prompt_mask_PL
        if window is not None:  # a prompt's last token is as many places away as there are new ones
            seen_PL = seen_PL & (seen_PL.flip(-1).cumsum(-1).flip(-1) <= window - self.num_tokens)
        return key_bias(seen_PL)

    def keep(self, prompts_P: Tensor, rows_A: Tensor) -> None:
        """Go on with these prompts, and of each with as many of these rows (indices into the present P*G)."""
        whole = len(prompts_P) == len(next(iter(self.prompts.values()))[0])
        for layer, prompt in self.prompts.items():
            if not whole:
                self.prompts[layer] = prompt[0][prompts_P], prompt[1][prompts_P]
            if layer in self.suffixes:
                key_AKTD, value_AKTD = self.suffixes[layer]
                self.suffixes[layer] = key_AKTD[rows_A], value_AKTD[rows_A]
        if not whole:
            self.prompt_mask_PL = self.prompt_mask_PL[prompts_P]
            self._seen.clear()

    def _append(self, layer: int, key_AK1D: Tensor, value_AK1D: Tensor) -> tuple[Tensor, Tensor]:
        """Write the keys and values of one token; returns all so far, [A, K, num_tokens, D] each."""
        new = key_AK1D, value_AK1D
        if layer not in self.suffixes:
            A, K, _, D = key_AK1D.shape
            self.suffixes[layer] = tuple(x.new_empty(A, K, self.max_new_tokens, D) for x in new)  # type: ignore[assignment]
        for buffer_AKTD, x_AK1D in zip(self.suffixes[layer], new, strict=True):
            buffer_AKTD[:, :, self.num_tokens - 1] = x_AK1D[:, :, 0]
        key_AKTD, value_AKTD = self.suffixes[layer]
        return key_AKTD[:, :, : self.num_tokens], value_AKTD[:, :, : self.num_tokens]

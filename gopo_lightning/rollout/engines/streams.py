"""Random streams of the rollout: one per completion, keyed by what the completion is and never by where it is made.

Rank, world size, batch position and the dropping of finished rows do not enter, so one process, DDP and FSDP sample the
same text. The generator is SplitMix64 (Steele, Lea and Flood, OOPSLA 2014), which is counter-based: draw t of a stream
is a function of its seed and t alone. It is integer arithmetic, hence the same on every device.
"""

import hashlib
import struct
from collections.abc import Sequence

import torch
from torch import Tensor

_INCREMENT = 0x9E3779B97F4A7C15
_MULTIPLIERS = (0xBF58476D1CE4E5B9, 0x94D049BB133111EB)


def stream_seeds(seed: int, step: int, prompt_indices: Sequence[int], num_completions: int) -> list[int]:
    """N = P * G seeds of 63 bits, a stable hash of (seed, step, prompt index, completion index).

    >>> stream_seeds(0, 0, [7], 2) == stream_seeds(0, 0, [3, 7], 2)[2:]
    True
    """
    return [_hash(seed, step, index, g) for index in prompt_indices for g in range(num_completions)]


def uniforms(seeds_N: Sequence[int], num_tokens: int, device: torch.device | str = "cpu") -> Tensor:
    """float64 [N, T] in [0, 1), row n from stream ``seeds_N[n]``; a longer row starts with the shorter one."""
    state_N1 = torch.tensor([_signed(seed) for seed in seeds_N], dtype=torch.int64, device=device)[:, None]
    count_T = torch.arange(1, num_tokens + 1, dtype=torch.int64, device=device)
    z_NT = state_N1 + count_T * _signed(_INCREMENT)  # int64 wraps: arithmetic modulo 2**64
    z_NT = (z_NT ^ _shift_right(z_NT, 30)) * _signed(_MULTIPLIERS[0])
    z_NT = (z_NT ^ _shift_right(z_NT, 27)) * _signed(_MULTIPLIERS[1])
    z_NT = z_NT ^ _shift_right(z_NT, 31)
    return _shift_right(z_NT, 11).double() * 2.0**-53


def _hash(*key: int) -> int:
    """63 bits of BLAKE2b over the integers of ``key``, each in [-2**63, 2**63)."""
    digest = hashlib.blake2b(struct.pack(f"<{len(key)}q", *key), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def _signed(value: int) -> int:
    """The int64 with the bits of the unsigned ``value``."""
    return value - 2**64 if value >= 2**63 else value


def _shift_right(z: Tensor, bits: int) -> Tensor:
    """Logical shift: zeros come in from the left, where ``>>`` would copy the sign."""
    return (z >> bits) & (2 ** (64 - bits) - 1)

"""Random streams: golden values, independence of everything but the key, and uniformity."""

import torch

from gopo_lightning.rollout.engines.streams import stream_seeds, uniforms


def test_golden_seeds() -> None:
    assert stream_seeds(0, 0, [0], 2) == [5809880761037817570, 1350756519748367821]
    assert all(0 <= seed < 2**63 for seed in stream_seeds(2**31, 10**6, range(50), 4))


def test_golden_uniforms() -> None:
    # SplitMix64 from state 1234567, as published with its reference implementation, over 2**64
    published = [6457827717110365317, 3203168211198807973, 9817491932198370423, 4593380528125082431]
    expected = torch.tensor([[x / 2**64 for x in published]], dtype=torch.float64)
    torch.testing.assert_close(uniforms([1234567], 4), expected, atol=2.0**-52, rtol=0)


def test_seed_depends_on_every_part_of_the_key_and_on_nothing_else() -> None:
    seeds = stream_seeds(1, 2, [3, 4], 2)
    assert seeds == stream_seeds(1, 2, [3], 2) + stream_seeds(1, 2, [4], 2)
    assert seeds[:1] == stream_seeds(1, 2, [3], 1)
    others = stream_seeds(0, 2, [3, 4], 2) + stream_seeds(1, 0, [3, 4], 2) + stream_seeds(2, 1, [3, 4], 2)
    assert len({*seeds, *others}) == 16


def test_row_is_the_same_alone_in_another_batch_and_cut_short() -> None:
    seeds = stream_seeds(5, 0, range(4), 2)
    whole = uniforms(seeds, 20)
    assert torch.equal(whole[3:4], uniforms(seeds[3:4], 20))
    assert torch.equal(whole[:, :7], uniforms(seeds, 7))
    assert whole.dtype == torch.float64


def test_streams_are_uniform_and_uncorrelated() -> None:
    draws = uniforms(stream_seeds(0, 0, range(100), 10), 200)
    assert draws.min() >= 0
    assert draws.max() < 1
    counts = torch.histc(draws.float(), bins=100, min=0, max=1).double()
    expected = draws.numel() / 100
    chi2 = float(((counts - expected) ** 2 / expected).sum())
    assert 56 < chi2 < 160  # 99 degrees of freedom: outside by chance once in 1e4
    centred = draws - 0.5
    for a, b in ((centred[:, :-1], centred[:, 1:]), (centred[:-1], centred[1:])):
        assert abs(float((a * b).mean() * 12)) < 0.01

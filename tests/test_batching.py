"""Micro-batches: whole groups, within the budget, the same number on every rank."""

import pytest
import torch

from gopo_lightning.training.micro_batches import MicroBatch, fill_up, forwarded_tokens, minibatches, split_groups
from gopo_lightning.types import Completions, Prompt, PromptBatch, Rollout

G = 2


def experience(prompt_lengths: list[int], completion_lengths: list[int]) -> Rollout:
    prompts = PromptBatch.collate([Prompt(i, (1,) * n, "") for i, n in enumerate(prompt_lengths)], 0)
    lengths_N = torch.tensor(completion_lengths).repeat_interleave(G)
    mask_NT = torch.arange(max(completion_lengths)) < lengths_N[:, None]
    N = len(mask_NT)
    completions = Completions(mask_NT.long(), mask_NT, torch.zeros(N, dtype=torch.bool), ("",) * N)
    zeros = torch.zeros(len(prompt_lengths), G)
    return Rollout(prompts, completions, zeros[..., None], zeros, completions.tokens_NT.shape[1])


def groups(batches: list[torch.Tensor]) -> list[list[int]]:
    return [batch.tolist() for batch in batches]


def test_longest_first_within_the_budget() -> None:
    batch = experience([4, 4, 4, 4], [3, 8, 5, 1])
    assert groups(split_groups(batch, budget=None, shared=True)) == [[1, 2, 0, 3]]
    # shared: a group costs L + 2 T: 20, 14, 10, 6
    assert groups(split_groups(batch, budget=40, shared=True)) == [[1, 2], [0, 3]]
    assert groups(split_groups(batch, budget=44, shared=True)) == [[1, 2, 0], [3]]
    # replicated: 2 (L + T): 24, 18, 14, 10
    assert groups(split_groups(batch, budget=40, shared=False)) == [[1], [2, 0], [3]]
    assert groups(split_groups(batch, budget=1, shared=True)) == [[1], [2], [0], [3]]


def test_inactive_groups_are_left_out() -> None:
    batch = experience([4, 4, 4, 4], [3, 8, 5, 1])
    active_P = torch.tensor([False, True, True, False])
    assert groups(split_groups(batch, budget=None, shared=True, active_P=active_P)) == [[1, 2]]
    none_P = torch.zeros(4, dtype=torch.bool)
    assert groups(split_groups(batch, budget=None, shared=True, active_P=none_P)) == []


def numbered(batches: list[MicroBatch]) -> list[tuple[list[int], bool]]:
    return [(batch.groups_P.tolist(), batch.counts) for batch in batches]


def test_ranks_keep_step_by_halving_and_then_by_the_shortest_group_without_weight() -> None:
    batch = experience([4, 4, 4, 4], [3, 8, 5, 1])
    assert numbered(fill_up(batch, [torch.tensor([1, 2])], 1)) == [([1, 2], True)]
    assert numbered(fill_up(batch, [torch.tensor([1, 2])], 2)) == [([1], True), ([2], True)]
    assert numbered(fill_up(batch, [torch.tensor([1, 2])], 4)) == [([1], True), ([2], True), *[([3], False)] * 2]
    assert numbered(fill_up(batch, [], 2)) == [([3], False)] * 2
    every = [torch.tensor([p]) for p in range(4)]
    assert numbered(fill_up(batch, every, 6))[4:] == [([3], False)] * 2  # more than this rank has groups


@pytest.mark.parametrize("budget", [None, 1, 17, 30, 64])
@pytest.mark.parametrize("number", [4, 5])
def test_every_group_once(budget: int | None, number: int) -> None:
    batch = experience([3, 9, 1, 5], [7, 2, 4, 4])
    batches = fill_up(batch, split_groups(batch, budget=budget, shared=True), number)
    assert len(batches) == number
    assert sorted(torch.cat([groups_P for groups_P, counts in batches if counts]).tolist()) == [0, 1, 2, 3]


@pytest.mark.parametrize("num_minibatches", [1, 2, 3, 6])
def test_minibatches_are_the_same_prompts_on_any_number_of_ranks(num_minibatches: int) -> None:
    """Of six prompts in all; rank r of W has those that the sampler deals to it, [r::W]."""

    def drawn(world_size: int) -> list[set[int]]:
        parts: list[set[int]] = [set() for _ in range(num_minibatches)]
        for rank in range(world_size):
            generator = torch.Generator().manual_seed(7)
            mine = list(range(6))[rank::world_size]
            rows = minibatches(len(mine), num_minibatches, generator, rank=rank, world_size=world_size)
            for part, rows_P in zip(parts, rows, strict=True):
                part |= {mine[row] for row in rows_P.tolist()}
        return parts

    whole = drawn(1)
    assert [len(part) for part in whole] == [6 // num_minibatches] * num_minibatches
    assert set().union(*whole) == set(range(6))
    assert drawn(2) == drawn(3) == drawn(6) == whole


def test_forwarded_tokens_count_the_padding() -> None:
    batch = experience([4, 2], [3, 5])  # 2 completions each
    assert forwarded_tokens(batch, shared=True) == (4 + 2 + 2 * (3 + 5), 4 + 2 + 2 * (3 + 5))
    assert forwarded_tokens(batch, shared=False) == (2 * (4 + 2) + 2 * (3 + 5), 4 * max(4 + 3, 2 + 5))


def test_completions_without_tokens_keep_a_column() -> None:
    mask_NT = torch.tensor([[True, True], [False, False]])
    completions = Completions(torch.ones(2, 2, dtype=torch.int64), mask_NT, torch.zeros(2, dtype=torch.bool), ("a", ""))
    assert completions.select(torch.tensor([1])).tokens_NT.shape == (1, 1)
    assert completions.select(torch.tensor([0])).tokens_NT.shape == (1, 2)

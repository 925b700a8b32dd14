"""Micro-batches: whole groups, within the budget, the same number on every rank."""

import pytest
import torch

from gopo_lightning.batching import forwarded_tokens, split_groups
from gopo_lightning.structs import Completions, Experience, Prompt, PromptBatch

G = 2


def experience(prompt_lengths: list[int], completion_lengths: list[int]) -> Experience:
    prompts = PromptBatch.collate([Prompt(i, (1,) * n, "") for i, n in enumerate(prompt_lengths)], 0)
    lengths_N = torch.tensor(completion_lengths).repeat_interleave(G)
    mask_NT = torch.arange(max(completion_lengths)) < lengths_N[:, None]
    N = len(mask_NT)
    completions = Completions(mask_NT.long(), mask_NT, torch.zeros(N, dtype=torch.bool), ("",) * N)
    zeros = torch.zeros(len(prompt_lengths), G)
    return Experience(prompts, completions, zeros[..., None], zeros, zeros)


def groups(batches: list[torch.Tensor]) -> list[list[int]]:
    return [batch.tolist() for batch in batches]


def test_longest_first_within_the_budget() -> None:
    batch = experience([4, 4, 4, 4], [3, 8, 5, 1])
    assert groups(split_groups(batch, budget=None, shared=True)) == [[1, 2, 0, 3]]
    # shared: a group costs L + 2 T: 20, 14, 10, 6; two groups cost twice the longer one
    assert groups(split_groups(batch, budget=40, shared=True)) == [[1, 2], [0, 3]]
    # replicated: 2 (L + T): 24, 18, 14, 10
    assert groups(split_groups(batch, budget=40, shared=False)) == [[1], [2, 0], [3]]
    assert groups(split_groups(batch, budget=1, shared=True)) == [[1], [2], [0], [3]]


def test_inactive_groups_are_left_out_unless_they_must_fill_up() -> None:
    batch = experience([4, 4, 4, 4], [3, 8, 5, 1])
    active_P = torch.tensor([False, True, True, False])
    assert groups(split_groups(batch, budget=None, shared=True, active_P=active_P)) == [[1, 2]]
    assert groups(split_groups(batch, budget=None, shared=True, active_P=active_P, at_least=2)) == [[1], [2]]
    assert groups(split_groups(batch, budget=None, shared=True, active_P=active_P, at_least=3)) == [[1], [2], [3]]
    none_P = torch.zeros(4, dtype=torch.bool)
    assert groups(split_groups(batch, budget=None, shared=True, active_P=none_P)) == [[3]]


@pytest.mark.parametrize("budget", [None, 1, 17, 30, 64])
@pytest.mark.parametrize("at_least", [1, 2, 4])
def test_every_group_once(budget: int | None, at_least: int) -> None:
    batches = split_groups(experience([3, 9, 1, 5], [7, 2, 4, 4]), budget=budget, shared=True, at_least=at_least)
    assert sorted(torch.cat(batches).tolist()) == [0, 1, 2, 3] and len(batches) >= at_least


def test_forwarded_tokens_count_the_padding() -> None:
    batch = experience([4, 2], [3, 5])  # 2 completions each
    assert forwarded_tokens(batch, shared=True) == (4 + 2 + 2 * (3 + 5), 2 * 4 + 4 * 5)
    assert forwarded_tokens(batch, shared=False) == (2 * (4 + 2) + 2 * (3 + 5), 4 * max(4 + 3, 2 + 5))

"""Groups without a signal are refilled: by which prompts, on one rank and two, through a resume, up to a bound."""

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from gopo_lightning.data.sampler import Place, PromptSampler
from gopo_lightning.rewards import FunctionComparator, FunctionReward
from gopo_lightning.rollout.joining import joined
from gopo_lightning.rollout.refill import has_signal
from gopo_lightning.types import Completions, Rollout
from tests.ranks import Case, Record, assert_same_run, launch, on, read, run_case
from tests.rollouts import rollout_of
from tests.runs import make_data, make_module, make_trainer
from tests.test_resume import assert_identical

NAN, INF = math.nan, math.inf


@pytest.mark.parametrize(
    ("rewards", "alive"),
    [
        ([1.0, 1.0, 1.0], False),
        ([1.0, 1.0, 1.0 + 2**-52], True),  # exact equality, no spread of floats
        ([0.1 + 0.2, 0.3, NAN], True),
        ([NAN, 1.0, 1.0], False),
        ([NAN, NAN, 2.0], False),
        ([NAN, NAN, NAN], False),
        ([INF, INF, NAN], False),
        ([-INF, INF, NAN], True),
        ([-INF, -INF, 0.0], True),
        ([0.0, -0.0, 0.0], False),
    ],
)
def test_a_signal_is_two_valid_rewards_that_differ(rewards: list[float], alive: bool) -> None:
    assert has_signal(rollout_of([rewards, [0.0, 1.0, 2.0]]), from_wins=False).tolist() == [alive, True]


def test_of_comparisons_a_signal_is_a_preference() -> None:
    """Whatever the combined rewards are: a cycle has one, answers that contradict each other have none."""
    half, nobody = torch.full((3, 3), 0.5), torch.full((3, 3), NAN)
    cycle, biased, one = half.clone(), torch.ones(3, 3), nobody.clone()
    cycle[0, 1] = cycle[1, 2] = cycle[2, 0] = 1.0
    cycle[1, 0] = cycle[2, 1] = cycle[0, 2] = 0.0
    one[0, 1] = 0.0
    wins_PGGK = torch.stack([half, nobody, biased, cycle, one]).double()[..., None]
    rollout = replace(rollout_of([[0.5] * 3] * 5), wins_PGGK=wins_PGGK)
    assert has_signal(rollout, from_wins=True).tolist() == [False, False, False, True, True]


def with_width(rollout: Rollout, logprobs: bool = True) -> Rollout:
    """With tokens that say where they stand, and the sampler's log-probs."""
    mask_NT = rollout.completions.mask_NT
    tokens_NT = mask_NT * torch.arange(1, mask_NT.numel() + 1).view_as(mask_NT)
    texts = tuple(str(row.tolist()) for row in tokens_NT)
    completions = Completions(tokens_NT, mask_NT, rollout.completions.truncated_N, texts, -tokens_NT.float())
    return replace(rollout, completions=completions)


def test_groups_of_two_rollouts_are_joined_whatever_their_widths() -> None:
    one = with_width(rollout_of([[1.0, 2.0]], [1, 2], indices=[4]))
    two = with_width(rollout_of([[3.0, 4.0], [5.0, NAN]], [5, 1, 2, 3], indices=[7, 2]))
    both = joined(one, two)
    assert [prompt.index for prompt in both.prompts.prompts] == [4, 7, 2]
    for part, index in ((one, [0]), (two, [1, 2])):
        picked = both.select(torch.tensor(index))
        assert picked.completions.texts == part.completions.texts
        for name in ("tokens_NT", "mask_NT", "truncated_N", "sampler_logprobs_NT"):
            assert torch.equal(getattr(picked.completions, name), getattr(part.completions, name)), name
        torch.testing.assert_close(picked.rewards_PG, part.rewards_PG, equal_nan=True, rtol=0, atol=0)


# The order of prompts


def read_steps(counts: list[int], P: int, rank: int = 0, world_size: int = 1) -> tuple[list[list[int]], list[Place]]:
    """Rows of this rank by step and those that it read further, in one list each; and where each step began."""
    step = 0
    options: dict[str, Any] = {"rank": rank, "world_size": world_size, "position": lambda: step}
    sampler = PromptSampler(11, P, seed=5, **options)
    rows, places = [], []
    for step, count in enumerate(counts):
        places.append(sampler.place(step))
        rows.append(sampler.step(step))
        half = count // 2
        rows.append(sampler.further(half) + sampler.further(count - half))
    return rows, places


@pytest.mark.parametrize("P", [2, 4])
def test_further_prompts_are_the_next_of_the_order(P: int) -> None:
    """Read one after the other they are the shufflings, but for rows that the step has read, and the incomplete end."""
    counts = [3, 0, 1, 4, 0, 7, 2, 0, 0, 5]
    rows, places = read_steps(counts, P)
    epochs = [torch.randperm(11, generator=torch.Generator().manual_seed(5 + e)).tolist() for e in range(9)]
    for number, (own, further) in enumerate(zip(rows[::2], rows[1::2], strict=True)):
        assert len(further) == counts[number] and len({*own, *further}) == P + counts[number]
        assert own == epochs[places[number].epoch][places[number].offset :][:P]
        following, after = epochs[places[number].epoch][places[number].offset + P :], epochs[places[number].epoch + 1]
        if len(following) < P:  # the next step would begin anew, and so does what is read further
            following = after
        expected = [row for row in [*following, *after] if row not in own]
        assert further == list(dict.fromkeys(expected))[: counts[number]]


def test_which_further_prompts_does_not_depend_on_the_ranks_and_goes_on_from_a_place() -> None:
    counts = [3, 1, 4, 0, 6]
    one, places = read_steps(counts, 4)
    for rank in range(2):
        mine, _ = read_steps(counts, 4, rank, 2)
        assert mine[::2] == [rows[rank::2] for rows in one[::2]] and mine[1::2] == one[1::2]
    for at in range(1, 5):
        again = PromptSampler(11, 4, seed=5, position=lambda at=at: at, origin=lambda at=at: places[at])
        assert [again.step(at), again.further(counts[at])] == one[2 * at : 2 * at + 2]
        if at < 4:
            assert again.place(at + 1) == places[at + 1]


def test_a_step_reads_no_row_twice() -> None:
    sampler = PromptSampler(11, 4, seed=5)
    assert sorted(sampler.step(0) + sampler.further(5) + sampler.further(5)) == list(range(11))
    assert sampler.further(3) == []


# In training


def often_tied(prompts: list[str], completions: list[str]) -> list[float | None]:
    """Half of the prompts have no signal: they tie, or have no score."""
    given = zip(prompts, completions, strict=True)
    return [{6: 1.0, 8: None}.get(len(prompt), float(len(text) % 5)) for prompt, text in given]


def constant(prompts: list[str], completions: list[str]) -> list[float]:
    return [2.0] * len(prompts)


def tied_pairs(prompts: list[str], first: list[str], second: list[str]) -> list[float]:
    """Of half of the prompts no order is known."""
    given = zip(prompts, first, second, strict=True)
    return [0.5 if len(prompt) < 10 else float(len(one) > len(other)) for prompt, one, other in given]


def case(name: str, refill: int | None = 3, **more: Any) -> Case:
    rewards = {"rewards": [FunctionReward("tests.test_refill.often_tied", name="tied")], "refill": refill}
    return Case(name, module=rewards | {"num_minibatches": 2, "num_completions": 3} | more, max_steps=8)


COMPARED: dict[str, Any] = {"rewards": [FunctionComparator("tests.test_refill.tied_pairs", name="pairs")]}


@pytest.fixture(scope="module")
def results(tiny_policy: Path, prompts_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("refill")
    cases = [case("scored"), case("compared", **COMPARED), case("off", None)]
    for each in cases:
        run_case(each, tiny_policy, prompts_file, folder, 1)
    run_case(replace(case("half.first"), max_steps=4), tiny_policy, prompts_file, folder, 1)
    run_case(replace(case("half.rest"), resume="half.first.ckpt"), tiny_policy, prompts_file, folder, 1)
    two = [on("ddp", each) for each in cases[:2]] + [on("fsdp2", cases[0])]
    first = replace(on("ddp", case("half.first")), max_steps=4)
    rest = replace(on("ddp", case("half.rest")), resume=f"{first.name}.ckpt")
    launch([*two, first, rest], tiny_policy, prompts_file, folder, 2)
    return folder


@pytest.mark.parametrize("run", ["ddp-scored", "ddp-compared", "fsdp2-scored"])
def test_two_ranks_refill_like_one(run: str, results: Path) -> None:
    expected = run.partition("-")[2]
    assert_same_run(results, run, expected)
    for mine, theirs in zip(read(results, run)[0]["steps"], read(results, expected)[0]["steps"], strict=True):
        for name in ("refilled_groups", "further_prompts", "refill_rounds"):
            assert mine["metrics"][f"rollout/{name}"] == theirs["metrics"][f"rollout/{name}"]
    places = [read(results, name)[1]["PromptDataModule"]["place"] for name in (run, expected)]
    assert places[0] == places[1]


@pytest.mark.parametrize("prefix", ["", "ddp-"])
def test_a_resumed_run_reads_on_after_the_further_prompts(prefix: str, results: Path) -> None:
    rest, whole = read(results, f"{prefix}half.rest"), read(results, f"{prefix}scored")
    assert [step["texts"] for step in rest[0]["steps"]] == [step["texts"] for step in whole[0]["steps"][2:]]
    for key in ("state_dict", "optimizer_states", "lr_schedulers"):
        assert_identical(rest[1][key], whole[1][key])
    assert rest[1]["PromptDataModule"]["place"] == whole[1]["PromptDataModule"]["place"]


@pytest.mark.parametrize("run", ["scored", "compared"])
def test_the_runs_are_worth_comparing(run: str, results: Path) -> None:
    """Groups are refilled, in several rounds, and others remain; the order is further on than without."""
    steps = read(results, run)[0]["steps"]
    metrics = [{name.partition("/")[2]: value for name, value in step["metrics"].items()} for step in steps]
    assert max(step["refill_rounds"] for step in metrics) >= 2
    assert all(step["refilled_groups"] * 4 <= step["further_prompts"] for step in metrics)
    assert sum(step["refilled_groups"] for step in metrics) > 1
    moved, still = (read(results, name)[1]["PromptDataModule"]["place"] for name in (run, "off"))
    taken = int(sum(step["further_prompts"] for step in metrics))
    assert moved["step"] == still["step"] == 4
    assert (moved["epoch"], moved["offset"]) > (still["epoch"], still["offset"]) and taken >= 8


def test_refilled_groups_have_a_signal_unless_the_rounds_are_used_up(results: Path) -> None:
    for step in read(results, "scored")[0]["steps"]:
        metrics = step["metrics"]
        tied = metrics["reward/all_tied_group_fraction"] + metrics["reward/nan_fraction"]
        assert tied == 0 or metrics["rollout/refill_rounds"] == 3
    assert any(step["metrics"]["reward/all_tied_group_fraction"] for step in read(results, "off")[0]["steps"])


def fit(folder: Path, policy: Path, prompts: Path, **options: Any) -> tuple[Record, Any]:
    record = Record()
    module = make_module(policy, num_completions=3, **options)
    callbacks = [record, ModelCheckpoint(every_n_train_steps=1, save_top_k=-1)]
    make_trainer(folder, max_steps=2, limit_val_batches=0, callbacks=callbacks).fit(module, make_data(prompts))
    return record, module


def test_where_all_tie_the_rounds_end_and_the_groups_stay(
    tiny_policy: Path, prompts_file: Path, tmp_path: Path
) -> None:
    """12 prompts in steps of 4: two rounds read all others, and a third finds none."""
    rewards = [FunctionReward("tests.test_refill.constant", name="constant")]
    without, _ = fit(tmp_path / "off", tiny_policy, prompts_file, rewards=rewards)
    for rounds, further in ((1, 4), (2, 8), (3, 8)):
        record, _ = fit(tmp_path / str(rounds), tiny_policy, prompts_file, rewards=rewards, refill=rounds)
        metrics = record.steps[0]["metrics"]
        assert record.steps[0]["texts"] == without.steps[0]["texts"]
        assert (metrics["rollout/refill_rounds"], metrics["rollout/further_prompts"]) == (further // 4, further)
        assert metrics["rollout/refilled_groups"] == metrics["train/grad_norm"] == 0


def test_tokens_of_all_rounds_count(
    tiny_policy: Path, prompts_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sampled: list[int] = []
    rewards = [FunctionReward("tests.test_refill.often_tied", name="tied")]
    module = make_module(tiny_policy, num_completions=3, rewards=rewards, refill=2)
    original = module.collector.sample

    def sample(*args: Any, **kwargs: Any) -> Completions:
        completions = original(*args, **kwargs)
        sampled[-1] += int(completions.lengths_N.sum())
        return completions

    begin = module.phases.begin
    monkeypatch.setattr(module.collector, "sample", sample)
    monkeypatch.setattr(module.phases, "begin", lambda: (begin(), sampled.append(0)))
    record = Record()
    make_trainer(tmp_path, max_steps=2, limit_val_batches=0, callbacks=[record]).fit(module, make_data(prompts_file))
    for step, tokens in zip(record.steps, sampled, strict=True):
        metrics = step["metrics"]
        rate = metrics["throughput/rollout_tokens_per_second"]
        assert rate * metrics["seconds/rollout"] == pytest.approx(tokens, rel=1e-4)
        trained = metrics["throughput/train_tokens_per_second"] * metrics["seconds/train"]
        assert trained == pytest.approx(12 * metrics["completion/length_mean"], rel=1e-4)
        assert metrics["rollout/further_prompts"] == 0 or trained < 0.9 * tokens
    assert record.steps[0]["metrics"]["rollout/further_prompts"] > 0


def test_it_is_refused_where_it_could_do_nothing(tiny_policy: Path, prompts_file: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="refill=0 must be at least 1"):
        make_module(tiny_policy, refill=0)
    data = make_data(prompts_file)
    make_trainer(tmp_path, max_steps=1, limit_val_batches=0).fit(make_module(tiny_policy), data)
    trainer = make_trainer(tmp_path, max_steps=1, limit_val_batches=0)
    with pytest.raises(ValueError, match="rollout.refill=1 reads further prompts in the order of a PromptDataModule"):
        trainer.fit(make_module(tiny_policy, refill=1), data.train_dataloader())

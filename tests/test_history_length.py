"""The length reward of a history: its golden values, what is learned and when, through a kill and on two ranks."""

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback

from gopo_lightning.rewards import FunctionReward
from gopo_lightning.rollout import HistoryLength, Transform
from gopo_lightning.rollout.history import Lengths, key_of
from gopo_lightning.rollout.transforms import Context
from gopo_lightning.types import Experience, Prompt, Rollout
from tests.ranks import Case, assert_same_run, launch, on, read, run_case
from tests.rollouts import rollout_of, setting_of
from tests.runs import count_vowels, make_data, make_module, make_trainer
from tests.test_resume import Die, Killed, assert_identical, train

NAN = math.nan
NOW = Context(0, 0)
LENGTHS = [50, 100, 150, 200, 300]
HALF = 1 / math.sqrt(2)


def prompt_of(row: int) -> Prompt:
    return Prompt(row, (1, row + 2), "")


def group(rewards: Sequence[float], lengths: Sequence[int], row: int = 0, **fields: Any) -> Rollout:
    rollout = rollout_of([rewards], lengths, **fields)
    return replace(rollout, prompts=replace(rollout.prompts, prompts=(prompt_of(row),)))


def step(transform: HistoryLength, rollout: Rollout) -> list[float]:
    """One step: what was added, and then learned."""
    shaped = transform(rollout, NOW)
    transform.commit(shaped.with_advantages(torch.zeros_like(shaped.rewards_PG)))
    return (shaped.rewards_PG - rollout.rewards_PG)[0].tolist()  # type: ignore[no-any-return]


def that_knows(*lengths: int, **options: Any) -> HistoryLength:
    """Of prompt 0."""
    transform = HistoryLength(**options)
    step(transform, group([1.0] * len(lengths), lengths))
    return transform


# --- the reward -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("form", "correct", "lengths", "expected"),
    [
        ("cosine", 1.0, LENGTHS, [HALF, 0, -0.7, -0.7, -0.7]),
        ("cosine", 0.0, [50, 100, 150, 250], [0, 0, -HALF, -1]),
        ("linear", 1.0, LENGTHS, [0.5, 0, -0.4, -0.7, -0.7]),
        ("linear", 0.0, [50, 100, 150, 250], [0, 0, -0.4, -1]),
        ("linear", 1.0, [105, 110], [0, 0]),
    ],
)
def test_golden_values(form: Any, correct: float, lengths: list[int], expected: list[float]) -> None:
    added = step(that_knows(100, 170, form=form), group([correct] * len(lengths), lengths))
    assert added == pytest.approx(expected, abs=1e-12)
    weighted = step(that_knows(100, form=form, weight=0.5), group([correct] * len(lengths), lengths))
    assert weighted == pytest.approx([value / 2 for value in expected], abs=1e-12)


def test_the_tolerance_of_linear() -> None:
    added = step(that_knows(100, form="linear", tolerance=0.5), group([0.0] * 3, [149, 175, 260]))
    assert added == pytest.approx([0, -0.25, -1], abs=1e-12)


def test_the_mean_counts_completions() -> None:
    """(100 + 100 + 100 + 200) / 4 = 125 tokens, over two steps."""
    transform = that_knows(100, 100, 100, history="mean", form="linear")
    step(transform, group([1.0, 0.0], [200, 17]))
    assert step(transform, group([1.0, 1.0], [100, 125])) == pytest.approx([1 - 100 / 125, 0], abs=1e-12)
    assert transform.state_dict()["known"] == {key_of(prompt_of(0)): (100, 725, 6)}


@pytest.mark.parametrize("form", ["cosine", "linear"])
def test_any_correct_one_stays_above_any_wrong_one(form: Any) -> None:
    lengths = list(range(1, 400, 3))
    for known in (1, 40, 399):
        right, wrong = (step(that_knows(known, form=form), group([c] * len(lengths), lengths)) for c in (1.0, 0.0))
        assert 1 + min(right) > max(wrong) == 0.0
        assert right == sorted(right, reverse=True) and wrong == sorted(wrong, reverse=True)


def test_without_a_history_nothing_is_added() -> None:
    transform = that_knows(10)
    assert step(transform, group([1.0, 0.0], [5, 50], row=1)) == [0.0, 0.0]
    assert step(transform, group([1.0, 0.0], [5, 50], row=1)) == pytest.approx([0.0, -1.0])


# --- what is learned --------------------------------------------------------------------------------------------------


def test_a_step_reads_the_history_before_it_and_learns_after() -> None:
    transform = that_knows(100)
    assert step(transform, group([1.0, 1.0], [100, 10])) == pytest.approx([0.0, math.cos(math.pi / 20)])
    assert step(transform, group([1.0], [10])) == pytest.approx([0.0])


def test_only_correct_completions_of_this_prompt_are_learned() -> None:
    """Neither wrong ones, nor those without a valid reward or of weight 0, nor those of an uncommitted step."""
    transform = that_knows(100)
    step(transform, group([0.0, NAN, 1.0], [3, 4, 5], weights_PG=torch.tensor([[1.0, 1.0, 0.0]])))
    step(transform, group([1.0], [7], row=1))
    transform(group([1.0], [8]), NOW)
    assert transform.state_dict()["known"] == {
        key_of(prompt_of(0)): (100, 100, 1),
        key_of(prompt_of(1)): (7, 7, 1),
    }


def test_what_has_no_valid_score_earns_nothing() -> None:
    scores_PGK = torch.tensor([[[1.0], [NAN], [1.0]]]).double()
    rollout = replace(group([1.0, 1.0, NAN], [50, 50, 50]), rewards_PGK=scores_PGK)
    transform = that_knows(100)
    transform._correct = HistoryLength(source="vowels")._correct
    transform.set_up(setting_of(FunctionReward(count_vowels, name="vowels")))
    added = step(transform, rollout)
    assert added[:2] == pytest.approx([HALF, 0.0]) and math.isnan(added[2])


def test_another_source_says_what_is_correct() -> None:
    """By rows 5.0 is wrong and 1.0 correct: the source says so, from 0.3 on."""
    transform = HistoryLength(source="vowels", tau=0.3)
    transform.set_up(setting_of(FunctionReward(count_vowels, name="vowels")))
    rollout = replace(group([5.0, 1.0], [50, 100]), rewards_PGK=torch.tensor([[[0.2], [0.3]]]).double())
    step(transform, rollout)
    assert transform.state_dict()["known"] == {key_of(prompt_of(0)): (100, 100, 1)}
    assert step(transform, rollout) == pytest.approx([0.0, 0.0])


def test_the_state_is_all_that_a_resume_needs() -> None:
    transform, other = that_knows(100, 120, history="mean"), HistoryLength(history="mean")
    other.load_state_dict(transform.state_dict())
    rollout = group([1.0, 0.0], [60, 190])
    assert step(other, rollout) == step(transform, rollout) != [0.0, 0.0]
    assert other.state_dict() == transform.state_dict()


def test_a_prompt_is_known_by_its_tokens() -> None:
    """So another row of the same prompt shares its history, and another prompt in the same row does not."""
    assert key_of(Prompt(0, (1, 2), "a")) == key_of(Prompt(9, (1, 2), "b")) != key_of(Prompt(0, (12,), "a"))


def test_the_parts_of_a_step_may_come_in_any_order() -> None:
    parts = [Lengths(3, 10, 2), Lengths(4, 4, 1), Lengths(2, 9, 3)]
    joined = {parts[a].joined(parts[b]).joined(parts[c]) for a, b, c in [(0, 1, 2), (2, 1, 0), (1, 2, 0)]}
    assert joined == {Lengths(2, 23, 6)}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"weight": 0.0}, r"weight=0.0 of HistoryLength must lie in \(0, 1\]"),
        ({"weight": 1.5}, "above 1 a short wrong completion"),
        ({"form": "square"}, "form='square' is unknown"),
        ({"history": "max"}, "history='max' is unknown"),
        ({"tolerance": 0.1}, "tolerance=0.1 of HistoryLength is a share .* of form: linear. Leave it out"),
        ({"form": "linear", "tolerance": -0.1}, "tolerance=-0.1"),
        ({"tau": NAN}, "tau=nan of HistoryLength must be finite"),
    ],
)
def test_options_that_make_no_sense_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        HistoryLength(**options)


def test_a_source_that_is_not_there_is_refused_before_anything_is_loaded() -> None:
    with pytest.raises(ValueError, match="source='maths' of HistoryLength is none of the reward sources"):
        make_module(Path(), transforms=[HistoryLength(source="maths")])


# --- runs -------------------------------------------------------------------------------------------------------------


def test_a_run_is_rewarded_by_the_history_and_evaluation_adds_nothing_to_it(
    tiny_policy: Path, prompts_file: Path, tmp_path: Path
) -> None:
    """All twelve prompts in each of two steps, with a validation before, between and after."""
    transform = HistoryLength(form="linear")
    module, data = make_module(tiny_policy, transforms=[transform]), make_data(prompts_file, prompts_per_step=12)
    made: list[Experience] = []
    commit = transform.commit

    def committed(experience: Experience) -> None:
        made.append(experience)
        commit(experience)

    transform.commit = committed  # type: ignore[method-assign]
    make_trainer(tmp_path, max_steps=2, val_check_interval=1).fit(module, data)
    first, second = made
    assert torch.equal(first.rewards_PG, first.rewards_PGK[..., 0])
    known: dict[str, int] = {}
    for experience, expects in ((first, False), (second, True)):
        lengths_PG = experience.completions.lengths_N.view(12, 4).tolist()
        before = dict(known)
        for p, prompt in enumerate(experience.prompts.prompts):
            past = before.get(prompt.text)
            for g, length in enumerate(lengths_PG[p]):
                raw = float(experience.rewards_PGK[p, g, 0])
                earned = 0.0
                if past is not None:
                    f = 1 - length / past if length < past else min(0.0, 1.1 - length / past)
                    earned = max(f, -0.7) if raw >= 0.5 else max(min(f, 0), -1.0)
                assert float(experience.rewards_PG[p, g]) == pytest.approx(raw + earned)
                if raw >= 0.5:
                    known[prompt.text] = min(known.get(prompt.text, length), length)
        assert bool(before) == expects
    keys = {key_of(prompt): known.get(prompt.text) for prompt in second.prompts.prompts}
    state = transform.state_dict()["known"]
    assert {key: shortest for key, (shortest, _, _) in state.items()} == {
        k: h for k, h in keys.items() if h is not None
    }
    logged = module.trainer.logged_metrics
    assert 0 < float(logged["transform/known_history_fraction"]) <= 1 and "transform/length_reward" in logged


def test_a_killed_run_ends_like_one_that_was_not(tiny_policy: Path, prompts_file: Path, tmp_path: Path) -> None:
    """Of four prompts, all in each step, so that from the second on the history counts; in magnitudes, as completions
    soon have one length."""
    four = tmp_path / "four.jsonl"
    four.write_text("".join(prompts_file.read_text().splitlines(keepends=True)[:4]))

    def trained(run: str, *callbacks: Callback, transforms: Sequence[Transform]) -> dict[str, Any]:
        folder = tmp_path / run
        return train(folder, tiny_policy, four, *callbacks, advantage="rloo", transforms=transforms)["checkpoint"]  # type: ignore[no-any-return]

    whole = trained("whole", transforms=[HistoryLength(tau=1.0)])
    with pytest.raises(Killed):
        trained("rest", Die("on_train_batch_start", 2), transforms=[HistoryLength(tau=1.0)])
    rest = trained("rest", transforms=[HistoryLength(tau=1.0)])
    for key in ("state_dict", "optimizer_states"):
        assert_identical(rest[key], whole[key])
    assert history_of(rest) == history_of(whole) != {}
    with pytest.raises(AssertionError):
        assert_identical(trained("plain", transforms=[])["state_dict"], whole["state_dict"])


def history_of(checkpoint: dict[str, Any]) -> dict[str, Any]:
    return checkpoint["callbacks"]["RolloutCallback"]["transforms"]["0 HistoryLength"]["known"]  # type: ignore[no-any-return]


def test_two_ranks_learn_one_history_and_go_on_with_it(tiny_policy: Path, prompts_file: Path, tmp_path: Path) -> None:
    """All prompts in each step: the first teaches, the others read and teach."""

    def case() -> Case:
        options = {"transforms": [HistoryLength(history="mean", tau=2.0)], "num_completions": 4}
        return Case("history", max_steps=2, prompts_per_step=12, module=options)

    run_case(case(), tiny_policy, prompts_file, tmp_path, 1)
    first = replace(on("ddp", case()), name="ddp-history.first", max_steps=1)
    rest = replace(on("ddp", case()), name="ddp-history.rest", resume="ddp-history.first.ckpt")
    launch([on("ddp", case()), first, rest], tiny_policy, prompts_file, tmp_path, 2)
    assert_same_run(tmp_path, "ddp-history", "history")
    (record, one), (_, two), (_, resumed) = (
        read(tmp_path, name) for name in ("history", "ddp-history", "ddp-history.rest")
    )
    assert history_of(one) == history_of(two) == history_of(resumed) != history_of(read(tmp_path, first.name)[1])
    assert_identical(resumed["state_dict"], two["state_dict"])
    assert record["steps"][-1]["metrics"]["transform/length_reward"] != 0

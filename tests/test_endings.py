"""How a completion ended reaches every kind of source: in training, in validation, and for the reference."""

import math
import pickle
import string
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from gopo_lightning.rewards import (
    FunctionComparator,
    FunctionReward,
    RankingOracle,
    RewardModelComparator,
    RewardSource,
    SourceConfigError,
    score,
)
from gopo_lightning.rewards.examples import finished
from gopo_lightning.rollout import SamplingConfig
from gopo_lightning.training.validation import EvaluationMetrics
from gopo_lightning.types import Completion, Completions, Prompt
from tests.runs import make_data, make_module, make_trainer

PROMPT = Prompt(0, (1,), "q")
DONE = Completion("ab", truncated=False, num_tokens=3)
CUT = Completion("ab", truncated=True, num_tokens=2)


def endings(truncated: list[bool], num_tokens: list[int]) -> list[float]:
    assert all(type(t) is bool for t in truncated) and all(type(n) is int for n in num_tokens)
    return [n + 100.0 * t for t, n in zip(truncated, num_tokens, strict=True)]


def prefers_finished(first_truncated: list[bool], second_truncated: list[bool]) -> list[float]:
    return [0.5 + 0.5 * (b - a) for a, b in zip(first_truncated, second_truncated, strict=True)]


def finished_first(completions: list[str], truncated: list[bool], num_tokens: list[int]) -> list[Any]:
    assert all(type(c) is str for c in completions) and len(num_tokens) == len(completions)
    ordered = [[n for n, cut in enumerate(truncated) if cut is wanted] for wanted in (False, True)]
    return [numbers for numbers in ordered if numbers]


class OldSource(RewardSource):
    """Written for texts alone."""

    name = "old"

    def __call__(self, prompts: Sequence[Prompt], completions: Sequence[str]) -> list[float]:
        return [float(len(completion.upper())) for completion in completions]


class EndingSource(RewardSource):
    """Reads the attributes of what it is given."""

    name, reads_endings = "ending", True

    def __call__(self, prompts: Sequence[Prompt], completions: Sequence[str]) -> list[float]:
        return [float(c.num_tokens) for c in completions if isinstance(c, Completion)]


def test_a_completion_is_its_text_and_survives_pickling() -> None:
    copy = pickle.loads(pickle.dumps(CUT))
    assert (copy, copy.truncated, copy.num_tokens) == ("ab", True, 2)
    assert type(str(copy)) is str and hash(copy) == hash("ab")


def test_groups_of_completions() -> None:
    mask_NT = torch.tensor([[1, 1, 0], [1, 1, 1], [1, 0, 0], [1, 1, 1]]).bool()
    truncated_N = torch.tensor([False, True, False, False])
    groups = Completions(mask_NT.long(), mask_NT, truncated_N, ("a", "b", "", "d")).groups(2)
    assert groups == [["a", "b"], ["", "d"]]
    assert [[(c.truncated, c.num_tokens) for c in g] for g in groups] == [
        [(False, 2), (True, 3)],
        [(False, 1), (False, 3)],
    ]


def test_a_function_gets_what_it_names() -> None:
    assert finished([False, True]) == [1.0, 0.0]
    sources: list[RewardSource] = [FunctionReward(endings), FunctionReward(finished), OldSource(), EndingSource()]
    assert score(sources, [PROMPT] * 2, [DONE, CUT]).tolist() == [[3, 1, 2, 3], [102, 0, 2, 2]]
    everything = FunctionReward(lambda completions, **others: others["num_tokens"], name="all")  # the dataset's own
    assert score([everything], [Prompt(0, (1,), "q", columns={"num_tokens": 7})], [DONE]).tolist() == [[7.0]]


def test_plain_strings_have_no_ending() -> None:
    with pytest.raises(SourceConfigError, match=r"'endings' asks for `truncated`, but 'ab' is a plain string.*Pass"):
        FunctionReward(endings)([PROMPT], ["ab"])


def test_equal_texts_tie_unless_the_source_reads_how_they_ended() -> None:
    by_ending = FunctionComparator(prefers_finished)
    assert by_ending.reads_endings and not FunctionComparator(lambda first: [1.0] * len(first), name="f").reads_endings
    assert by_ending.versus([PROMPT], [[DONE, CUT]], [[CUT, DONE]]).tolist() == [[[1.0, 0.5], [0.5, 0.0]]]
    order = RankingOracle(finished_first)
    torch.testing.assert_close(order([PROMPT], [[CUT, DONE, CUT]])[0, 0], torch.tensor([0.5, 0.0, 0.5]).double())
    for source, expected in ((EndingSource(), 1 / (1 + math.exp(-1))), (OldSource(), 0.5)):
        wins = RewardModelComparator(source).versus([PROMPT], [[DONE]], [[CUT]])
        assert wins.item() == pytest.approx(expected)


@pytest.mark.parametrize("column", ["truncated", "num_tokens", "completions", "prompts"])
def test_a_column_that_an_argument_would_hide_is_refused(column: str) -> None:
    def named(prompts: Any, completions: Any, truncated: Any, num_tokens: Any) -> list[float]:
        return [0.0] * len(completions)

    rows = [PROMPT, Prompt(5, (1,), "q", columns={column: 1}, path="p.jsonl")]
    with pytest.raises(SourceConfigError, match=rf"'named' takes \['{column}'\].* row 5 .*p.jsonl.*Rename"):
        score([FunctionReward(named)], rows, [DONE, CUT])


def test_an_oracle_refuses_it_too() -> None:
    with pytest.raises(SourceConfigError, match=r"'finished_first' takes \['truncated'\].* row 5"):
        RankingOracle(finished_first)([Prompt(5, (1,), "q", columns={"truncated": 1})], [[DONE, CUT]])


def test_a_run_rewards_completions_that_ended(tiny_policy: Path, prompts_file: Path, tmp_path: Path) -> None:
    """The same scores for policy and reference at step 0, and for the reference after a resume."""
    rewards = [
        FunctionReward(finished),
        FunctionReward(endings),
        FunctionComparator(prefers_finished, num_opponents=1),
        RankingOracle(finished_first),
    ]
    sampling = SamplingConfig(max_new_tokens=3, stop_strings=tuple(string.ascii_letters))  # some end, some do not
    options: dict[str, Any] = {"rewards": rewards, "combine": "lexicographic", "sampling": sampling}
    trainer = make_trainer(tmp_path, max_steps=1, val_check_interval=1)
    trainer.fit(make_module(tiny_policy, **options), make_data(prompts_file))
    trainer.save_checkpoint(path := tmp_path / "saved.ckpt")
    again = make_trainer(tmp_path / "2")
    wins = again.validate(make_module(tiny_policy, **options), make_data(prompts_file), ckpt_path=path, verbose=False)
    assert 0 < wins[0]["val/finished/reward"] < 1
    for name in ("finished", "endings", "prefers_finished", "finished_first"):
        assert wins[0][f"val/{name}/win_rate"] == pytest.approx(float(trainer.callback_metrics[f"val/{name}/win_rate"]))


def test_each_source_has_curves_of_its_own() -> None:
    names = {f"{source}/win_rate" for source in ("rm.v2", "rm_v2", "rm%2Ev2")}
    metrics = EvaluationMetrics(["rm.v2", "rm_v2", "rm%2Ev2"])
    assert names <= set(metrics.names) and len(metrics) == len(set(metrics.names)) == 10

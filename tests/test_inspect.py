"""``inspect``: its numbers by hand, its words, and the command on real files."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from gopo_lightning.__main__ import main as command_line
from gopo_lightning.commands import inspect
from gopo_lightning.commands.judges import judge_of_file
from gopo_lightning.data.json_lines import write_jsonl
from gopo_lightning.evaluation import reward_shape
from gopo_lightning.evaluation.verdict import verdict
from gopo_lightning.objectives.advantages import dr_grpo, grpo, ordinal

NAN = math.nan


def rewards(*rows: list[float]) -> Tensor:
    return torch.tensor(rows, dtype=torch.float64)


def drawn(kind: str) -> Tensor:
    """Rewards of 400 groups of 8."""
    generator = torch.Generator().manual_seed(1)
    normal = torch.randn(400, 8, generator=generator, dtype=torch.float64)
    outliers = torch.rand(400, 8, generator=generator) < 0.05
    return {
        "normal": normal,
        "log-normal": normal.exp(),
        "outliers": normal.masked_fill(outliers, -8.0),
        "binary": (normal > 0).double(),
        "tied": torch.ones(400, 8, dtype=torch.float64),
        "invalid": torch.full((400, 8), NAN, dtype=torch.float64),
    }[kind]


def described(rewards_PG: Tensor) -> dict[str, Any]:
    """What the words are made of."""
    found, refused = reward_shape.advantages_of(rewards_PG, {"grpo": grpo})
    likeness = {name: reward_shape.likeness(ordinal(rewards_PG), value) for name, value in found.items()}
    return {
        "reward": vars(reward_shape.shape_of(rewards_PG)),
        "cosine_with_ordinal": {name: value and vars(value) for name, value in likeness.items() if value},
        "refused": refused,
        "normal_cosine": reward_shape.normal_cosine(rewards_PG.shape[1]),
        "truncated_fraction": 0.0,
        "rank_correlation_with_length": {"combined": None},
    }


# ------------------------------------------------------------------------------ numbers by hand


def test_moments_by_hand() -> None:
    """0, 0, 0, 4: mean 1, variance 3; z = −1/√3 thrice, √3. Cubes: (−3/3√3 + 3√3)/4 = 2/√3; fourth: (3/9 + 9)/4."""
    shape = reward_shape.shape_of(rewards([0, 0, 0, 4]))
    assert shape.skewness == pytest.approx(2 / math.sqrt(3))
    assert shape.excess_kurtosis == pytest.approx((1 / 3 + 9) / 4 - 3 * 3 / 5)
    assert (shape.mean, shape.within_group_std, shape.tied_pair_fraction) == (1, 2, 0.5)
    assert (shape.all_tied_group_fraction, shape.nan_fraction, shape.distinct_values) == (0, 0, 2)


def test_outliers_by_hand() -> None:
    """1 … 5 and 30: median 3 (the lower), distances 2 1 0 1 2 27, their median 1; 27 > 4 · 1.4826."""
    assert reward_shape.shape_of(rewards([1, 2, 3, 4, 5, 30])).outlier_fraction == pytest.approx(1 / 6)


def test_what_is_no_number_is_left_out() -> None:
    shape = reward_shape.shape_of(rewards([0, 2, NAN, math.inf], [NAN, NAN, NAN, 1]))
    assert (shape.nan_fraction, shape.infinite_fraction) == (0.5, 0.125)
    assert shape.within_group_std == pytest.approx(math.sqrt(2))
    assert (shape.mean, shape.distinct_values) == (1, 4)


def test_normal_groups_have_the_kurtosis_that_is_subtracted() -> None:
    assert reward_shape.shape_of(drawn("normal")).excess_kurtosis == pytest.approx(0, abs=0.1)


def test_likeness_by_hand() -> None:
    """(1, −1) and (1, −1): 1. (1, −1) and (−2, 2): −1. Together (1 − 1 + … ): (2 − 4) / √(4 · 10)."""
    found = reward_shape.likeness(rewards([1, -1], [1, -1]), rewards([1, -1], [-2, 2]))
    assert found is not None
    assert found.cosine == pytest.approx((2 - 4) / math.sqrt(4 * 10))
    assert found.within_groups == pytest.approx(0)
    assert reward_shape.likeness(rewards([1, -1]), rewards([0, 0])) is None


def test_the_simulated_cosines_of_the_documents() -> None:
    """docs/inspect.md: 0.955 for normal rewards, 0.885 log-normal, 1 binary, at G = 8."""
    for kind, expected in (("normal", 0.955), ("log-normal", 0.885), ("outliers", 0.90), ("binary", 1.0)):
        found = reward_shape.likeness(ordinal(drawn(kind)), grpo(drawn(kind)))
        assert found is not None and found.within_groups == pytest.approx(expected, abs=0.012), kind
    assert reward_shape.normal_cosine(8) == pytest.approx(0.955, abs=0.002)


def test_effective_groups_by_hand() -> None:
    """|A|² of 2 and 2 of two groups: all. 2 and 0: half. 2 and 8: (10)² / (2 · 68)."""
    assert reward_shape.effective_fraction(rewards([1, -1], [1, -1])) == 1
    assert reward_shape.effective_fraction(rewards([1, -1], [0, 0])) == 0.5
    assert reward_shape.effective_fraction(rewards([1, -1], [2, -2])) == pytest.approx(100 / 136)
    assert reward_shape.effective_fraction(rewards([0, 0])) == 0


def test_agreement_by_hand() -> None:
    """Preferred 0 > 1 > 2. The reward orders 0 > 1 rightly, ties 1 and 2, and 0 > 2 rightly: 2.5 of 3."""
    preferred_PGG = torch.tensor([[[NAN, 1, 1], [0, NAN, 1], [0, 0, NAN]]])
    found = reward_shape.agreement(rewards([3, 1, 1]), preferred_PGG)
    assert found is not None and found.mean == pytest.approx(2.5 / 3)
    assert reward_shape.agreement(rewards([3, 1, 1]), torch.full((1, 3, 3), 0.5)) is None


def test_noise_by_hand() -> None:
    """Differences 1 and −1: standard deviation 1 / √2 of one score; 0 < 1 became 1 > 0."""
    noise = reward_shape.noise_of(rewards([0, 1]), rewards([1, 0]))
    assert noise.std == pytest.approx(1 / math.sqrt(2))
    assert (noise.of_within_group_std, noise.changed_pair_fraction) == (pytest.approx(1), 1)
    assert reward_shape.noise_of(rewards([0, 1]), rewards([0, 1])).std == 0


@settings(deadline=None, max_examples=50)
@given(st.lists(st.lists(st.floats(-1e6, 1e6) | st.just(NAN), min_size=4, max_size=4), min_size=1, max_size=5))
def test_no_rewards_break_it(rows: list[list[float]]) -> None:
    rewards_PG = rewards(*rows)
    shape = reward_shape.shape_of(rewards_PG)
    assert 0 <= shape.tied_pair_fraction <= 1
    assert verdict(described(rewards_PG))


# ------------------------------------------------------------------------------ words


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("normal", "Ranks can matter a little here, as they do for normal rewards"),
        ("log-normal", "Ranks can matter here, because rewards are skewed within groups"),
        ("outliers", "Ranks can matter here, because"),
        ("binary", "Ranks cannot matter much here, because the reward has two values"),
        ("tied", "Ranks cannot matter here, and nothing else can be learned"),
        ("invalid", "no completion has a valid score"),
    ],
)
def test_the_answer(kind: str, words: str) -> None:
    assert words in verdict(described(drawn(kind)))[0]


def test_infinite_rewards_have_ranks_alone() -> None:
    rewards_PG = drawn("normal").index_fill(1, torch.tensor([0]), math.inf)
    assert "GRPO cannot use these rewards at all" in verdict(described(rewards_PG))[0]


def test_remarks() -> None:
    found = described(drawn("normal")) | {
        "truncated_fraction": 0.4,
        "rank_correlation_with_length": {"combined": {"mean": 0.5, "low": 0.4, "high": 0.6}},
        "noise": {"judge": {"of_within_group_std": 0.5, "changed_pair_fraction": 0.2}},
        "agreement_with_people": {"combined": {"mean": 0.52, "low": 0.48, "high": 0.56}},
    }
    text = " ".join(verdict(found))
    for words in ("40% of the completions are cut off", "Longer completions", "twice moves judge", "coin's 50 %"):
        assert words in text


# ------------------------------------------------------------------------------ the command


@pytest.fixture
def config(tmp_path: Path, tiny_policy: Path, prompts_file: Path) -> Path:
    """Of a run with two rewards."""
    function = "gopo_lightning.rewards.FunctionReward"
    sources = [
        {"class_path": function, "init_args": {"function": f"gopo_lightning.rewards.examples.{name}"}}
        for name in ("finished", "distinct_words")
    ]
    values = {
        "trainer": {"accelerator": "cpu", "default_root_dir": str(tmp_path / "root"), "max_steps": 2},
        "model": {
            "class_path": "gopo_lightning.GOPOModule",
            "init_args": {
                "policy": {"name": str(tiny_policy)},
                "rollout": {"num_completions": 4, "sampling": {"max_new_tokens": 24}},
                "rewards": {"combine": "lexicographic", "sources": sources},
            },
        },
        "data": {
            "class_path": "gopo_lightning.PromptDataModule",
            "init_args": {"prompts_per_step": 4, "train": {"path": str(prompts_file)}},
        },
    }
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(values))
    return path


def test_the_command(config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    judge = tmp_path / "judge.yaml"
    comparator = {"function": "tests.test_inspect.longer", "name": "longer"}
    judge.write_text(
        yaml.safe_dump({"class_path": "gopo_lightning.rewards.FunctionComparator", "init_args": comparator})
    )
    pairs = tmp_path / "pairs.jsonl"
    write_jsonl(pairs, [{"prompt": "a", "chosen": "b c", "rejected": "b b"}] * 3)
    output = tmp_path / "out"
    arguments = ["--num_prompts=6", f"--judge={judge}", f"--pairs={pairs}", f"--output={output}"]
    inspect.main([*arguments, "--config", str(config)])
    text = capsys.readouterr().out
    assert "8 prompts × 4 completions of the untrained policy" in text  # whole steps
    assert "Ranks can" in text and "pairs that combined orders as the judge would" in text
    found = json.loads((output / "inspect.json").read_text(encoding="utf-8"), parse_constant=pytest.fail)
    assert found["num_prompts"] == 8 and found["sources"].keys() == {"finished", "distinct_words", "combined"}
    assert found["agreement_with_people"]["distinct_words"]["mean"] == 1.0
    assert found["noise"]["finished"]["std"] == 0
    assert (output / "inspect.png").stat().st_size > 10_000
    assert {path.name for path in tmp_path.iterdir()} == {"config.yaml", "judge.yaml", "pairs.jsonl", "out"}


def test_what_is_sampled_is_what_training_samples(config: Path, tmp_path: Path) -> None:
    """The prompts of the first steps; the same command gives the same numbers."""
    files = []
    for name in ("a", "b"):
        inspect.main(["--num_prompts=4", f"--output={tmp_path / name}", "--config", str(config)])
        files.append((tmp_path / name / "inspect.json").read_text())
    assert files[0] == files[1]


def test_recorded_answers_are_inspected_as_they_are(config: Path, tmp_path: Path) -> None:
    """Training would read the answers of the file, so these are described, not what the policy says."""
    rows = tmp_path / "rows.jsonl"
    write_jsonl(rows, [{"prompt": "a", "completions": ["w", "x", "y", "z"], "ranks": [1, 2, 3, 3]}] * 4)
    arguments = [
        f"--output={tmp_path / 'out'}",
        f"--config={config}",
        f"--data.init_args.train.path={rows}",
        "--model.init_args.rollout.engine=gopo_lightning.rollout.RecordedEngine",
        '--model.init_args.rewards.sources=[{"class_path": "gopo_lightning.rewards.RecordedReward"}]',
        "--model.init_args.rewards.combine=weighted_sum",
    ]
    inspect.main(["--num_prompts=4", *arguments])
    found = json.loads((tmp_path / "out" / "inspect.json").read_text())
    assert found["reward"]["tied_pair_fraction"] == pytest.approx(1 / 6) and found["length_std"] == 0


def test_help_and_refusals(config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        inspect.main(["--help"])
    assert "--judge FILE" in capsys.readouterr().out
    with pytest.raises(ValueError, match="needs the configuration"):
        inspect.main([])
    with pytest.raises(ValueError, match="at least 2"):
        inspect.main(["--num_prompts=1", "--config", str(config)])
    (tmp_path / "x.yaml").write_text("a: 1")
    with pytest.raises(ValueError, match=r"x.yaml holds neither class_path"):
        judge_of_file(tmp_path / "x.yaml")
    with pytest.raises(ValueError, match="no such file"):
        judge_of_file(tmp_path / "z.yaml")
    with pytest.raises(ValueError, match="has the sources"):
        judge_of_file(config)
    assert judge_of_file(config, "finished").name == "finished"


def test_it_is_a_command_of_the_package(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("sys.argv", ["gopo-lightning", "inspect", "--help"])
    with pytest.raises(SystemExit):
        command_line()
    assert "whether ranks can matter" in capsys.readouterr().out


def longer(first: list[str], second: list[str]) -> list[float]:
    """A judge who likes length."""
    return [0.5 if len(a) == len(b) else float(len(a) > len(b)) for a, b in zip(first, second, strict=True)]


def test_advantages_of_one_direction_differ_over_the_groups() -> None:
    """GRPO and Dr. GRPO point the same way within a group, and weigh groups otherwise."""
    rewards_PG = drawn("normal") * torch.arange(1, 401)[:, None]
    found = reward_shape.likeness(grpo(rewards_PG), dr_grpo(rewards_PG))
    assert found is not None
    assert found.within_groups == pytest.approx(1, abs=1e-6) and found.cosine < 0.95

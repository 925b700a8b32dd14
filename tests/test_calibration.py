"""τ of a reward model: fitted to held-out pairs, kept beside the weights, read by the advantage that asks for it."""

import json
import math
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.optimize
import torch
import torch.distributed as dist
from huggingface_hub.errors import EntryNotFoundError
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from gopo_lightning.data.comparison_batches import collate_comparisons
from gopo_lightning.data.comparisons import ComparisonRow
from gopo_lightning.data.preferences import PreferenceDataModule
from gopo_lightning.objectives import advantages
from gopo_lightning.objectives.calibration import fit_tau
from gopo_lightning.rewards import FunctionComparator, FunctionReward, SequenceClassifierReward, calibration
from gopo_lightning.rewards.calibration import FILE, Calibration, calibrate, read_tau
from gopo_lightning.training import advantage as training_advantage
from gopo_lightning.training.export_folder import check_export_folder
from gopo_lightning.training.reward_model.metrics import ComparisonMetrics
from tests.ranks import launch
from tests.runs import make_module
from tests.test_module import fit
from tests.test_pairwise import longer
from tests.test_reward_model_checks import fit as fit_reward_model
from tests.test_reward_model_checks import pair
from tests.test_rewards import prompt, save_bert

LN3 = math.log(3)


def draw(tau: float, num_pairs: int = 20_000) -> tuple[Tensor, Tensor]:
    """Scores' differences, and choices of people who follow σ(d / tau)."""
    rng = np.random.default_rng(0)
    d_Q = rng.normal(0, 3, num_pairs)
    return torch.tensor(d_Q), torch.tensor(rng.random(num_pairs) < 1 / (1 + np.exp(-d_Q / tau))).float()


# --- the maths -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("differences", "preferences", "tau"),
    [
        ([1.0, 1.0, 1.0, 1.0], [1.0, 1.0, 1.0, 0.0], 1 / LN3),  # σ(ln 3) = 3/4 agree
        ([-6.0, 6.0, -6.0, -6.0], [0.0, 1.0, 0.0, 1.0], 6 / LN3),
        ([2.0], [0.9], 2 / math.log(9)),
        ([2.0, 2.0], [1.0, 0.5], 2 / LN3),  # a tie is half a win
        ([2.0, 2.0, 0.0], [1.0, 0.5, 1.0], 2 / LN3),  # equal scores say nothing of τ
    ],
)
def test_tau_by_hand(differences: list[float], preferences: list[float], tau: float) -> None:
    assert fit_tau(torch.tensor(differences), torch.tensor(preferences)) == pytest.approx(tau, rel=1e-6)


@pytest.mark.parametrize(
    ("differences", "preferences"),
    [
        ([1.0, 2.0, -3.0], [1.0, 1.0, 0.0]),  # all as people do
        ([1.0, 2.0, -3.0], [0.0, 0.0, 1.0]),
        ([1.0, 1.0], [1.0, 0.0]),  # at random
        ([1.0, 3.0], [0.5, 0.5]),
        ([0.0, 0.0], [1.0, 0.0]),
        ([], []),
        ([math.nan, 1.0], [1.0, 0.0]),
        ([math.inf, 1.0], [1.0, 0.0]),
    ],
)
def test_there_need_not_be_a_tau(differences: list[float], preferences: list[float]) -> None:
    assert fit_tau(torch.tensor(differences), torch.tensor(preferences)) is None


@pytest.mark.parametrize("tau", [0.5, 2.5, 20.0])
def test_tau_is_where_scipy_finds_the_least_log_loss_and_where_it_was(tau: float) -> None:
    d_Q, W_Q = draw(tau)

    def log_loss(log_tau: float) -> float:
        x_Q = d_Q.numpy() / math.exp(log_tau)
        return float(np.mean(np.logaddexp(0, -x_Q) * W_Q.numpy() + np.logaddexp(0, x_Q) * (1 - W_Q.numpy())))

    found = scipy.optimize.minimize_scalar(log_loss, bounds=(-6, 6), method="bounded", options={"xatol": 1e-9})
    fitted = fit_tau(d_Q, W_Q)
    assert fitted == pytest.approx(math.exp(found.x), rel=1e-5)
    assert fitted == pytest.approx(tau, rel=0.15 if tau > 10 else 0.05)


@given(st.sampled_from([1e-8, 0.1, 7.0, 1e9]), st.integers(0, 99))
def test_tau_has_the_unit_of_the_scores_and_no_pair_has_a_side(scale: float, swapped: int) -> None:
    d_Q, W_Q = draw(1.0, 100)
    tau = fit_tau(d_Q, W_Q)
    assert tau is not None
    d_Q[swapped], W_Q[swapped] = -d_Q[swapped], 1 - W_Q[swapped]
    assert fit_tau(scale * d_Q, W_Q) == pytest.approx(scale * tau, rel=1e-9)


# --- the file --------------------------------------------------------------------------------------------------------


def test_too_few_pairs_and_a_missing_maximum_are_said() -> None:
    d_Q, W_Q = draw(1.0, 100)
    assert calibrate(d_Q[:99], W_Q[:99]) == "there are 99 held-out pairs, and it takes 100"
    assert "as people do, or no better than at random" in str(calibrate(d_Q, (d_Q > 0).float()))
    fitted = calibrate(d_Q, W_Q)
    assert isinstance(fitted, Calibration)
    chosen_Q = torch.where(W_Q == 1, d_Q, -d_Q) / fitted.tau
    assert fitted.log_loss == pytest.approx(-chosen_Q.sigmoid().log().mean().item())
    assert (fitted.tau, fitted.num_pairs) == (fit_tau(d_Q, W_Q), 100)


def test_the_file_is_read_as_it_was_written(tmp_path: Path) -> None:
    assert read_tau(str(tmp_path), None) is None
    Calibration(1 / 3, 0.5, 200).write(tmp_path)
    assert read_tau(str(tmp_path), None) == 1 / 3


def test_a_hub_model_without_the_file_has_no_tau(monkeypatch: pytest.MonkeyPatch) -> None:
    def download(*args: Any, **options: Any) -> str:
        raise EntryNotFoundError("404")

    monkeypatch.setattr(calibration, "hf_hub_download", download)
    assert read_tau("owner/model", "main") is None


@pytest.mark.parametrize("content", ["", "{}", "[]", '{"tau": null}', '{"tau": "x"}', '{"tau": 0}', '{"tau": NaN}'])
def test_a_file_without_a_tau_is_refused(content: str, tmp_path: Path) -> None:
    (tmp_path / FILE).write_text(content)
    with pytest.raises(ValueError, match=rf"{FILE} .*tau.*Export the reward model again"):
        read_tau(str(tmp_path), None)


# --- from reward-model training to an advantage ----------------------------------------------------------------------


@pytest.fixture(scope="module")
def reward_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Trained on pairs of which people get every fourth wrong; the folder with its data and its export."""
    folder = tmp_path_factory.mktemp("reward_model")
    save_bert(folder / "model", template=True)
    wrong = {"chosen": "bad", "rejected": "good"}
    rows = [pair(i, **(wrong if i % 4 == 0 else {})) for i in range(240)]
    fit_reward_model(folder, rows, data={"validation_fraction": 0.5, "batch_size": 8, "eval_batch_size": 7})
    return folder


def test_tau_is_that_of_the_exported_weights_on_the_held_out_pairs(reward_model: Path) -> None:
    source = SequenceClassifierReward(str(reward_model / "export"), template="plain")
    source.setup(torch.device("cpu"))
    data = PreferenceDataModule(str(reward_model / "rows.jsonl"), validation_fraction=0.5)
    data.setup("fit")
    rows = [row for row in data.validation if isinstance(row, ComparisonRow)]
    first, second = (source([prompt("")] * len(rows), [str(row.texts[k]) for row in rows]) for k in (0, 1))
    expected = fit_tau(first - second, torch.tensor([row.wins[0][1] for row in rows]))
    content = json.loads((reward_model / "export" / FILE).read_text())
    assert content["num_pairs"] == len(rows) == 120
    assert content["tau"] == source.fitted_tau() == pytest.approx(expected, rel=1e-3)
    check_export_folder(reward_model / "export", "export_dir")  # τ is a part of the export


def test_too_few_held_out_pairs_leave_no_tau(tmp_path: Path) -> None:
    save_bert(tmp_path / "model", template=True)
    module = fit_reward_model(tmp_path, [pair(i) for i in range(12)])
    assert not module.metrics.scores  # a second run counts its own pairs
    assert not (tmp_path / "export" / FILE).exists()
    fit_reward_model(tmp_path, [pair(i) for i in range(12)], trainer={"limit_val_batches": 0})
    assert (tmp_path / "export" / "model.safetensors").exists() and not (tmp_path / "export" / FILE).exists()


def test_a_run_with_the_fitted_tau(reward_model: Path, tiny_policy: Path, prompts_file: Path, tmp_path: Path) -> None:
    source = SequenceClassifierReward(str(reward_model / "export"), truncation="left")
    module = make_module(tiny_policy, rewards=[source], advantage="calibrated")
    experience = fit(module, prompts_file, tmp_path, max_steps=1).experiences[0]
    expected_PG = advantages.calibrated(experience.rewards_PG, tau=read_tau(str(reward_model / "export"), None))  # type: ignore[arg-type]
    assert expected_PG.any() and torch.equal(experience.advantages_PG, expected_PG)
    given = make_module(tiny_policy, rewards=[source], advantage={"function": "calibrated", "init_args": {"tau": 0.25}})
    experience = fit(given, prompts_file, tmp_path / "given", max_steps=1).experiences[0]
    assert torch.equal(experience.advantages_PG, advantages.calibrated(experience.rewards_PG, tau=0.25))


def test_all_ranks_take_the_tau_of_the_first(reward_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(training_advantage, "gather_objects", lambda tau: [7.0, tau])
    source = SequenceClassifierReward(str(reward_model / "export"))
    advantage = training_advantage.Advantage("calibrated", None, [source], "weighted_sum", None)
    advantage.set_up()
    rewards_PG = torch.tensor([[3.0, 0.0, 1.0]])
    assert torch.equal(advantage(rewards_PG), advantages.calibrated(rewards_PG, tau=7.0))


def calibrated_on(rank: int, world: int) -> Any:
    """Of 101 pairs, those of this rank; with two ranks, the second repeats one as padding."""
    d_Q, W_Q = draw(2.0, 101)
    metrics = ComparisonMetrics()
    for q in range(rank, 101 + 101 % world, world):
        win = W_Q[q % 101].item()
        row = ComparisonRow(("a", "b"), ((math.nan, win), (1 - win, math.nan)))
        batch = collate_comparisons([(row, 0.5 if q < 101 else math.nan)])
        metrics.update(torch.tensor([d_Q[q % 101].item(), 0.0], dtype=torch.float64), torch.ones(2), batch)
    return calibrate(*metrics.pairs())


def on_two_ranks(rank: int, tiny_policy: Path) -> Any:
    dist.init_process_group("gloo")
    fitted = calibrated_on(rank, 2)
    dist.destroy_process_group()
    return asdict(fitted)


def test_tau_on_two_ranks(tiny_policy: Path, prompts_file: Path, tmp_path: Path) -> None:
    """Both have that of one process, over all pairs."""
    launch([on_two_ranks], tiny_policy, prompts_file, tmp_path, 2)
    first, second = (torch.load(tmp_path / f"on_two_ranks.{rank}.pt") for rank in (0, 1))
    assert first == second == pytest.approx(asdict(calibrated_on(0, 1)), rel=1e-9)
    assert first["num_pairs"] == 101


VOWELS = FunctionReward("tests.runs.count_vowels", name="vowels")


@pytest.mark.parametrize(
    "options",
    [
        {"rewards": [VOWELS, FunctionReward("tests.runs.count_vowels", name="again")]},
        {"rewards": [VOWELS], "combine": "borda"},
        {"rewards": [VOWELS], "combine": {"function": "weighted_sum", "init_args": {"weights": [2.0]}}},
        {"rewards": [FunctionComparator(longer)]},
    ],
)
def test_a_fitted_tau_is_used_for_one_score_as_it_is(options: dict[str, Any], tiny_policy: Path) -> None:
    with pytest.raises(ValueError, match=r"'calibrated' needs tau. .*here the reward is .*objective\.advantage"):
        make_module(tiny_policy, advantage="calibrated", **options)
    make_module(tiny_policy, advantage={"function": "calibrated", "init_args": {"tau": 1.0}}, **options)
    make_module(tiny_policy, advantage=f"{__name__}.tempered", **options)  # can do without


def tempered(rewards_PG: Tensor, *, tau: float = 3.0) -> Tensor:
    """An advantage of one's own, with a τ of its own."""
    return rewards_PG / tau


def test_a_source_without_a_tau_stops_the_run_at_setup(tiny_policy: Path, prompts_file: Path, tmp_path: Path) -> None:
    module = make_module(tiny_policy, rewards=[VOWELS], advantage="calibrated")
    with pytest.raises(ValueError, match=r"needs tau, and none was fitted for reward source .vowels.*Set objective"):
        fit(module, prompts_file, tmp_path)
    module = make_module(tiny_policy, rewards=[VOWELS], advantage=f"{__name__}.tempered")
    experience = fit(module, prompts_file, tmp_path, max_steps=1).experiences[0]
    assert torch.equal(experience.advantages_PG, (experience.rewards_PG / 3).float())

"""Reward-model training: the Bradley-Terry loss, its metrics, its data, and one short run."""

import itertools
import math
import os
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lightning import Callback, Trainer
from scipy.stats import kendalltau, spearmanr
from torch.utils.data import DataLoader

from gopo_lightning.data import ratings
from gopo_lightning.data.comparison_batches import Comparisons, collate_sentences, wins_from_ratings
from gopo_lightning.data.preferences import PreferenceDataModule, ShardedSampler
from gopo_lightning.data.ratings import RatedSentence
from gopo_lightning.rewards import SequenceClassifierReward
from gopo_lightning.training.reward_model import ComparisonMetrics, RewardModelModule, bradley_terry
from tests.test_rewards import prompt, save_bert

# --- maths -----------------------------------------------------------------------------------------------------------


def test_wins_leave_ties_and_the_diagonal_out() -> None:
    expected_NN = torch.tensor([[math.nan, 1, math.nan], [0, math.nan, 0], [math.nan, 1, math.nan]])
    torch.testing.assert_close(wins_from_ratings(torch.tensor([2.0, -1, 2])), expected_NN, equal_nan=True)


def test_bradley_terry_is_the_mean_over_ordered_pairs() -> None:
    rng = np.random.default_rng(0)
    scores_N, ratings_N = rng.normal(size=7), rng.integers(-2, 3, size=7)
    losses = [
        math.log1p(math.exp(-(scores_N[i] - scores_N[j]) * np.sign(ratings_N[i] - ratings_N[j])))
        for i in range(7)
        for j in range(7)
        if ratings_N[i] != ratings_N[j]
    ]
    wins_NN = wins_from_ratings(torch.tensor(ratings_N, dtype=torch.float32))
    loss = bradley_terry(torch.tensor(scores_N), wins_NN)
    assert loss.item() == pytest.approx(np.mean(losses), rel=1e-6)


def test_bradley_terry_by_hand() -> None:
    wins_NN = torch.tensor([[math.nan, 1.0], [0.0, math.nan]])
    assert bradley_terry(torch.tensor([0.0, 0.0]), wins_NN).item() == pytest.approx(math.log(2))
    assert bradley_terry(torch.tensor([math.log(3), 0.0]), wins_NN).item() == pytest.approx(math.log(4 / 3))
    half_NN = torch.tensor([[math.nan, 0.5], [0.5, math.nan]])  # a tie pulls the scores together
    scores_N = torch.tensor([1.0, -1.0], requires_grad=True)
    bradley_terry(scores_N, half_NN).backward()
    assert scores_N.grad is not None
    assert scores_N.grad[0] > 0 > scores_N.grad[1]


def test_bradley_terry_without_pairs_has_zero_gradient() -> None:
    scores_N = torch.tensor([1.0, 2.0], requires_grad=True)
    loss = bradley_terry(scores_N, torch.full((2, 2), math.nan))
    loss.backward()
    assert loss.item() == 0
    assert scores_N.grad is not None
    assert scores_N.grad.tolist() == [0, 0]


def pair_accuracy(scores_N: torch.Tensor, ratings_N: torch.Tensor, low: float = 0.0, high: float = math.inf) -> float:
    """Share of the pairs rated more than low and at most high apart that the scores put in order, one by one."""
    right = [
        0.5 * (1 + np.sign((scores_N[i] - scores_N[j]).item()))
        for i, j in itertools.permutations(range(len(scores_N)), 2)
        if low < ratings_N[i] - ratings_N[j] <= high
    ]
    return float(np.mean(right))


def metrics_of(
    batches: list[tuple[torch.Tensor, torch.Tensor]], gap_bounds: tuple[float, ...] = ()
) -> dict[str, float]:
    """Of scores and ratings, batch by batch; the lengths count up over all."""
    metric, start = ComparisonMetrics(gap_bounds), 0
    for scores_N, ratings_N in batches:
        lengths_N = torch.arange(start, start := start + len(scores_N))
        wins_NN = wins_from_ratings(ratings_N)
        metric.update(scores_N, lengths_N, Comparisons(("x",) * len(wins_NN), wins_NN, ratings_N))
    return {name: value.item() for name, value in metric.compute().items()}


def test_accuracy_of_rated_texts_by_hand() -> None:
    ratings_N = torch.tensor([0.0, 1.0, 3.0, 3.0])
    scores_N = torch.tensor([5.0, 1.0, 2.0, 5.0])
    # ordered by people: (1,0) wrong, (2,0) wrong, (3,0) scored equal, (2,1) right, (3,1) right; (2,3) is their tie
    values = metrics_of([(scores_N, ratings_N)], (3.0,))
    assert values["pair_accuracy_all"] == pytest.approx(2.5 / 5)
    assert values["pair_accuracy"] == pytest.approx(2.5 / 4)
    assert math.isnan(values["pair_accuracy_gap_3-inf"])


def test_the_metrics_do_not_depend_on_the_batches() -> None:
    scores_N, ratings_N = torch.randn(9), torch.randn(9)
    whole = metrics_of([(scores_N, ratings_N)], (0.5, 1.0))
    parts = [(scores_N[rows], ratings_N[rows]) for rows in (slice(0, 4), slice(4, 8), slice(8, 9))]
    assert metrics_of(parts, (0.5, 1.0)) == whole
    wins_NN, difference_NN = wins_from_ratings(ratings_N), scores_N[:, None] - scores_N[None, :]
    asked_NN = (wins_NN == 1).nonzero(as_tuple=True)
    assert whole["loss"] == pytest.approx((1 + (-difference_NN[asked_NN]).exp()).log().mean().item(), rel=1e-5)
    assert whole["pair_accuracy_all"] == pytest.approx(pair_accuracy(scores_N, ratings_N))
    assert whole["pair_accuracy_gap_0.5-1"] == pytest.approx(pair_accuracy(scores_N, ratings_N, 0.5, 1.0))
    assert whole["kendall"] == pytest.approx(kendalltau(scores_N, ratings_N).statistic, abs=1e-6)
    assert whole["spearman"] == pytest.approx(spearmanr(scores_N, ratings_N).statistic, abs=1e-5)
    assert whole["length_bias"] == pytest.approx(spearmanr(scores_N, torch.arange(9)).statistic, abs=1e-5)


# --- data ------------------------------------------------------------------------------------------------------------

SENTENCES = [
    RatedSentence(str(i), f"{'good' if i % 2 else 'bad'} {i}", ((i % 2) * 4 - 2, (i % 2) * 4 - 3)) for i in range(50)
]


@pytest.fixture
def data(monkeypatch: pytest.MonkeyPatch) -> PreferenceDataModule:
    """50 sentences, of which 20 are held out: the odd ones are good."""
    monkeypatch.setattr(ratings, "load", lambda source: SENTENCES)
    monkeypatch.setattr(ratings, "NUM_VALIDATION_SENTENCES", 20)
    module = PreferenceDataModule(batch_size=8, eval_batch_size=16, prefix="> ")
    monkeypatch.setattr(module, "prepare_data", lambda: None)
    module.setup("fit")
    return module


def epoch(loader: DataLoader[Comparisons], number: int) -> list[Comparisons]:
    assert isinstance(loader.sampler, ShardedSampler)
    loader.sampler.set_epoch(number)
    return list(loader)


def test_batches_are_full_seeded_and_new_each_epoch(data: PreferenceDataModule) -> None:
    loader = data.train_dataloader()
    first, second = epoch(loader, 0), epoch(loader, 1)
    assert [len(batch) for batch in first] == [8, 8, 8]
    assert first[0].texts == epoch(data.train_dataloader(), 0)[0].texts
    assert torch.equal(first[0].ratings_N, epoch(data.train_dataloader(), 0)[0].ratings_N)  # type: ignore[arg-type]
    assert first[0].texts != second[0].texts
    assert all(text.startswith(("> good", "> bad")) for text in first[0].texts)


def test_no_held_out_sentence_is_trained_on(data: PreferenceDataModule) -> None:
    trained = {text for number in range(5) for batch in epoch(data.train_dataloader(), number) for text in batch.texts}
    held_out = {text for batch in data.val_dataloader() for text in batch.texts}
    assert len(held_out) == 20
    assert not trained & held_out
    assert held_out == {"> " + s.text for s in ratings.split(SENTENCES, "validation")}


def test_training_draws_one_rater_and_validation_takes_the_mean() -> None:
    sentence = RatedSentence("1", "fine", (1, 2, 4))
    drawn = [
        collate_sentences([(sentence, draw)], prefix="", one_rater=True).ratings_N for draw in (0.0, 0.34, 0.9999999)
    ]
    assert [r.item() for r in drawn if r is not None] == [1, 2, 4]
    mean = collate_sentences([(sentence, 0.9)], prefix="", one_rater=False).ratings_N
    assert mean is not None
    assert mean.item() == pytest.approx(7 / 3)
    draws = [draw for _, draw in ShardedSampler(3000, shuffle=True, seed=1)]
    assert np.mean(draws) == pytest.approx(0.5, abs=0.02)


def test_ranks_share_the_rows_out() -> None:
    def rows(shuffle: bool, rank: int, world_size: int) -> list[tuple[int, float]]:
        return list(ShardedSampler(11, shuffle=shuffle, seed=3, rank=rank, world_size=world_size))

    whole, shards = rows(True, 0, 1), [rows(True, rank, 2) for rank in (0, 1)]
    assert sorted(row for row, _ in whole) == list(range(11))
    assert [len(shard) for shard in shards] == [5, 5]
    assert {*shards[0], *shards[1]} == set(whole[:10])
    plain = [rows(False, rank, 2) for rank in (0, 1)]
    assert [[row for row, _ in part] for part in plain] == [[0, 2, 4, 6, 8, 10], [1, 3, 5, 7, 9, 0]]
    assert [math.isnan(draw) for part in plain for _, draw in part] == [False] * 11 + [True]


def test_bad_data_options_are_refused(data: PreferenceDataModule) -> None:
    with pytest.raises(ValueError, match=r"fixed split and takes no limit, split"):
        PreferenceDataModule(split="train", limit=3)
    with pytest.raises(ValueError, match=r"prefix='> ' belongs to packaged:movie-ratings"):
        PreferenceDataModule("Anthropic/hh-rlhf", prefix="> ")
    with pytest.raises(ValueError, match=r"batch_size=1.*at least 2 sentences"):
        PreferenceDataModule(batch_size=1)
    data.batch_size = 31
    with pytest.raises(ValueError, match="batch_size=31, but a rank has only 30 sentences"):
        data.train_dataloader()


# --- training --------------------------------------------------------------------------------------------------------


@pytest.fixture
def trained(data: PreferenceDataModule, tmp_path: Path) -> Trainer:
    """A tiny BERT after 40 steps on sentences whose first word says it all."""
    torch.manual_seed(0)
    module = RewardModelModule(
        str(save_bert(tmp_path / "base")),
        export_dir=str(tmp_path / "export"),
        optimizer=lambda parameters: torch.optim.AdamW(parameters, lr=3e-3),
        warmup_steps=4,
    )
    trainer = Trainer(
        max_steps=40,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        use_distributed_sampler=False,
    )
    trainer.fit(module, data)
    return trainer


def test_a_base_model_is_not_overwritten_by_its_fine_tuned_copy(data: PreferenceDataModule, tmp_path: Path) -> None:
    base = save_bert(tmp_path / "base")
    module = RewardModelModule(str(base), export_dir=str(base))
    before = (base / "model.safetensors").read_bytes()
    with pytest.raises(ValueError, match=r"model.init_args.export_dir=.*base: it holds config.json"):
        Trainer(max_steps=1, accelerator="cpu", logger=False, enable_checkpointing=False).fit(module, data)
    assert (base / "model.safetensors").read_bytes() == before


@pytest.mark.parametrize("step", [2, 5, 6, 7])
def test_an_interrupted_run_is_saved_and_ends_like_one_that_was_not(
    data: PreferenceDataModule, tmp_path: Path, step: int
) -> None:
    """In the middle of an epoch, which has three batches, and at its ends."""

    class CtrlC(Callback):
        def on_train_batch_start(self, trainer: Trainer, *_: Any) -> None:
            if trainer.global_step == step - 1:
                os.kill(os.getpid(), signal.SIGINT)

    def train(name: str, *callbacks: Callback, resume: Path | None = None) -> dict[str, torch.Tensor]:
        torch.manual_seed(0)
        module = RewardModelModule(str(base), warmup_steps=4)
        for layer in module.modules():
            if isinstance(layer, torch.nn.Dropout):
                layer.p = 0.0
        options = {"logger": False, "default_root_dir": tmp_path / name, "enable_progress_bar": False}
        trainer = Trainer(max_steps=9, accelerator="cpu", use_distributed_sampler=False, **options)  # type: ignore[arg-type]
        trainer.callbacks += callbacks  # type: ignore[attr-defined]
        trainer.fit(module, data, ckpt_path=resume)
        return module.state_dict()

    base = save_bert(tmp_path / "base")
    whole = train("whole")
    with pytest.raises(SystemExit, match="130"):
        train("parts", CtrlC())
    rest = train("parts", resume=tmp_path / "parts" / "checkpoints" / f"interrupted-step={step}.ckpt")
    assert all(torch.equal(rest[name], value) for name, value in whole.items())


def test_a_resumed_run_takes_the_settings_it_is_given(data: PreferenceDataModule, tmp_path: Path) -> None:
    base = str(save_bert(tmp_path / "base"))
    quiet = {
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "use_distributed_sampler": False,
    }

    def train(max_steps: int, resume: Path | None = None, **options: Any) -> Trainer:
        trainer = Trainer(max_steps=max_steps, accelerator="cpu", **quiet)  # type: ignore[arg-type]
        trainer.fit(RewardModelModule(base, warmup_steps=0, **options), data, ckpt_path=resume)
        return trainer

    train(2).save_checkpoint(path := tmp_path / "first.ckpt")
    resumed = train(4, path, optimizer=lambda parameters: torch.optim.AdamW(parameters, lr=1e-3))
    assert resumed.lr_scheduler_configs[0].scheduler.base_lrs == [1e-3]
    assert resumed.optimizers[0].param_groups[0]["initial_lr"] == 1e-3
    with pytest.raises(ValueError, match="optimizer.class AdamW → SGD.*on_setting_change: warn"):
        train(4, path, optimizer=lambda parameters: torch.optim.SGD(parameters, lr=1e-3))
    with pytest.raises(ValueError, match="objective bradley_terry → plackett_luce"):
        train(4, path, objective="plackett_luce")
    data.batch_size -= 1
    with pytest.raises(ValueError, match="batch_size .*on_data_change: warn"):
        train(4, path)


@pytest.mark.parametrize(("options", "expected"), [({"max_steps": -1, "max_epochs": 2}, 2), ({"max_steps": 3}, None)])
def test_a_schedule_ends_with_the_run(
    options: dict[str, int], expected: int | None, data: PreferenceDataModule, tmp_path: Path
) -> None:
    quiet = {
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "use_distributed_sampler": False,
    }
    trainer = Trainer(accelerator="cpu", **options, **quiet)  # type: ignore[arg-type]
    trainer.fit(RewardModelModule(str(save_bert(tmp_path / "base")), warmup_steps=0), data)
    assert trainer.lr_scheduler_configs[0].scheduler.get_last_lr() == [0.0]
    assert trainer.global_step == (3 if expected is None else expected * trainer.num_training_batches)


def test_a_short_run_learns_logs_and_exports_what_the_reward_loads(
    trained: Trainer, data: PreferenceDataModule, tmp_path: Path
) -> None:
    logged = {name: float(value) for name, value in trained.callback_metrics.items()}
    assert logged["val/pair_accuracy"] > 0.95
    assert set(logged) >= {"train/loss", "val/pair_accuracy", "val/pair_accuracy_all", "val/spearman"}

    assert (tmp_path / "export" / "model.safetensors").is_file()
    source = SequenceClassifierReward(str(tmp_path / "export"))
    source.setup(torch.device("cpu"))
    batches = list(data.val_dataloader())
    texts = [text for batch in batches for text in batch.texts]
    scores_N = source([prompt("")] * len(texts), texts)
    ratings_N = torch.cat([batch.ratings_N for batch in batches if batch.ratings_N is not None])
    assert pair_accuracy(scores_N, ratings_N, 1.0) == pytest.approx(logged["val/pair_accuracy"], abs=1e-6)
    assert spearmanr(scores_N, ratings_N).statistic == pytest.approx(logged["val/spearman"], abs=1e-5)


def test_the_learning_rate_warms_up_and_ends_at_zero(trained: Trainer) -> None:
    scheduler = trained.lr_scheduler_configs[0].scheduler
    assert scheduler.get_last_lr() == [0.0]  # stepped with every optimiser step
    rates = [scheduler.lr_lambdas[0](step) for step in range(6)]
    assert rates[:5] == [0.25, 0.5, 0.75, 1, 1]  # four steps of warm-up, whose first is not lost
    assert rates[5] < 1


def test_training_has_dropout_and_validation_float32_scores(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module = RewardModelModule(str(save_bert(tmp_path)))
    assert all(child.training for child in module.model.modules())
    seen: list[torch.Tensor] = []
    monkeypatch.setattr(module.metrics, "update", lambda scores_N, *_: seen.append(scores_N))
    batch = Comparisons(("good", "bad"), torch.zeros(2, 2), torch.tensor([1.0, 0.0]))
    with torch.autocast("cpu", dtype=torch.bfloat16), torch.no_grad():
        module.eval().validation_step(batch, 0)
    assert seen[0].dtype == torch.float32
    assert (seen[0] != seen[0].bfloat16().float()).any()


def test_a_tokenizer_without_pad_token_is_refused(tmp_path: Path) -> None:
    from tests.conftest import byte_tokenizer

    tokenizer = byte_tokenizer()
    tokenizer.pad_token = None
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    with pytest.raises(ValueError, match=r"no pad token, which batches need. Set model.tokenizer"):
        RewardModelModule(str(save_bert(tmp_path / "model")), tokenizer=str(tmp_path / "tokenizer"))

"""A run that is resumed with other settings applies them and says so, or is refused."""

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, Trainer

from gopo_lightning.training.resume import KEY, describe_setting_changes, plain
from tests.runs import make_data, make_module, make_trainer


def adamw(**options: Any) -> Any:
    return lambda params: torch.optim.AdamW(params, **({"lr": 1e-3} | options))


@pytest.fixture(scope="module")
def first(tmp_path_factory: pytest.TempPathFactory, tiny_policy: Path, prompts_file: Path) -> Path:
    """The checkpoint of a run of two steps."""
    folder = tmp_path_factory.mktemp("first")
    trainer = make_trainer(folder, max_steps=2)
    trainer.fit(make_module(tiny_policy, optimizer=adamw()), make_data(prompts_file, validation=None))
    trainer.save_checkpoint(folder / "first.ckpt")
    return folder / "first.ckpt"


def resume(first: Path, tiny_policy: Path, prompts_file: Path, folder: Path, **module: Any) -> Trainer:
    trainer = make_trainer(folder, max_steps=3)
    options = {"optimizer": adamw()} | module
    trainer.fit(make_module(tiny_policy, **options), make_data(prompts_file, validation=None), ckpt_path=first)
    return trainer


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"seed": 4}, "seed 3 → 4"),
        ({"num_completions": 3}, "num_completions 4 → 3"),
        ({"advantage": "grpo"}, "objective.advantage.function ordinal → grpo"),
        (
            {"advantage": {"function": "ordinal", "init_args": {"ties": "arbitrary"}}},
            "objective.advantage.init_args.ties absent → arbitrary",
        ),
    ],
)
def test_another_run_is_refused_or_warned_about(
    change: dict[str, Any], message: str, first: Path, tiny_policy: Path, prompts_file: Path, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=f"{message}.*model.init_args.on_setting_change: warn"):
        resume(first, tiny_policy, prompts_file, tmp_path, **change)
    with pytest.warns(UserWarning, match=message):
        trainer = resume(first, tiny_policy, prompts_file, tmp_path, **change, on_setting_change="warn")
    assert trainer.global_step == 3


def test_a_checkpoint_validates_under_any_settings(
    first: Path, tiny_policy: Path, prompts_file: Path, tmp_path: Path
) -> None:
    module = make_module(tiny_policy, seed=4, advantage="grpo")
    make_trainer(tmp_path).validate(module, make_data(prompts_file), ckpt_path=first, verbose=False)


def test_changes_are_named_by_their_path() -> None:
    old, new = {"loss": {"kl_coef": 0.0, "gone": 1}}, {"loss": {"kl_coef": 0.1}, "of another version": 1}
    assert [str(change) for change in describe_setting_changes(old, new)] == [
        "loss.gone 1 → absent",
        "loss.kl_coef 0.0 → 0.1",
    ]
    assert describe_setting_changes(old, old) == []


def test_settings_are_plain() -> None:
    """A checkpoint holds no code; a tuple is the list that it becomes there."""
    settings = plain({"sizes": (1, 2), "function": describe_setting_changes})
    assert settings == {"sizes": [1, 2], "function": "<function describe_setting_changes>"}


class Rates(Callback):
    """The learning rate and weight decay of every update."""

    def __init__(self) -> None:
        self.seen: list[tuple[float, float]] = []

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        self.seen += [(group["lr"], group["weight_decay"]) for group in optimizer.param_groups]


@pytest.mark.parametrize(
    ("module", "expected", "said"),
    [
        ({"optimizer": adamw()}, [(1e-3, 0.01)] * 2, ""),
        ({"optimizer": adamw(lr=1e-2)}, [(1e-2, 0.01)] * 2, "optimizer.lr 0.001 → 0.01."),
        ({"optimizer": adamw(weight_decay=0.5)}, [(1e-3, 0.5)] * 2, "optimizer.weight_decay 0.01 → 0.5."),
        ({"lr_schedule": "linear"}, [(5e-4, 0.01), (2.5e-4, 0.01)], "schedule.name constant → linear."),
        ({"max_grad_norm": 2.0}, [(1e-3, 0.01)] * 2, "update.max_grad_norm None → 2.0."),
    ],
)
def test_what_may_change_acts_from_the_resume_on_and_is_said(
    module: dict[str, Any],
    expected: list[tuple[float, float]],
    said: str,
    first: Path,
    tiny_policy: Path,
    prompts_file: Path,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    rates = Rates()
    trainer = make_trainer(tmp_path, max_steps=4, callbacks=[rates])
    data = make_data(prompts_file, validation=None)
    with caplog.at_level("INFO"):
        trainer.fit(make_module(tiny_policy, **({"optimizer": adamw()} | module)), data, ckpt_path=first)
    assert rates.seen == [pytest.approx(pair) for pair in expected]
    sentences = [text for text in caplog.messages if "changed since the checkpoint" in text]
    assert sentences == ([f"Settings that changed since the checkpoint, and act from here on: {said}"] if said else [])
    state = trainer.optimizers[0].state
    assert all(float(moments["step"]) == 4 for moments in state.values())  # the moments went on


def test_another_optimiser_is_refused(first: Path, tiny_policy: Path, prompts_file: Path, tmp_path: Path) -> None:
    other = {"optimizer": lambda params: torch.optim.NAdam(params, lr=1e-3)}
    with pytest.raises(ValueError, match=r"optimizer.class AdamW → NAdam"):
        resume(first, tiny_policy, prompts_file, tmp_path, **other)


@pytest.mark.parametrize(("kept", "rate"), [("zero", 0.5), ("first_step", 0.75)])
def test_a_checkpoint_keeps_the_start_of_its_warm_up(
    kept: str, rate: float, tiny_policy: Path, prompts_file: Path, tmp_path: Path
) -> None:
    """One that says nothing of it is older than the choice, and has ``zero``."""

    def module(**options: Any) -> Any:
        warm = {"lr_schedule": "constant_with_warmup", "warmup_steps": 4}
        return make_module(tiny_policy, optimizer=adamw(lr=1.0), **(warm | options))

    trainer = make_trainer(tmp_path, max_steps=2)
    trainer.fit(module(warmup_start=kept), make_data(prompts_file, validation=None))
    trainer.save_checkpoint(tmp_path / "first.ckpt")
    checkpoint = torch.load(tmp_path / "first.ckpt", weights_only=True)
    if kept == "zero":
        del checkpoint[KEY]
    torch.save(checkpoint, tmp_path / "first.ckpt")
    other = {"zero": "first_step", "first_step": "zero"}[kept]
    rates = Rates()
    trainer = make_trainer(tmp_path, max_steps=3, callbacks=[rates])
    with pytest.warns(UserWarning, match=f"warmup_start: {kept} stays"):
        trainer.fit(
            module(warmup_start=other), make_data(prompts_file, validation=None), ckpt_path=tmp_path / "first.ckpt"
        )
    assert rates.seen == [(rate, 0.01)]

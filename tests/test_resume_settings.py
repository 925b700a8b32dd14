"""A run that is resumed with other settings applies them and says so, or is refused."""

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer

from gopo_lightning.resume import describe_setting_changes, plain
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
        ({"advantage": "grpo"}, "advantage ordinal → grpo"),
        ({"advantage_options": {"ties": "arbitrary"}}, "advantage_options.ties absent → arbitrary"),
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
    old, new = {"loss": {"kl_coef": 0.0, "clip_low": 0.2}, "gone": 1}, {"loss": {"kl_coef": 0.1, "clip_low": 0.2}}
    assert [str(change) for change in describe_setting_changes(old, new)] == [
        "gone 1 → absent",
        "loss.kl_coef 0.0 → 0.1",
    ]
    assert describe_setting_changes(old, old) == []


def test_settings_are_plain() -> None:
    """A checkpoint holds no code; a tuple is the list that it becomes there."""
    settings = plain({"sizes": (1, 2), "function": describe_setting_changes})
    assert settings == {"sizes": [1, 2], "function": "<function describe_setting_changes>"}

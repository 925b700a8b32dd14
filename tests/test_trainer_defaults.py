"""A Trainer made in Python behaves as the command line's, or says what it lacks."""

from pathlib import Path
from typing import Any

import pytest
from lightning.pytorch import Trainer

import gopo_lightning
from tests.runs import make_data, make_module

QUIET: dict[str, Any] = {
    "accelerator": "cpu",
    "max_steps": 1,
    "logger": False,
    "enable_checkpointing": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
}


def test_a_trainer_with_the_defaults_trains(tiny_policy: Path, prompts_file: Path, tmp_path: Path) -> None:
    trainer = Trainer(**gopo_lightning.trainer_defaults(), **QUIET, val_check_interval=1, default_root_dir=tmp_path)
    trainer.fit(make_module(tiny_policy), make_data(prompts_file))
    assert trainer.global_step == 1 and trainer.callback_metrics["val/win_rate"] >= 0


@pytest.mark.parametrize(
    ("option", "value"), [("num_sanity_val_steps", 2), ("num_sanity_val_steps", -1), ("inference_mode", True)]
)
def test_other_values_are_refused_with_the_remedy(
    option: str, value: Any, tiny_policy: Path, prompts_file: Path, tmp_path: Path
) -> None:
    options = gopo_lightning.trainer_defaults() | {option: value}
    trainer = Trainer(**options, **QUIET, default_root_dir=tmp_path)
    with pytest.raises(ValueError, match=rf"trainer\.{option}=.*trainer_defaults\(\)"):
        trainer.fit(make_module(tiny_policy), make_data(prompts_file))

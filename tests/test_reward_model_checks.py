"""Reward-model training stops before it does harm: bad texts at set-up, no step and no export that is not finite."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning import Callback, Trainer

from gopo_lightning.data.preferences import PreferenceDataModule
from gopo_lightning.training.reward_model import RewardModelModule
from tests.test_rewards import save_bert

REFUSES_SYSTEM = (
    "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no system here') }}{% endif %}x{% endfor %}"
)


def pair(i: int, **others: Any) -> dict[str, Any]:
    return {"prompt": f"q{i} ", "chosen": "good", "rejected": "bad"} | others


def chat(*, system: bool = False) -> dict[str, Any]:
    start = [{"role": "system", "content": "be brief"}] if system else []
    turns = [{"role": "user", "content": "q"}]
    return {key: [*start, *turns, {"role": "assistant", "content": key}] for key in ("chosen", "rejected")}


def fit(
    folder: Path,
    rows: list[dict[str, Any]],
    *callbacks: Callback,
    data: Any = None,
    trainer: Any = None,
    **options: Any,
) -> RewardModelModule:
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    model = folder / "model"
    module = RewardModelModule(str(model), export_dir=str(folder / "export"), warmup_steps=0, **options)
    quiet = {
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    run = Trainer(
        num_sanity_val_steps=0,
        use_distributed_sampler=False,
        default_root_dir=folder,
        callbacks=list(callbacks),
        **({"max_steps": 2, "accelerator": "cpu"} | quiet | (trainer or {})),
    )
    run.fit(module, PreferenceDataModule(str(path), **({"batch_size": 2, "eval_batch_size": 2} | (data or {}))))
    return module


@pytest.fixture
def model(tmp_path: Path) -> Path:
    save_bert(tmp_path / "model", template=True)
    return tmp_path


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (pair(0, chosen="cut \ud83d"), "half a character"),
        (pair(0, chosen="good " * 600), r"\d+ tokens exceed max_length"),
        (chat(), "is a plain text and row 6 .* a conversation; they are tokenized differently"),
    ],
)
def test_a_bad_text_is_found_at_setup(bad: dict[str, Any], message: str, model: Path) -> None:
    """Wherever it stands, with its row, and before the first step."""
    with pytest.raises(ValueError, match=rf"row \d+ \(counted from 0\) of .*rows\.jsonl.*{message}") as error:
        fit(model, [*(pair(i) for i in range(6)), bad, pair(7)], NoStep())
    assert "row 6 " in str(error.value)


def test_a_role_that_the_template_refuses_is_found_at_setup(model: Path) -> None:
    (model / "model" / "chat_template.jinja").write_text(REFUSES_SYSTEM)
    with pytest.raises(
        ValueError, match=r"row 5 .*the chat template refuses .*roles system, user, assistant: no system"
    ):
        fit(model, [*[chat()] * 5, chat(system=True)], NoStep(), truncation="left")


class NoStep(Callback):
    """Fails where a batch is trained on."""

    def on_train_batch_start(self, *args: Any) -> None:
        raise AssertionError("a batch was trained on")


class Poison(Callback):
    """Puts NaN into the scores' gradient, or into a weight after the last step."""

    def __init__(self, *, gradient: bool) -> None:
        self.gradient = gradient

    def on_after_backward(self, trainer: Any, module: Any) -> None:
        if self.gradient and trainer.global_step == 1:
            next(p for p in module.parameters() if p.grad is not None).grad.flatten()[0] = math.nan

    def on_exception(self, trainer: Any, module: Any, exception: BaseException) -> None:
        self.is_unchanged = self.gradient and all(map(torch.equal, module.parameters(), self.before))

    def on_train_batch_end(self, trainer: Any, module: Any, *args: Any) -> None:
        if self.gradient:
            self.before = [p.detach().clone() for p in module.parameters()]
        elif trainer.global_step == 2:
            with torch.no_grad():
                next(module.parameters()).flatten()[0] = math.inf


def test_no_step_is_made_with_a_gradient_that_is_not_finite(model: Path) -> None:
    poison = Poison(gradient=True)
    with pytest.raises(ValueError, match=r"step 1: loss .* and gradient norm nan must be finite. .*the batch is in"):
        fit(model, [pair(i) for i in range(12)], poison, trainer={"max_steps": 4})
    assert poison.is_unchanged and not (model / "export").exists()
    saved = torch.load(next(model.rglob("nonfinite_step1_rank0.pt")), weights_only=False)
    assert len(saved.texts) == 4


def test_no_step_is_made_with_a_loss_that_is_not_finite(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loss = RewardModelModule._loss
    monkeypatch.setattr(RewardModelModule, "_loss", lambda *args: loss(*args) * math.inf)
    with pytest.raises(ValueError, match="step 0: loss inf"):
        fit(model, [pair(i) for i in range(12)])


def test_weights_that_are_not_finite_are_not_exported(model: Path) -> None:
    with pytest.raises(ValueError, match="1 weights are not finite, .* nothing is exported"):
        fit(model, [pair(i) for i in range(12)], Poison(gradient=False), trainer={"limit_val_batches": 0})
    assert not (model / "export").exists()


@pytest.mark.parametrize(
    ("num_rows", "fraction", "message"),
    [
        (1, 0.1, "holds out all 1 comparisons of .*Give more, or name a validation_source"),
        (5, 0.9, "holds out all 5 comparisons of .*Give more, lower it, or name a validation_source"),
    ],
)
def test_a_split_that_leaves_nothing_to_train_on(num_rows: int, fraction: float, message: str, model: Path) -> None:
    rows = [pair(i) for i in range(num_rows)]
    with pytest.raises(ValueError, match=rf"validation_fraction={fraction} {message}"):
        fit(model, rows, data={"batch_size": 1, "validation_fraction": fraction})
    path = str(model / "rows.jsonl")
    fit(model, rows, data={"batch_size": 1, "validation_source": path})

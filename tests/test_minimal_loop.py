"""`scripts/minimal_loop.py` trains as the app does: the page that explains GOPO cannot drift away from it."""

import json
import re
import runpy
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback

from gopo_lightning.data.prompts import PromptDataModule
from gopo_lightning.data.sources import PromptSource
from gopo_lightning.rewards import FunctionReward
from gopo_lightning.rollout import SamplingConfig
from tests.runs import make_module, make_trainer

SCRIPT = Path(__file__).parents[1] / "scripts" / "minimal_loop.py"
STEPS = 3


class Recorder(Callback):
    """Gradients of each step, as the optimiser reads them, and the metrics."""

    def __init__(self) -> None:
        self.gradients: list[torch.Tensor] = []
        self.metrics: list[dict[str, float]] = []

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        self.gradients.append(gradient(pl_module.policy))

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.metrics.append({key: float(value) for key, value in trainer.callback_metrics.items()})


def gradient(model: torch.nn.Module) -> torch.Tensor:
    """As one vector."""
    return torch.cat([parameter.grad.flatten() for parameter in model.parameters() if parameter.grad is not None])


def run_script(monkeypatch: pytest.MonkeyPatch, policy: Path, steps: int) -> dict[str, Any]:
    """The script's variables at its end."""
    arguments = [str(policy), f"--steps={steps}", "--lr=1e-3", "--seed=3", "--num_completions=4"]
    monkeypatch.setattr("sys.argv", [str(SCRIPT), *arguments])
    return runpy.run_path(str(SCRIPT))


def run_app(policy: Path, folder: Path, script: dict[str, Any]) -> Recorder:
    """The same settings, through data module, callback, module and Trainer."""
    rows = [json.dumps({"prompt": text}) for text in script["PROMPTS"]]
    (folder / "prompts.jsonl").write_text("\n".join(rows))
    data = PromptDataModule(PromptSource(str(folder / "prompts.jsonl")), prompts_per_step=4, seed=3)
    module = make_module(
        policy,
        rewards=[FunctionReward(lambda completions: [script["reward"](text) for text in completions], name="vowels")],
        sampling=SamplingConfig(max_new_tokens=32),
        optimizer=lambda parameters: torch.optim.AdamW(parameters, lr=1e-3, weight_decay=0.0),
        max_grad_norm=1.0,
    )
    recorder = Recorder()
    make_trainer(folder, max_steps=STEPS, limit_val_batches=0, callbacks=[recorder]).fit(module, data)
    return recorder


def test_every_step_is_that_of_the_module(
    tiny_policy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Not to the last bit: the module forwards a prompt once and longest groups first, which rounds otherwise."""
    scripts = [run_script(monkeypatch, tiny_policy, steps) for steps in range(1, STEPS + 1)]
    printed = re.findall(r"step (\d): reward (\S+),", capsys.readouterr().out)[-STEPS:]
    app = run_app(tiny_policy, tmp_path, scripts[0])
    assert any(script["rewards_PG"].isnan().any() for script in scripts), "one without a score is among them"
    for step, (script, metrics, ours) in enumerate(zip(scripts, app.metrics, app.gradients, strict=True)):
        torch.testing.assert_close(gradient(script["model"]), ours, rtol=0, atol=1e-6)
        assert ours.norm() > 0.5  # clipped to 1
        assert script["loss"].item() == pytest.approx(metrics["train/loss"], abs=1e-6)
        assert printed[step] == (str(step), f"{metrics['reward/mean']:.4f}")

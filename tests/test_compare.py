"""The comparison of two configs over seeds: its numbers by hand, from event files."""

import importlib
import math
import sys
from pathlib import Path
from typing import Any

import pytest
from torch.utils.tensorboard import SummaryWriter

VALUES = {"gopo": [(0.0, 1.0), (0.0, 2.0), (0.0, 3.0)], "grpo": [(0.0, 0.0), (0.0, 2.0), (0.0, 1.0)]}
"""Of each seed, at steps 0 and 10."""


@pytest.fixture
def compare(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The script, in a folder where the runs are done already."""
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "scripts"))
    monkeypatch.chdir(tmp_path)
    for name, seeds in VALUES.items():
        for seed, points in enumerate(seeds, 1):
            writer = SummaryWriter(f"runs/compare/{name}-seed{seed}")
            for step, value in zip((0, 10), points, strict=True):
                writer.add_scalar("val/reward", value, step)
            writer.close()
    return importlib.import_module("compare")


def test_the_paired_difference_and_its_interval(
    compare: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert compare.interval([1.0, 2.0, 3.0]) == pytest.approx((2.0, 4.303 / math.sqrt(3)), rel=1e-3)
    assert math.isnan(compare.interval([1.0])[1])
    flags = ["--seeds", "1", "2", "3", "--tags", "val/reward", "--output", "out.png"]
    monkeypatch.setattr(sys, "argv", ["compare.py", "gopo.yaml", "grpo.yaml", *flags])
    compare.main()
    out = capsys.readouterr().out
    assert "| val/reward, step | gopo | grpo | difference, same seed |" in out
    assert "| 0 | +0.000 ± 0.000 | +0.000 ± 0.000 | +0.000 ± 0.000 |" in out
    # of the same seed 1, 0 and 2 apart
    assert "| 10 | +2.000 ± 2.484 | +1.000 ± 2.484 | +1.000 ± 2.484 |" in out
    assert Path("out.png").stat().st_size > 5000


def test_missing_runs_are_trained_with_their_seed(compare: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    commands: list[list[str]] = []
    monkeypatch.setattr(compare.subprocess, "run", lambda command, check: commands.append(command))
    assert compare.train(Path("configs/gopo.yaml"), 3, []) == Path("runs/compare/gopo-seed3")
    assert not commands
    compare.train(Path("configs/gopo.yaml"), 4, ["--trainer.max_steps=5"])
    assert commands[0][2:] == [
        *("gopo_lightning", "fit", "--config", "configs/gopo.yaml"),
        "--seed_everything=4",
        "--trainer.logger.init_args.save_dir=runs",
        "--trainer.logger.init_args.name=compare",
        "--trainer.logger.init_args.version=gopo-seed4",
        "--trainer.max_steps=5",
    ]

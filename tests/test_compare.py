"""The comparison of two configs over seeds: its numbers by hand, from event files."""

import importlib
import math
import re
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
    script = importlib.import_module("compare")
    for name, seeds in VALUES.items():
        Path(f"{name}.yaml").write_text(f"model: {{advantage: {name}}}")
        for seed, points in enumerate(seeds, 1):
            finish(script.folder_of(f"{name}.yaml", seed, []), points)
    return script


def finish(run: Path, points: tuple[float, float]) -> None:
    """As a run ends that was trained."""
    writer = SummaryWriter(str(run))
    for step, value in zip((0, 10), points, strict=True):
        writer.add_scalar("val/reward", value, step)
    writer.close()
    (run / "compare.json").touch()


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


@pytest.fixture
def commands(compare: Any, monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """What would have been trained."""
    called: list[list[str]] = []
    monkeypatch.setattr(compare.subprocess, "run", lambda command, check: called.append(command))
    return called


def test_missing_runs_are_trained_with_their_seed(compare: Any, commands: list[list[str]]) -> None:
    run = compare.train("gopo.yaml", 4, ["--trainer.max_steps=5"])
    assert commands[0][2:] == [
        *("gopo_lightning", "fit", "--config", "gopo.yaml"),
        "--seed_everything=4",
        "--trainer.logger.init_args.save_dir=runs",
        "--trainer.logger.init_args.name=compare",
        f"--trainer.logger.init_args.version={run.name}",
        "--ckpt_path=last",
        "--trainer.max_steps=5",
    ]
    assert re.fullmatch(r"runs/compare/gopo-[0-9a-f]{8}-seed4", str(run))


def test_a_finished_run_is_read_and_said_to_be(
    compare: Any, commands: list[list[str]], capsys: pytest.CaptureFixture[str]
) -> None:
    Path("gopo.yaml").write_text("# a comment\nmodel:\n  advantage: gopo\n")
    run = compare.train("gopo.yaml", 3, [])
    assert not commands and f"read, not trained: {run}, finished 20" in capsys.readouterr().out
    compare.train("gopo.yaml", 4, [])
    compare.train("gopo.yaml", 4, [])
    assert len(commands) == 1


def test_an_interrupted_run_goes_on(compare: Any, commands: list[list[str]]) -> None:
    run = compare.folder_of("gopo.yaml", 1, [])
    (run / "compare.json").unlink()
    assert compare.train("gopo.yaml", 1, []) == run
    assert "--ckpt_path=last" in commands[0]


@pytest.mark.parametrize("changed", ["config", "flags", "overlay", "code", "folder"])
def test_nothing_stale_is_read(
    changed: str, compare: Any, commands: list[list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, flags = "gopo.yaml", ["--config=overlay.yaml", "--config", "other.yaml"]
    for name in ("overlay.yaml", "other.yaml"):
        Path(name).write_text("trainer: {max_steps: 5}")
    compare.train(config, 1, flags)
    if changed == "config":
        Path(config).write_text("model: {advantage: gopo, seed: 1}")
    elif changed == "flags":
        flags = [*flags, "--trainer.max_steps=5"]
    elif changed == "overlay":
        Path("other.yaml").write_text("trainer: {max_steps: 6}")
    elif changed == "code":
        (tmp_path / "package").mkdir()
        (tmp_path / "package" / "__init__.py").write_text("another line")
        monkeypatch.setattr(compare.gopo_lightning, "__file__", str(tmp_path / "package" / "__init__.py"))
    else:
        Path("b").mkdir()
        (Path("b") / "gopo.yaml").write_text("model: {advantage: rloo}")
        config = "b/gopo.yaml"
    compare.train(config, 1, flags)
    assert len(commands) == 2


def test_files_called_alike_are_told_apart(compare: Any) -> None:
    assert compare.labels(["a/gopo.yaml", "a/grpo.yaml"]) == ["gopo", "grpo"]
    assert compare.labels(["a/gopo.yaml", "b/gopo.yaml"]) == ["a/gopo.yaml", "b/gopo.yaml"]
    assert compare.labels(["a/tldr.yaml", "a/tldr.yaml+b/grpo.yaml"]) == ["tldr", "tldr+grpo"]
    for other in ("./gopo.yaml", "../" + Path.cwd().name + "/gopo.yaml"):
        with pytest.raises(ValueError, match="compared with itself"):
            compare.labels(["gopo.yaml", other])


def test_layers_are_given_one_after_the_other(compare: Any, commands: list[list[str]]) -> None:
    Path("overlay.yaml").write_text("trainer: {max_steps: 5}")
    run = compare.train("gopo.yaml+overlay.yaml", 1, [])
    assert commands[0][3:9] == ["fit", "--config", "gopo.yaml", "--config", "overlay.yaml", "--seed_everything=1"]
    assert re.fullmatch(r"gopo\+overlay-[0-9a-f]{8}-seed1", run.name)
    Path("overlay.yaml").write_text("trainer: {max_steps: 6}")
    assert compare.folder_of("gopo.yaml+overlay.yaml", 1, []) != run

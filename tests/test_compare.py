"""The command compare: its numbers by hand from event files, and when it trains."""

import io
import json
import re
import subprocess
from contextlib import redirect_stdout, suppress
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import yaml

from gopo_lightning.commands import compare as command
from gopo_lightning.commands import report
from gopo_lightning.commands.lightning_cli import run
from gopo_lightning.evaluation.report_page import PAGE
from tests.event_runs import write_run

VALUES = {"ordinal": [(0.0, 1.0), (0.0, 2.0), (0.0, 3.0)], "grpo": [(0.0, 0.0), (0.0, 2.0), (0.0, 1.0)]}
"""Of each seed, at steps 0 and 10."""


def layered(config: str, flags: tuple[str, ...]) -> dict[str, Any]:
    """Stands for `resolved`, which starts a process: the files as they are."""
    return {"layers": [yaml.safe_load(file.read_text()) for file in command.layers(config)], "flags": list(flags)}


@pytest.fixture
def compare(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The command, in a folder where the runs are done already."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(command, "resolved", cache(layered))
    for name, seeds in VALUES.items():
        Path(f"{name}.yaml").write_text(f"model: {{advantage: {name}}}")
        for seed, points in enumerate(seeds, 1):
            run = command.folder_of(f"{name}.yaml", seed, [])
            write_run(run, name, seed, dict(zip((0, 10), points, strict=True)))
            (run / "compare.json").touch()
    return command


def test_the_paired_difference_its_interval_and_the_report(compare: Any, capsys: pytest.CaptureFixture[str]) -> None:
    compare.main(["ordinal.yaml", "grpo.yaml", "--seeds", "1", "2", "3", "--tags", "val/reward"])
    out = capsys.readouterr().out
    assert "| val/reward, step | ordinal | grpo | difference, same seed |" in out
    assert "| 0 | +0.000 ± 0.000 | +0.000 ± 0.000 | +0.000 ± 0.000 |" in out
    # of the same seed 1, 0 and 2 apart
    assert "| 10 | +2.000 ± 2.484 | +1.000 ± 2.484 | +1.000 ± 2.484 |" in out
    assert "No difference between objective.advantage=ordinal and objective.advantage=grpo can be told" in out
    assert out.endswith("runs/compare/ordinal-vs-grpo/index.html\n")
    assert "compare ordinal.yaml grpo.yaml --seeds 1 2 3" in Path("runs/compare/ordinal-vs-grpo", PAGE).read_text()


def test_what_cannot_be_compared_is_refused(compare: Any, commands: list[list[str]]) -> None:
    Path("same.yaml").write_text("# a comment\nmodel: {'advantage': grpo}")
    Path("full").mkdir()
    Path("full/of.txt").touch()
    for other, message in (("grpo.yaml", "is compared with itself"), ("same.yaml", "say the same, defaults filled in")):
        with pytest.raises(ValueError, match=message):
            compare.main(["grpo.yaml", other])
    with pytest.raises(ValueError, match="full holds something else"):
        compare.main(["ordinal.yaml", "grpo.yaml", "--seeds", "7", "--output", "full"])
    assert not commands


@pytest.fixture
def commands(compare: Any, monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """What would have been trained."""
    called: list[list[str]] = []
    monkeypatch.setattr(compare.subprocess, "run", lambda command, check: called.append(command))
    return called


def test_missing_runs_are_trained_with_their_seed(compare: Any, commands: list[list[str]]) -> None:
    run = compare.train("ordinal.yaml", 4, ["--trainer.max_steps=5"])
    place = {"save_dir": "runs", "name": "compare", "version": run.name}
    assert commands[0][2:] == [
        *("gopo_lightning", "fit", "--config", "ordinal.yaml"),
        "--seed_everything=4",
        f"--trainer.logger={json.dumps({'class_path': 'TensorBoardLogger', 'init_args': place})}",
        "--ckpt_path=last",
        "--trainer.max_steps=5",
    ]
    assert re.fullmatch(r"runs/compare/ordinal-[0-9a-f]{8}-seed4", str(run))


def test_a_finished_run_is_read_and_said_to_be(
    compare: Any, commands: list[list[str]], capsys: pytest.CaptureFixture[str]
) -> None:
    Path("ordinal.yaml").write_text("# a comment\nmodel:\n  advantage: ordinal\n")
    run = compare.train("ordinal.yaml", 3, [])
    assert not commands and f"read, not trained: {run}, finished 20" in capsys.readouterr().out
    compare.train("ordinal.yaml", 4, [])
    compare.train("ordinal.yaml", 4, [])
    assert len(commands) == 1


def test_a_config_that_is_edited_meanwhile_is_not_trained_as_the_old_one(
    compare: Any, commands: list[list[str]]
) -> None:
    compare.train("ordinal.yaml", 4, [])
    Path("ordinal.yaml").write_text("model: {advantage: another}")
    with pytest.raises(ValueError, match="ordinal.yaml has changed since this comparison began"):
        compare.train("ordinal.yaml", 5, [])
    assert len(commands) == 1


def test_an_interrupted_run_goes_on(compare: Any, commands: list[list[str]]) -> None:
    run = compare.folder_of("ordinal.yaml", 1, [])
    (run / "compare.json").unlink()
    assert compare.train("ordinal.yaml", 1, []) == run
    assert "--ckpt_path=last" in commands[0]


@pytest.mark.parametrize("changed", ["config", "flags", "code", "library", "folder"])
def test_nothing_stale_is_read(
    changed: str, compare: Any, commands: list[list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, flags = "ordinal.yaml", ["--trainer.max_epochs=5"]
    compare.train(config, 1, flags)
    compare.resolved.cache_clear()  # as in the next process
    if changed == "config":
        Path(config).write_text("model: {advantage: ordinal, seed: 1}")
    elif changed == "flags":
        flags = [*flags, "--trainer.max_steps=5"]
    elif changed == "library":
        monkeypatch.setattr(compare, "version", lambda name: "another")
    elif changed == "code":
        (tmp_path / "package").mkdir()
        (tmp_path / "package" / "__init__.py").write_text("another line")
        monkeypatch.setattr(compare.gopo_lightning, "__file__", str(tmp_path / "package" / "__init__.py"))
    else:
        Path("b").mkdir()
        (Path("b") / "ordinal.yaml").write_text("model: {advantage: rloo}")
        config = "b/ordinal.yaml"
    compare.train(config, 1, flags)
    assert len(commands) == 2


def test_files_called_alike_are_told_apart(compare: Any) -> None:
    for name in ("a/gopo", "a/grpo", "a/tldr", "b/gopo", "b/grpo", "gopo"):
        Path(f"{name}.yaml").parent.mkdir(exist_ok=True)
        Path(f"{name}.yaml").touch()
    assert compare.labels(["a/gopo.yaml", "a/grpo.yaml"]) == ["gopo", "grpo"]
    assert compare.labels(["a/gopo.yaml", "b/gopo.yaml"]) == ["a/gopo.yaml", "b/gopo.yaml"]
    assert compare.labels(["a/tldr.yaml", "a/tldr.yaml+b/grpo.yaml"]) == ["tldr", "tldr+grpo"]
    for other in ("./gopo.yaml", "../" + Path.cwd().name + "/gopo.yaml"):
        with pytest.raises(ValueError, match="compared with itself"):
            compare.labels(["gopo.yaml", other])


def test_layers_are_given_one_after_the_other(compare: Any, commands: list[list[str]]) -> None:
    Path("overlay.yaml").write_text("trainer: {max_steps: 5}")
    run = compare.train("ordinal.yaml+overlay.yaml", 1, [])
    assert commands[0][3:9] == ["fit", "--config", "ordinal.yaml", "--config", "overlay.yaml", "--seed_everything=1"]
    assert re.fullmatch(r"ordinal\+overlay-[0-9a-f]{8}-seed1", run.name)
    Path("overlay.yaml").write_text("trainer: {max_steps: 6}")
    compare.resolved.cache_clear()
    assert compare.folder_of("ordinal.yaml+overlay.yaml", 1, []) != run


@pytest.fixture
def in_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """What would start a process runs here, which is as real and needs no imports."""

    def start(command: list[str], **options: Any) -> subprocess.CompletedProcess[str]:
        printed = io.StringIO()
        with redirect_stdout(printed), suppress(SystemExit):  # after --print_config
            run(command[3:])
        return subprocess.CompletedProcess(command, 0, printed.getvalue(), "")

    monkeypatch.setattr(command.subprocess, "run", start)


def write_tiny_config(path: Path, policy: Path, prompts: Path, **trainer: Any) -> None:
    """Two steps, validated at each."""
    reward = {
        "class_path": "gopo_lightning.rewards.FunctionReward",
        "init_args": {"function": "tests.runs.count_vowels"},
    }
    values = {
        "trainer": {
            "accelerator": "cpu",
            "val_check_interval": 1,
            "enable_progress_bar": False,
            "logger": {"class_path": "TensorBoardLogger", "init_args": {"save_dir": "runs"}},
            "callbacks": [{"class_path": "gopo_lightning.callbacks.SampleTable", "init_args": {"every_n_steps": 1}}],
            **trainer,
        },
        "model": {
            "class_path": "gopo_lightning.GOPOModule",
            "init_args": {
                "policy": {"name": str(policy)},
                "rollout": {"sampling": {"max_new_tokens": 8}, "num_completions": 4, "eval_num_completions": 2},
                "rewards": {"sources": [reward]},
            },
        },
        "data": {
            "class_path": "gopo_lightning.PromptDataModule",
            "init_args": {
                "prompts_per_step": 4,
                "train": {"path": str(prompts)},
                "validation": {"path": str(prompts), "limit": 4},
            },
        },
    }
    path.write_text(f"# {len(trainer)} options\n{yaml.safe_dump(values)}")


@pytest.mark.slow
@pytest.mark.usefixtures("in_this_process")
def test_two_configs_end_to_end(
    tiny_policy: Path,
    prompts_file: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Really trained, on two seeds; the second time only read, though the same is said otherwise."""
    monkeypatch.chdir(tmp_path)
    write_tiny_config(Path("a.yaml"), tiny_policy, prompts_file)
    Path("grpo.yaml").write_text("model: {init_args: {objective: {advantage: grpo}}}")
    arguments = ["a.yaml", "a.yaml+grpo.yaml", "--seeds", "1", "2", "--"]
    command.main([*arguments, "--trainer.max_steps=2"])
    out = capsys.readouterr().out
    assert "read, not trained" not in out and out.count("| val/reward, step | a | a+grpo | difference") == 1
    page = Path("runs/compare/a-vs-a+grpo/index.html").read_text()
    assert "objective.advantage=ordinal" in page and "objective.advantage=grpo" in page
    assert "say ab" in page and page.count("<figure") > 10
    command.resolved.cache_clear()
    write_tiny_config(Path("a.yaml"), tiny_policy, prompts_file, max_steps=2)
    command.main([*arguments, "--trainer.min_epochs", "null"])
    assert capsys.readouterr().out.count("read, not trained: runs/compare/") == 4
    report.main(["runs/compare", "--tags", "reward/mean", "--baseline", "ordinal", "--output", "out"])
    out = capsys.readouterr().out
    assert "objective.advantage=grpo − " in out or "objective.advantage=grpo and objective.advantage=ordinal" in out
    assert "at step 2" in out and "seeds 1, 2" in out


@pytest.mark.slow
def test_a_file_that_is_no_config_is_refused_before_training(tmp_path: Path) -> None:
    (tmp_path / "bad.yaml").write_text("model: {class_path: no.such.Class}")
    with pytest.raises(ValueError, match=r"bad.yaml is no config that fit can run: (.|\n)*no.such.Class"):
        command.resolved(str(tmp_path / "bad.yaml"), ())

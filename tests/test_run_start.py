"""What a run says by itself: where it writes, how large it is, how long it takes, and each validation's result."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint, RichProgressBar, TQDMProgressBar

from gopo_lightning.commands.lightning_cli import run
from gopo_lightning.rollout import SamplingConfig
from gopo_lightning.training.callbacks import SampleTable, Throughput, run_start
from gopo_lightning.training.callbacks.progress import PlainLines, ProgressBar
from gopo_lightning.training.callbacks.run_start import RunStart, describe_parameters, describe_step, duration
from gopo_lightning.training.callbacks.standard import with_progress_bar
from gopo_lightning.training.config import RolloutConfig
from tests.runs import make_data, make_module, make_trainer


def fit(folder: Path, policy: Path, prompts_file: Path, **options: Any) -> Trainer:
    """Four steps, a validation after every second."""
    trainer = make_trainer(folder, **{"max_steps": 4, "default_root_dir": folder, **options})
    trainer.fit(make_module(policy), make_data(prompts_file))
    return trainer


def test_the_lines_of_a_run(
    tiny_policy: Path, prompts_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fit(tmp_path / "my runs", tiny_policy, prompts_file)
    lines = capsys.readouterr().out.splitlines()
    folder = tmp_path / "my runs" / "run"
    assert lines[:4] == [
        f"Run folder: {folder}/version_0",
        f"Curves and samples: tensorboard --logdir '{folder}'",
        "Each step: 4 prompts × 4 completions of at most 24 tokens, 384 in all",
        "Trainable parameters: 35,168 (all)",
    ]
    results = r"validation  reward \S+  win rate 0\.\d+  \d+\.\d tokens  truncated \d+%"
    estimate = r"About \S+ s left: 2 steps of \S+ s, 2 validations of \S+ s\. Peak memory so far: \d\.\d\d GiB .*"
    expected = [f"step 0/4  {results}", estimate, f"step 2/4  {results}", f"step 4/4  {results}"]
    assert len(lines) == 8
    for line, pattern in zip(lines[4:], expected, strict=True):
        assert re.fullmatch(pattern, line), line


@pytest.mark.parametrize("bar", [TQDMProgressBar, RichProgressBar, PlainLines])
def test_validations_stay_visible_under_each_bar(
    bar: type, tiny_policy: Path, prompts_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fit(tmp_path, tiny_policy, prompts_file, max_steps=2, callbacks=[bar()], enable_progress_bar=True, logger=False)
    shown = capsys.readouterr().out
    for step in (0, 2):
        assert len(re.findall(rf"step {step}/2  validation  reward .* truncated \d+%\n", shown)) == 1


def test_the_estimate_is_of_the_second_batch_and_the_last_validation(monkeypatch: pytest.MonkeyPatch) -> None:
    class Run:
        """After two rollouts of two updates each, of ten."""

        global_step, max_steps, max_epochs = 4, 20, None
        val_check_batch, check_val_every_n_epoch, enable_validation = 4, None, True

    monkeypatch.setattr(run_start, "batches_begun", lambda _: 2)
    start = RunStart()
    say = lambda: start._describe_rest(Run(), 2, 60.0)  # type: ignore[arg-type]  # noqa: E731
    assert say() == "About 8 min left: 16 steps of 30 s, 2 validations not counted. "
    Run.val_check_batch = 2  # that of this rollout is still to come
    assert say() == "About 8 min left: 16 steps of 30 s, 5 validations not counted. "
    Run.val_check_batch, start._validation_seconds = 4, 240.0
    assert say() == "About 16 min left: 16 steps of 30 s, 2 validations of 4 min. "
    Run.global_step = 20
    assert say() == ""
    Run.max_steps = -1
    assert say() == ""


def test_durations_have_two_units_at_most() -> None:
    shown = [duration(seconds) for seconds in (0.04, 9.94, 99, 100, 3570, 3600, 86_300, 90_000)]
    assert shown == ["0.0 s", "9.9 s", "99 s", "2 min", "1 h 0 min", "1 h 0 min", "1 d 0 h", "1 d 1 h"]


def test_how_large_a_step_is() -> None:
    rollout = RolloutConfig(SamplingConfig(max_new_tokens=2048), num_completions=8)
    expected = "Each rollout, for 4 steps: 128 prompts × 8 completions of at most 2,048 tokens, 2,097,152 in all"
    assert describe_step(rollout, 128, 4) == expected
    assert describe_step(rollout, None, 1) == "Each step: 8 completions a prompt, of at most 2,048 tokens"


def test_frozen_parameters_are_told_apart() -> None:
    module: Any = torch.nn.Sequential(torch.nn.Linear(9, 10, bias=False), torch.nn.Linear(10, 1, bias=False))
    module[0].requires_grad_(False)
    assert describe_parameters(module) == "Trainable parameters: 10 (10.00% of 100)"


# ------------------------------------------------------------------ defaults


def kinds(callbacks: list[Callback]) -> list[type]:
    return [type(callback) for callback in callbacks]


def test_a_bar_is_there_unless_another_one_is_listed_or_none_is_wanted() -> None:
    keeper, listed = ModelCheckpoint(), TQDMProgressBar()
    assert kinds(with_progress_bar(None)) == [PlainLines]
    assert kinds(with_progress_bar(keeper)) == [ModelCheckpoint, PlainLines]
    assert with_progress_bar([listed, keeper]) == [listed, keeper]

    def bar(*flags: str) -> Any:
        config = ["--config=configs/quickstart/gopo.yaml", "--trainer.logger=false", *flags]
        return run(config, instantiate_only=True).trainer.progress_bar_callback

    assert isinstance(bar(), ProgressBar)
    assert type(bar("--trainer.callbacks=TQDMProgressBar")) is TQDMProgressBar
    assert bar("--trainer.enable_progress_bar=false") is None


@pytest.mark.parametrize(
    "listed",
    [[], [SampleTable(every_n_steps=7), Throughput()], [SampleTable(enabled=False), Throughput(enabled=False)]],
)
def test_tables_and_memory_are_on_once_unless_switched_off(
    listed: list[Callback], tiny_policy: Path, prompts_file: Path, tmp_path: Path, recwarn: pytest.WarningsRecorder
) -> None:
    trainer = fit(tmp_path, tiny_policy, prompts_file, max_steps=1, callbacks=list(listed))
    for kind in (SampleTable, Throughput):
        (one,) = [callback for callback in trainer.callbacks if isinstance(callback, kind)]  # type: ignore[attr-defined]
        assert one in listed or not listed
    switched_on = not (listed and not listed[0].enabled)  # type: ignore[attr-defined]
    assert ("system/peak_memory_gib" in trainer.callback_metrics) is switched_on
    (events,) = (tmp_path / "run" / "version_0").glob("events.*")
    assert (b"samples/group_0" in events.read_bytes()) is switched_on


def test_only_a_table_that_is_listed_warns_where_there_is_no_room_for_it(
    tiny_policy: Path, prompts_file: Path, tmp_path: Path, recwarn: pytest.WarningsRecorder
) -> None:
    for listed in ([], [SampleTable()]):
        fit(tmp_path, tiny_policy, prompts_file, max_steps=1, callbacks=listed, logger=False)
        assert any("SampleTable writes nothing" in str(warning.message) for warning in recwarn) is bool(listed)

"""Each run writes into a folder of its own, whatever the logger."""

from pathlib import Path
from typing import Any

import pytest
from lightning.pytorch import Trainer
from lightning.pytorch.loggers import CSVLogger, Logger, TensorBoardLogger

from gopo_lightning.commands.lightning_cli import run
from gopo_lightning.distributed.run_folder import run_folder
from tests.runs import make_trainer


class Server(Logger):
    """As W&B's: many runs share `save_dir`, and the server numbers them."""

    def __init__(self, save_dir: str, version: str | None = None) -> None:
        super().__init__()
        self._save_dir, self._version = save_dir, version

    @property
    def experiment(self) -> None:
        """Asks the server for an id, once."""
        if self._version is None:
            self._version = f"id{len(list(Path(self._save_dir).glob('project/*')))}"

    @property
    def name(self) -> str:
        """Of the project."""
        return "project"

    @property
    def version(self) -> str | None:
        """None before the run is known to the server."""
        return self._version

    @property
    def save_dir(self) -> str:
        """Where all runs write."""
        return self._save_dir

    def log_metrics(self, *_: Any, **__: Any) -> None:
        """Nowhere."""

    def log_hyperparams(self, *_: Any, **__: Any) -> None:
        """Nowhere."""


def test_the_folder_under_each_logger(tmp_path: Path) -> None:
    def folder(**options: Any) -> str:
        trainer = make_trainer(tmp_path, default_root_dir=tmp_path / "root", **options)
        assert run_folder(trainer) == run_folder(trainer)
        return run_folder(trainer).relative_to(tmp_path).as_posix()

    assert folder(logger=TensorBoardLogger(str(tmp_path), name="run")) == "run/version_0"
    assert folder(logger=TensorBoardLogger(str(tmp_path), name="run", version="a", sub_dir="b")) == "run/a/b"
    assert folder(logger=CSVLogger(str(tmp_path), name="run", version=3)) == "run/version_3"
    assert folder(logger=Server(str(tmp_path), "xyz")) == "project/xyz"
    assert [folder(logger=False) for _ in range(2)] == [f"root/without_logger/version_{k}" for k in range(2)]


@pytest.mark.parametrize("logger", ["server", "none"])
def test_runs_do_not_overwrite_each_other(
    logger: str, tiny_policy: Path, prompts_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "config.yaml").write_text(CONFIG.format(policy=tiny_policy, prompts=prompts_file))
    server = {"class_path": "tests.test_run_folder.Server", "init_args": {"save_dir": "."}}
    chosen = f"--trainer.logger={server}" if logger == "server" else "--trainer.logger=false"
    before = (tmp_path / "config.yaml").read_bytes()
    for _ in range(2):
        run(["fit", "--config", "config.yaml", chosen])
    folders = [Path("project/id0"), Path("project/id1")]
    if logger == "none":
        folders = [Path(f"without_logger/version_{k}") for k in range(2)]
    for folder in folders:
        assert {"config.yaml", "policy", "reference_completions.jsonl"} <= {path.name for path in folder.iterdir()}
    assert (tmp_path / "config.yaml").read_bytes() == before


def test_a_resumed_run_keeps_its_csv_metrics(tiny_policy: Path, prompts_file: Path, tmp_path: Path) -> None:
    """Lightning's CSVLogger deletes the `metrics.csv` of its folder when it begins."""
    config = tmp_path / "config.yaml"
    config.write_text(CONFIG.format(policy=tiny_policy, prompts=prompts_file))
    logger = {"class_path": "CSVLogger", "init_args": {"save_dir": str(tmp_path), "name": "run", "version": "a"}}
    for steps in (1, 2, 3):
        run(
            ["fit", "--config", str(config), f"--trainer.logger={logger}", f"--trainer.max_steps={steps}", *last(steps)]
        )
    names = ("metrics-1.csv", "metrics-2.csv", "metrics.csv")
    rewards = [(tmp_path / "run" / "a" / name).read_text() for name in names]
    assert all("reward/mean" in text for text in rewards)
    assert len(set(rewards)) == 3


def last(steps: int) -> list[str]:
    return [] if steps == 1 else ["--ckpt_path", "last"]


def test_a_trial_run_leaves_nothing(tmp_path: Path) -> None:
    for logger in (False, True):
        run_folder(Trainer(accelerator="cpu", logger=logger, fast_dev_run=True, default_root_dir=tmp_path))
    assert not list(tmp_path.iterdir())


CONFIG = """\
trainer: {{accelerator: cpu, max_steps: 1, val_check_interval: 1, enable_progress_bar: false}}
model:
  class_path: gopo_lightning.GOPOModule
  init_args:
    policy: {{name: {policy}}}
    rewards:
      sources:
        - class_path: gopo_lightning.rewards.FunctionReward
          init_args: {{function: tests.runs.count_vowels}}
    rollout: {{sampling: {{max_new_tokens: 4}}, num_completions: 2, eval_num_completions: 2}}
data:
  class_path: gopo_lightning.PromptDataModule
  init_args:
    train: {{path: {prompts}}}
    validation: {{path: {prompts}, limit: 4}}
    prompts_per_step: 2
"""

"""`validate` and `predict` of a checkpoint belong to its run: at its step, in its folder, and nothing there is lost."""

import json
from pathlib import Path

import pytest
import yaml
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from gopo_lightning.commands.evaluated_run import in_run_of
from gopo_lightning.commands.lightning_cli import run
from gopo_lightning.evaluation.duels.policies import by_step
from gopo_lightning.evaluation.event_files import read_run
from tests.event_runs import write_events
from tests.test_run_folder import CONFIG, Server


def test_an_evaluation_is_logged_at_its_step_into_its_run(
    tiny_policy: Path, prompts_file: Path, tmp_path: Path
) -> None:
    config = tmp_path / "config.yaml"
    config.write_text(CONFIG.format(policy=tiny_policy, prompts=prompts_file))
    options = {"save_dir": str(tmp_path), "name": "run"}
    logger = json.dumps({"class_path": "TensorBoardLogger", "init_args": options})
    shared = ["--config", str(config), f"--trainer.logger={logger}", f"--data.init_args.predict.path={prompts_file}"]
    run(["fit", *shared, "--trainer.max_steps=2", "--trainer.val_check_interval=2"])
    folder = tmp_path / "run" / "version_0"
    (checkpoint,) = folder.rglob("*.ckpt")
    trained, saved = read_run(folder), (folder / "config.yaml").read_bytes()
    run(["validate", *shared, f"--ckpt_path={checkpoint}", "--data.init_args.validation.limit=8"])
    run(["test", *shared, f"--ckpt_path={checkpoint}", f"--data.init_args.test.path={prompts_file}"])
    for _ in range(2):
        run(["predict", *shared, f"--ckpt_path={checkpoint}", "--data.init_args.predict.limit=2"])
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["version_0"]
    evaluated = read_run(folder)
    tables = EventAccumulator(str(folder), size_guidance={"tensors": 0}, purge_orphaned_data=False)
    tables.Reload()
    steps = [event.step for event in tables.Tensors("val/samples/group_0/text_summary")]
    assert sorted(steps) == [0, 2, 2]  # of fit, twice, and of validate
    assert list(evaluated.scalars["test/reward"]) == [2]
    assert {tag: curve for tag, curve in evaluated.scalars.items() if not tag.startswith("test/")} == trained.scalars
    assert (folder / "config.yaml").read_bytes() == saved
    assert (
        yaml.safe_load((folder / "config-validate.yaml").read_text())["data"]["init_args"]["validation"]["limit"] == 8
    )
    for name in ("step2", "step2-2"):
        assert len((folder / name / "predictions.jsonl").read_text().splitlines()) == 2
    (folder / "step2-2" / "predictions.jsonl").unlink()
    assert by_step(folder)[2].kind == "predictions"


def in_place(checkpoint: Path, logger: object, config: object) -> bool:
    """Whether ``logger`` stays."""
    (moved,) = in_run_of(checkpoint, [logger], config)  # type: ignore[list-item]
    return moved is logger


def test_which_loggers_follow_the_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write_events(tmp_path / "runs" / "x" / "a", {"reward/mean": {1: 0.5}})
    checkpoint = Path("runs/x/a/checkpoints/deep/er.ckpt")
    options = {"save_dir": "runs", "name": "x", "prefix": "p"}
    config = {"class_path": "TensorBoardLogger", "init_args": options}
    tensorboard, csv = TensorBoardLogger(**options), CSVLogger("runs", "x")
    followed, kept = in_run_of(
        checkpoint,
        [tensorboard, csv],
        [config, {"class_path": "CSVLogger", "init_args": {"save_dir": "runs", "name": "x"}}],
    )
    assert isinstance(followed, TensorBoardLogger)
    assert Path(followed.log_dir) == tmp_path / "runs" / "x" / "a" and followed._prefix == "p"
    assert kept is csv  # there are no curves of its kind
    (unnamed,) = in_run_of(checkpoint, [TensorBoardLogger(".")], None)
    assert Path(str(unnamed.log_dir)) == tmp_path / "runs" / "x" / "a"
    for given in ({"version": 3}, {"name": "y"}, {"save_dir": "elsewhere"}):
        assert in_place(checkpoint, TensorBoardLogger(**options | given), {"init_args": options | given}), given
    assert in_place(Path("runs/x/a/er.ckpt"), tensorboard, config)
    (tmp_path / "mine" / "config.yaml").parent.mkdir()
    (tmp_path / "mine" / "config.yaml").touch()  # a project of the user's, not a run
    assert in_place(Path("mine/checkpoints/er.ckpt"), tensorboard, config)
    assert in_place(checkpoint, Server("elsewhere"), {"class_path": "Server", "init_args": {}})

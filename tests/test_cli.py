"""The command line, as a user calls it: fit, validate, predict, on one process and on two."""

import json
import re
import subprocess
import sys
from pathlib import Path
from time import perf_counter
from typing import Any

import pytest
import torch
import yaml
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from gopo_lightning.commands.lightning_cli import run


def gopo(*args: str) -> str:
    """``python -m gopo_lightning`` in a process of its own, as DDP needs; what it printed."""
    command = [sys.executable, "-m", "gopo_lightning", *args]
    result = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


@pytest.fixture
def config(tmp_path: Path, tiny_policy: Path, prompts_file: Path) -> Path:
    """A config of two steps."""
    source = {"path": str(prompts_file)}
    values = {
        "trainer": {
            "accelerator": "cpu",
            "max_steps": 2,
            "val_check_interval": 2,
            "logger": {"class_path": "TensorBoardLogger", "init_args": {"save_dir": str(tmp_path), "name": "run"}},
            "callbacks": [
                {"class_path": "gopo_lightning.callbacks.SampleTable", "init_args": {"every_n_steps": 1}},
                {"class_path": "ModelCheckpoint", "init_args": {"monitor": "val/reward", "mode": "max"}},
            ],
        },
        "model": {
            "class_path": "gopo_lightning.GOPOModule",
            "init_args": {
                "policy": {"name": str(tiny_policy)},
                "rollout": {"sampling": {"max_new_tokens": 24}, "num_completions": 4, "eval_num_completions": 2},
                "rewards": {
                    "sources": [
                        {
                            "class_path": "gopo_lightning.rewards.FunctionReward",
                            "init_args": {"function": "tests.runs.some_invalid", "name": "vowels"},
                        }
                    ]
                },
                "update": {
                    "optimizer": {"class_path": "torch.optim.SGD", "init_args": {"lr": 0.003, "fused": False}},
                    "lr_schedule": "constant",
                    "warmup_steps": 0,
                },
            },
        },
        "data": {
            "class_path": "gopo_lightning.PromptDataModule",
            "init_args": {
                "prompts_per_step": 4,
                "train": source,
                "validation": {**source, "limit": 5},
                "predict": {**source, "limit": 5},
            },
        },
    }
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(values))
    return path


def test_help_answers_at_once() -> None:
    start = perf_counter()
    text = gopo("--help")
    assert perf_counter() - start < 1
    assert "fit" in text and "--model.help GOPOModule" in text


def test_help_of_a_command_names_the_commands_that_show_every_field(capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit):
        run(["fit", "--help"])
    assert "\n  gopo-lightning fit --data.help PromptDataModule  " in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["rollout.num_completions=1"], "num_completions=1: ranking needs at least 2 completions; use 8"),
        (["rollout.sampling.top_p=7"], "top_p is 7.0, but it must be in (0, 1]; 1 keeps every token."),
        (
            ["rollout.engine=gopo_lightning.rollout.TransformersEngine", "rollout.engine.max_rows=0"],
            "max_rows is 0, but it must be >= 1; leave it out for no limit.",
        ),
    ],
)
def test_what_a_class_says_of_its_arguments_is_the_last_word(options: list[str], message: str, config: Path) -> None:
    flags = [f"--model.init_args.{option}" for option in options]
    with pytest.raises(ValueError, match="must be|at least") as error:
        run(["--config", str(config), *flags], instantiate_only=True)
    assert str(error.value) == message
    assert error.value.__cause__ is None


def test_the_remedy_is_not_lost_behind_its_cause(config: Path) -> None:
    reward = {"class_path": "gopo_lightning.rewards.FunctionReward", "init_args": {"function": "no.such.thing"}}
    with pytest.raises(ValueError, match=r"^cannot load 'no.such.thing': No module named 'no'\. ") as error:
        run(
            ["--config", str(config), f"--model.init_args.rewards.sources={json.dumps([reward])}"],
            instantiate_only=True,
        )
    assert isinstance(error.value.__cause__, ImportError)


@pytest.mark.parametrize(("option", "name"), [("--model.help", "GOPOModule"), ("--data.help", "PromptDataModule")])
def test_every_field_is_documented(option: str, name: str, capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit):
        run(["fit", option, name])
    fields = re.split(r"\n  (?=--)", capsys.readouterr().out)[1:]
    assert len(fields) > 10
    for field in fields:
        description = " ".join(field.split("(type:")[0].split())
        assert re.search(r"[a-z]{2,} [a-z]", description.split("  ")[-1].partition(" ")[2]), field


def test_fit_then_validate_then_predict(config: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    run(["fit", "--config", str(config), "--export_every_n_steps=1"])
    output = capsys.readouterr().out
    assert "step 2/2" in output and "validation" in output
    folder = tmp_path / "run" / "version_0"
    assert (folder / "policy" / "model.safetensors").exists() and (folder / "policy-step-1").exists()
    (checkpoint,) = (folder / "checkpoints").glob("*.ckpt")
    run(["validate", "--config", str(config), "--ckpt_path", str(checkpoint)])
    run(["predict", "--config", str(config), "--ckpt_path", str(checkpoint)])
    one = read_predictions(folder / "step2")
    assert [row["index"] for row in one] == list(range(5))
    assert {len(row["completions"]) for row in one} == {2} and set(one[0]["rewards"]) == {"vowels"}
    assert {reason for row in one for reason in row["finish_reasons"]} <= {"stop", "length"}
    gopo("predict", "--config", str(config), "--ckpt_path", str(checkpoint), "--trainer.devices=2")
    assert read_predictions(folder / "step2-2") == one


def read_predictions(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "predictions.jsonl").read_text().split("\n") if line]


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_two_ranks_train_like_one(strategy: str, config: Path, tmp_path: Path) -> None:
    run(["fit", "--config", str(config)])
    gopo("fit", "--config", str(config), "--trainer.devices=2", f"--trainer.strategy={strategy}")
    saved = yaml.safe_load((tmp_path / "run" / "version_1" / "config.yaml").read_text())["trainer"]["strategy"]
    assert saved == "ddp" if strategy == "ddp" else saved["class_path"].endswith(".FSDP2Strategy")
    one, two = (torch.load(next((tmp_path / "run" / f"version_{i}").rglob("*.ckpt"))) for i in (0, 1))
    for key, value in one["state_dict"].items():
        torch.testing.assert_close(two["state_dict"][key], value, rtol=0, atol=1e-5)
    a, b = (events(tmp_path / "run" / f"version_{i}") for i in (0, 1))
    for tag in ("train/loss", "train/grad_norm", "reward/mean", "reward/nan_fraction", "val/reward", "val/win_rate"):
        assert [e.value for e in b.Scalars(tag)] == pytest.approx([e.value for e in a.Scalars(tag)], abs=1e-5), tag


def test_last_is_the_newest_whole_checkpoint_of_all_versions(
    config: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A resumed run writes to a new folder, and the next one finds it there; a torn file is passed over."""
    last = ["fit", "--config", str(config), "--ckpt_path", "last", "--trainer.val_check_interval=1"]
    last.append("--trainer.callbacks=ModelCheckpoint")  # after each validation, not the best alone
    run([*last, "--trainer.max_steps=1"])
    folder = f"{tmp_path}/run/version_*/checkpoints"
    assert f"there is no complete checkpoint of this run in {folder}, so it starts at step 0" in caplog.text
    run(last)
    assert f"--ckpt_path last: step 1 of this run, {tmp_path}/run/version_0/" in caplog.text
    newest = tmp_path / "run" / "version_1" / "checkpoints"
    assert torch.load(next(newest.glob("*.ckpt")))["global_step"] == 2
    (newest / "torn.ckpt").write_bytes(next(newest.glob("*.ckpt")).read_bytes()[:-100])
    run([*last, "--trainer.max_steps=3"])
    assert events(tmp_path / "run" / "version_2").Scalars("train/loss")[0].step == 3
    with pytest.raises(ValueError, match=r"no complete checkpoint of this run in .*other/version_\*.* Name a file"):
        run(["validate", "--config", str(config), "--ckpt_path=last", "--trainer.logger.init_args.name=other"])


def events(run: Path) -> EventAccumulator:
    accumulator = EventAccumulator(str(run))
    accumulator.Reload()
    return accumulator


def test_every_tag_is_defined_in_the_docs(config: Path, tmp_path: Path) -> None:
    options = ("kl_coef=0.1", "clip_ceiling=4", "sampler_correction_cap=2")
    loss = [f"--model.init_args.objective.loss.{option}" for option in options]
    transforms = [{"class_path": "gopo_lightning.rollout.KLInReward", "init_args": {"coef": 0.1}}]
    run(["fit", "--config", str(config), *loss, f"--model.init_args.rewards.transforms={json.dumps(transforms)}"])
    tags = events(tmp_path / "run" / "version_0").Tags()
    logged = {*tags["scalars"], *tags["histograms"], *(tag.removesuffix("/text_summary") for tag in tags["tensors"])}
    table = Path("docs/metrics.md").read_text()
    defined = {line.split("`")[1] for line in table.splitlines() if line.startswith("| `")}
    names = {tag.replace("/vowels/", "/<source>/") for tag in logged}
    names = {re.sub(r"samples/group_\d+\Z", "samples/group_<i>", tag) for tag in names}
    assert names <= defined, sorted(names - defined)
    reward_model = ("val/pair", "val/spearman", "val/kendall", "val/loss", "val/calibration_error", "val/length_bias")
    groups = ("train/pair_", "train/logprob")  # of objectives that compare completions: test_methods
    groups += ("transform/", "rollout/", "train/tied_policies")  # of transforms, refills and update rules
    elsewhere = ("epoch", "test/", "reward/rank_correlation/", "reward/rescued_groups", *reward_model, *groups)
    comparisons = {"tie_fraction", "cyclic_triad_fraction", "compared_fraction", "first_bias"}
    counters = {"abstained", "calls", "cached", "revisions", "asked_pairs"}
    pairwise = {f"reward/<source>/{name}" for name in comparisons | counters}
    missing = {tag for tag in defined if not tag.startswith(elsewhere)} - names - pairwise
    assert not missing, sorted(missing)


@pytest.mark.parametrize("given", ["</a>", '["</a>"]', '["</a>", "5"]'])
def test_a_stop_string_is_given_as_text_or_as_a_list(given: str) -> None:
    cli = run(
        ["--config=configs/quickstart/gopo.yaml", f"--model.init_args.rollout.sampling.stop_strings={given}"],
        instantiate_only=True,
    )
    assert cli.model.sampling.stop_strings == (("</a>", "5") if "5" in given else ("</a>",))


@pytest.mark.parametrize(
    ("option", "attributes"),
    [
        ("objective.loss.sampler_correction_cap=null", "loss.sampler_correction_cap"),
        ("objective.loss.clip_ceiling=None", "loss.clip_ceiling"),
        ("policy.lora=null", "policy_config.lora"),
        ("update.max_grad_norm=null", "update_config.max_grad_norm"),
    ],
)
def test_null_on_the_command_line_is_null_at_any_depth(option: str, attributes: str, tmp_path: Path) -> None:
    """Over a value that a configuration has set, as with an overlay."""
    overlay = tmp_path / "overlay.yaml"
    overlay.write_text(
        yaml.safe_dump(
            {
                "model": {
                    "init_args": {
                        "objective": {"loss": {"init_args": {"sampler_correction_cap": 2.0, "clip_ceiling": 4.0}}},
                        "policy": {"lora": {"r": 4}},
                        "update": {"max_grad_norm": 2.0},
                    }
                }
            }
        )
    )
    configs = ["--config=configs/quickstart/gopo.yaml", f"--config={overlay}"]

    def value(*options: str) -> Any:
        found: Any = run([*configs, *options], instantiate_only=True).model
        for attribute in attributes.split("."):
            found = getattr(found, attribute)
        return found

    assert value() is not None
    assert value(f"--model.init_args.{option}") is None


def test_what_a_run_saves_can_be_run_again(config: Path, tmp_path: Path) -> None:
    """Also where the config leaves the optimiser to its default."""
    values = yaml.safe_load(config.read_text())
    del values["model"]["init_args"]["update"]["optimizer"]
    config.write_text(yaml.safe_dump(values))
    run(["fit", "--config", str(config), "--trainer.max_steps=1", "--trainer.val_check_interval=1"])
    saved = tmp_path / "run" / "version_0" / "config.yaml"
    again = run(["fit", "--config", str(saved), "--trainer.max_steps=1"]).model
    optimizer = again.optimizer_callable(again.policy.parameters())
    assert type(optimizer) is torch.optim.AdamW and optimizer.defaults["lr"] == 1e-6

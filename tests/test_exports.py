"""Exports: of checkpoints by the command, of the best instead of the last, with a card, and to the hub."""

import json
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
import yaml
from huggingface_hub import ModelCard
from lightning.pytorch.callbacks import ModelCheckpoint
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from gopo_lightning.commands import export
from gopo_lightning.commands.lightning_cli import run
from gopo_lightning.training import hub
from gopo_lightning.training.callbacks import ExportHF
from gopo_lightning.training.callbacks.run_record import command_of
from gopo_lightning.training.export_folder import LISTING
from gopo_lightning.training.model_card import model_card
from tests.test_callbacks import Module, loader, trainer

STEPS = 3


def lengths(prompts: list[str], completions: list[str]) -> list[float]:
    """A reward that every group orders."""
    return [float(len(text)) for text in completions]


def write_config(folder: Path, policy: Path, prompts: Path, **policy_options: Any) -> Path:
    """A run of three steps, each with its validation and its checkpoint."""
    checkpoint = {"monitor": "val/length_mean", "mode": "max", "save_top_k": -1, "filename": "{step}"}
    reward = {"function": "tests.test_exports.lengths", "name": "length"}
    sources = [{"class_path": "gopo_lightning.rewards.FunctionReward", "init_args": reward}]
    values = {
        "trainer": {
            "accelerator": "cpu",
            "max_steps": STEPS,
            "val_check_interval": 1,
            "logger": {
                "class_path": "CSVLogger",
                "init_args": {"save_dir": str(folder), "name": "run", "version": "v"},
            },
            "callbacks": [{"class_path": "ModelCheckpoint", "init_args": checkpoint}],
            "enable_progress_bar": False,
            "enable_model_summary": False,
        },
        "model": {
            "class_path": "gopo_lightning.GOPOModule",
            "init_args": {
                "policy": {"name": str(policy), **policy_options},
                "rollout": {"sampling": {"max_new_tokens": 8}, "num_completions": 4, "eval_num_completions": 2},
                "rewards": {"sources": sources},
                "update": {
                    "optimizer": {"class_path": "torch.optim.SGD", "init_args": {"lr": 0.01}},
                    "lr_schedule": "constant",
                    "warmup_steps": 0,
                },
            },
        },
        "data": {
            "class_path": "gopo_lightning.PromptDataModule",
            "init_args": {
                "prompts_per_step": 4,
                "train": {"path": str(prompts)},
                "validation": {"path": str(prompts), "limit": 2},
            },
        },
    }
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(values))
    return path


@pytest.fixture(scope="module")
def full(tmp_path_factory: pytest.TempPathFactory, tiny_policy: Path, prompts_file: Path) -> Path:
    """The folder of a run with all weights."""
    folder = tmp_path_factory.mktemp("full")
    run(["fit", "--config", str(write_config(folder, tiny_policy, prompts_file))])
    return folder / "run" / "v"


@pytest.fixture(scope="module")
def lora(tmp_path_factory: pytest.TempPathFactory, tiny_policy: Path, prompts_file: Path) -> Path:
    """The folder of a run with LoRA."""
    folder = tmp_path_factory.mktemp("lora")
    config = write_config(folder, tiny_policy, prompts_file, lora={"r": 2, "target_modules": ["q_proj", "v_proj"]})
    run(["fit", "--config", str(config)])
    return folder / "run" / "v"


def checkpoint_of(run: Path, step: int) -> Path:
    return run / "checkpoints" / f"step={step}.ckpt"


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    return AutoModelForCausalLM.from_pretrained(folder).state_dict()


def equal(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(value, b[name]) for name, value in a.items())


# ------------------------------------------------------------------- the command


def test_the_last_checkpoint_exported_is_what_fit_exported(
    full: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    export.main([str(full), str(tmp_path / "out")])
    assert f"exported step {STEPS} of {checkpoint_of(full, STEPS)}" in capsys.readouterr().out
    assert equal(tensors(tmp_path / "out"), tensors(full / "policy"))
    assert (tmp_path / "out" / "README.md").read_text() == (full / "policy" / "README.md").read_text()
    export.main([str(checkpoint_of(full, 1)), str(tmp_path / "out")])  # an earlier export is replaced
    assert not equal(tensors(tmp_path / "out"), tensors(full / "policy"))


def test_an_adapter_stays_one_unless_it_is_to_be_merged(lora: Path, tmp_path: Path) -> None:
    export.main([str(lora), str(tmp_path / "adapter")])
    assert not (tmp_path / "adapter" / "model.safetensors").exists()
    loaded: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "adapter")
    assert equal(loaded.state_dict(), tensors(lora / "policy"))
    export.main([str(lora), str(tmp_path / "merged"), "--merge_adapter"])
    assert not (tmp_path / "merged" / "adapter_config.json").exists()
    merged, tokens = AutoModelForCausalLM.from_pretrained(tmp_path / "merged"), torch.arange(6)[None]
    assert not isinstance(merged, PeftModel)
    torch.testing.assert_close(merged(tokens).logits, loaded(tokens).logits)
    with loaded.disable_adapter() if isinstance(loaded, PeftModel) else _without(loaded):
        assert not torch.allclose(merged(tokens).logits, loaded(tokens).logits, atol=1e-5)
    assert ModelCard.load(tmp_path / "merged" / "README.md").data.library_name == "transformers"
    assert ModelCard.load(tmp_path / "adapter" / "README.md").data.library_name == "peft"


class _without:
    """``model``, of transformers with an adapter, without it."""

    def __init__(self, model: Any) -> None:
        self.model = model

    def __enter__(self) -> None:
        self.model.disable_adapters()

    def __exit__(self, *_: Any) -> None:
        self.model.enable_adapters()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--merge_adapter"], "holds whole weights, and no adapter"),
        (["--config", "nowhere.yaml"], "nowhere.yaml cannot be read as YAML"),
        (["--push_to_hub", "name"], "OWNER/NAME"),
    ],
)
def test_what_cannot_be_done_is_said(options: list[str], message: str, full: Path, tmp_path: Path) -> None:
    with pytest.raises((ValueError, OSError), match=message):
        export.main([str(full), str(tmp_path / "out"), *options])
    assert not (tmp_path / "out").exists()


def test_a_folder_with_something_else_is_refused(full: Path, tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").touch()
    with pytest.raises((ValueError, OSError), match="it holds thesis.txt"):
        export.main([str(full), str(tmp_path)])


def test_a_config_of_another_policy_is_refused(full: Path, lora: Path, tmp_path: Path) -> None:
    with pytest.raises((ValueError, OSError), match="the run was started with other settings: policy.lora"):
        export.main([str(full), str(tmp_path / "out"), "--config", str(lora / "config.yaml")])


def test_a_sharded_folder_names_the_command_that_joins_it(tmp_path: Path) -> None:
    (tmp_path / "x.ckpt").mkdir()
    (tmp_path / "x.ckpt" / ".metadata").touch()
    with pytest.raises((ValueError, OSError), match=r"consolidate_checkpoint .*x\.ckpt"):
        export.main([str(tmp_path / "x.ckpt"), str(tmp_path / "out")])


def test_a_checkpoint_without_its_config(tmp_path: Path, full: Path) -> None:
    lone = tmp_path / "lone.ckpt"
    lone.write_bytes(checkpoint_of(full, 1).read_bytes())
    with pytest.raises((ValueError, OSError), match="no config.yaml beside"):
        export.main([str(lone), str(tmp_path / "out")])
    export.main([str(lone), str(tmp_path / "out"), "--config", str(full / "config.yaml")])
    assert (tmp_path / "out" / "model.safetensors").exists()


# ---------------------------------------------------------------------- the card


def test_the_card_says_what_was_done_and_what_came_of_it(full: Path, prompts_file: Path) -> None:
    card = ModelCard.load(full / "policy" / "README.md")
    assert card.data.pipeline_tag == "text-generation" and "gopo" in card.data.tags
    assert card.data.license is None and card.data.base_model is None and card.data.datasets is None  # local ones
    text = card.text
    for expected in (
        f"| Data, train | `{prompts_file}` |",
        f"| Data, validation | `{prompts_file}`, the first 2 rows |",
        "| Rewards | `length` |",
        "| Advantage | `ordinal` |",
        "| Loss | `ClippedSurrogate` (",
        f"| Optimiser steps | {STEPS} |",
        f"| metric | step 0 | step {STEPS} | what it is |",
        "| `val/win_rate` | 0.5 | ",
        "gopo-lightning ",
        "## Licence",
    ):
        assert expected in text
    metrics = (full / "metrics.csv").read_text().splitlines()
    column = metrics[0].split(",").index("val/reward")
    last = [value for row in metrics[1:] if (value := row.split(",")[column])][-1]
    assert f"| {float(last):.4g} | mean combined reward" in text


def test_hub_names_are_in_the_front_matter_and_other_text_stays_in_its_cell() -> None:
    data = {"train": {"path": "trl-lib/tldr", "split": "train", "is_hub": True}}
    record = {"kind": "policy", "base_model": ["org/base", "v|1"], "data": data, "command": "python -m x `y` | z"}
    card = ModelCard(model_card(record, step=5, is_adapter=False, chosen="the best by val/reward of 1, max"))
    assert card.data.base_model == "org/base" and card.data.datasets == ["trl-lib/tldr"]
    assert "| Base model | `org/base`, revision `v\\|1` |" in card.text
    assert "| Trained by | ``python -m x `y` \\| z`` |" in card.text
    assert "| Optimiser steps | 5 (the best by val/reward of 1, max) |" in card.text
    assert "No validation ran." in card.text


def test_a_checkpoint_from_before_there_were_records_has_a_card() -> None:
    assert ModelCard(model_card({}, step=7, is_adapter=True)).data.library_name == "peft"


def test_only_our_own_commands_are_told() -> None:
    assert (
        command_of(["/bin/gopo-lightning", "fit", "--config", "a.yaml"])
        == "python -m gopo_lightning fit --config a.yaml"
    )
    assert command_of(["/home/me/secret_project/train.py", "fit"]) is None


# ---------------------------------------------------------------------- the best


class Worsens(Module):
    """Its validation reward falls with every step."""

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val/reward", -float(self.trainer.global_step), batch_size=1)


def fit_worsening(tmp_path: Path, export: ExportHF, monitor: str | None = "val/reward") -> Module:
    module = Worsens()
    save = ModelCheckpoint(tmp_path / "checkpoints", monitor=monitor, mode="max", save_top_k=1)
    options = {"enable_checkpointing": True, "val_check_interval": 1, "check_val_every_n_epoch": None}
    trainer(tmp_path, [save, export], max_steps=3, **options).fit(module, loader(), loader(1))
    return module


def test_the_best_weights_are_exported_and_the_policy_stays_as_it_is(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    module = fit_worsening(tmp_path, ExportHF(str(tmp_path / "policy"), every_n_steps=1, weights="best"))
    assert equal(tensors(tmp_path / "policy"), tensors(tmp_path / "policy-step-1"))
    assert equal(module.policy.state_dict(), tensors(tmp_path / "policy-step-3"))
    assert not equal(tensors(tmp_path / "policy"), module.policy.state_dict())
    assert "| Optimiser steps | 1 (the best by val/reward of -1, max) |" in (tmp_path / "policy/README.md").read_text()


def test_the_best_needs_a_metric(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no ModelCheckpoint monitors a metric"):
        fit_worsening(tmp_path, ExportHF(str(tmp_path / "policy"), weights="best"), monitor=None)
    assert not (tmp_path / "policy").exists()


def test_where_the_best_is_gone_the_last_is_exported(tmp_path: Path) -> None:
    class Lose(L.Callback):
        def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
            for path in (tmp_path / "checkpoints").iterdir():
                path.unlink()

    module, export = Worsens(), ExportHF(str(tmp_path / "policy"), weights="best")
    save = ModelCheckpoint(tmp_path / "checkpoints", monitor="val/reward", mode="max")
    options = {"enable_checkpointing": True, "val_check_interval": 1, "check_val_every_n_epoch": None}
    with pytest.warns(UserWarning, match="The last weights are exported, not the best: there is no checkpoint at"):
        trainer(tmp_path, [save, Lose(), export], max_steps=2, **options).fit(module, loader(), loader(1))
    assert equal(module.policy.state_dict(), tensors(tmp_path / "policy"))


@pytest.mark.parametrize("adapter", [False, True])
def test_the_best_of_a_sharded_run(adapter: bool, tmp_path: Path, tiny_policy: Path, prompts_file: Path) -> None:
    """The best by length is that of the longest completions; its checkpoint, exported, is the same."""
    from tests.test_cli import gopo

    options = {"lora": {"r": 2, "target_modules": ["q_proj"]}} if adapter else {}
    config = write_config(tmp_path, tiny_policy, prompts_file, **options)
    strategy = ["--trainer.strategy=fsdp2", "--trainer.devices=2"]
    gopo("fit", "--config", str(config), *strategy, "--export_weights=best")
    folder = tmp_path / "run" / "v"
    text = (folder / "policy" / "README.md").read_text()
    step = int(text.partition("| Optimiser steps | ")[2].partition(" (the best by val/length_mean")[0])
    export.main([str(checkpoint_of(folder, step)), str(tmp_path / "out")])
    assert equal(tensors(tmp_path / "out"), tensors(folder / "policy"))


# ----------------------------------------------------------------------- the hub


@pytest.fixture
def api(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, dict[str, Any]]]:
    """What is asked of a hub that takes all, with a token and a network."""
    calls: list[tuple[str, dict[str, Any]]] = []

    class Api:
        def create_repo(self, repo_id: str, **options: Any) -> str:
            calls.append(("create_repo", {"repo_id": repo_id, **options}))
            return f"https://hub/{repo_id}"

        def upload_folder(self, **options: Any) -> None:
            names = {path.name for path in Path(options["folder_path"]).iterdir()}
            calls.append(("upload_folder", {**options, "names": names}))

    monkeypatch.setattr(hub, "HfApi", Api)
    monkeypatch.setattr(hub, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(hub, "get_token", lambda: "a token")
    return calls


def test_an_export_is_pushed_to_a_private_model(api: list, tmp_path: Path) -> None:
    trainer(tmp_path, [ExportHF(str(tmp_path / "policy"), 1, push_to_hub="me/mine")], 2).fit(Module(), loader())
    (made, made_with), (uploaded, with_what) = api  # that at the end alone
    assert (made, made_with) == ("create_repo", {"repo_id": "me/mine", "private": True, "exist_ok": True})
    assert uploaded == "upload_folder" and with_what["repo_id"] == "me/mine"
    assert with_what["ignore_patterns"] == [LISTING]
    assert {"model.safetensors", "README.md", "tokenizer.json"} <= with_what["names"]


def test_a_failed_push_loses_nothing_and_says_how_to_push_again(
    api: list, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def refuse(self: Any, **options: Any) -> None:
        raise ConnectionError("no route")

    monkeypatch.setattr(hub.HfApi, "upload_folder", refuse)
    said = rf"ConnectionError: no route.*hf upload me/mine {tmp_path}/policy \. --private --exclude {LISTING}"
    with pytest.warns(UserWarning, match=said):
        trainer(tmp_path, [ExportHF(str(tmp_path / "policy"), push_to_hub="me/mine")], 1).fit(Module(), loader())
    assert (tmp_path / "policy" / "model.safetensors").exists()


def test_the_command_pushes_too(api: list, full: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    export.main([str(full), str(tmp_path / "out"), "--push_to_hub=me/mine", "--push_private=false"])
    assert "pushed to https://hub/me/mine" in capsys.readouterr().out
    assert api[0][1]["private"] is False


def test_what_cannot_be_pushed_is_refused_before_training(api: list, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, message in (("mine", "has to be OWNER/NAME"), ("me/..", "is no name of a model")):
        with pytest.raises(ValueError, match=message):
            ExportHF(push_to_hub=name)
    monkeypatch.setattr(hub, "get_token", lambda: None)
    with pytest.raises(ValueError, match="needs a token"):
        ExportHF(push_to_hub="me/mine")
    monkeypatch.setattr(hub, "HF_HUB_OFFLINE", True)
    with pytest.raises(ValueError, match="HF_HUB_OFFLINE is set"):
        ExportHF(push_to_hub="me/mine")


# --------------------------------------------------------------- reward models


def test_a_reward_model_is_exported_from_its_checkpoint_and_by_its_best(tmp_path: Path) -> None:
    from tests.test_rewards import save_bert

    rows = [{"prompt": "p", "chosen": "good film", "rejected": "bad film"}] * 12
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    checkpoint = {"monitor": "val/loss", "mode": "max", "save_top_k": -1, "filename": "{step}"}
    values = {
        "trainer": {
            "accelerator": "cpu",
            "max_steps": 3,
            "val_check_interval": 1,
            "logger": {"class_path": "CSVLogger", "init_args": {"save_dir": str(tmp_path), "name": "", "version": "v"}},
            "callbacks": [
                {"class_path": "ModelCheckpoint", "init_args": checkpoint},
                {"class_path": "gopo_lightning.callbacks.PairTable"},
            ],
            "enable_progress_bar": False,
            "enable_model_summary": False,
        },
        "model": {
            "class_path": "gopo_lightning.RewardModelModule",
            "init_args": {
                "model": str(save_bert(tmp_path / "base")),
                "export_dir": str(tmp_path / "export"),
                "export_weights": "best",
                "warmup_steps": 0,
                "optimizer": {"class_path": "torch.optim.SGD", "init_args": {"lr": 0.1}},
            },
        },
        "data": {
            "class_path": "gopo_lightning.PreferenceDataModule",
            "init_args": {"source": str(tmp_path / "pairs.jsonl"), "batch_size": 4},
        },
    }
    config = tmp_path / "config.yaml"
    config.write_text(yaml.safe_dump(values))
    run(["fit", "--config", str(config)])
    text = (tmp_path / "export" / "README.md").read_text()
    assert ModelCard(text).data.pipeline_tag == "text-classification" and "| Loss | `bradley_terry` |" in text
    assert "good film" in (tmp_path / "v" / "val" / "pairs.csv").read_text()
    step = int(text.partition("| Optimiser steps | ")[2].partition(" (the best by val/loss")[0])
    assert step == 1  # the largest loss of a run that learns
    export.main([str(tmp_path / "v" / "checkpoints" / f"step={step}.ckpt"), str(tmp_path / "out")])
    best, again = (
        AutoModelForSequenceClassification.from_pretrained(tmp_path / name).state_dict() for name in ("export", "out")
    )
    assert equal(best, again)
    with pytest.raises(ValueError, match="--export_dir belongs to a GOPOModule"):
        run(["fit", "--config", str(config), f"--export_dir={tmp_path}/x"])

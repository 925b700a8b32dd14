"""Secrets stay in the environment, files stay in the run's folder, and nothing that is loaded runs code."""

import importlib
import inspect
import io
import json
import os
import traceback
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from lightning.pytorch import LightningModule
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from rich.console import Console
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from gopo_lightning import GOPOModule, rewards, rollout
from gopo_lightning.commands.lightning_cli import run
from gopo_lightning.commands.secrets import refuse_secrets
from gopo_lightning.data import PromptDataModule
from gopo_lightning.data.preferences import PreferenceDataModule
from gopo_lightning.data.sources import PromptSource
from gopo_lightning.objectives import ClippedSurrogate
from gopo_lightning.policy.model import PolicyConfig, load_policy, load_reference, load_tokenizer
from gopo_lightning.rewards import LLMJudge, LocalJudge, SequenceClassifierReward, SourceConfigError, score_groups
from gopo_lightning.training import callbacks
from gopo_lightning.training.checks import check_stays_inside
from gopo_lightning.training.config import ObjectiveConfig, RewardConfig, RolloutConfig, UpdateConfig
from gopo_lightning.training.reward_model import RewardModelModule
from tests.conftest import byte_tokenizer
from tests.runs import make_data, make_module, make_trainer
from tests.test_judge import Server, server  # noqa: F401 - the fixture
from tests.test_rewards import prompt

KEY = "sk-0123456789abcdefFAKE"
SECRET_NAMES = [
    *(
        "api-key",
        "x-api-key",
        "X-API-Key",
        "apiKey",
        "apikey",
        "key",
        "private_key",
        "privateKey",
        "secret",
        "clientSecret",
    ),
    *(
        "aws_secret_access_key",
        "secretAccessKey",
        "credentials",
        "pw",
        "passwd",
        "db_password",
        "passphrase",
        "hf_token",
    ),
    *("accessToken", "refresh_token", "Authorization"),
]


class RunsCode:
    """Pickled, it makes a file when it is loaded."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.marker),)


@pytest.fixture
def values(tmp_path: Path, tiny_policy: Path, prompts_file: Path) -> dict[str, Any]:
    """A config of one step."""
    source = {"path": str(prompts_file), "limit": 4}
    reward = {
        "class_path": "gopo_lightning.rewards.FunctionReward",
        "init_args": {"function": "tests.runs.count_vowels"},
    }
    return {
        "trainer": {
            "accelerator": "cpu",
            "max_steps": 1,
            "val_check_interval": 1,
            "logger": {"class_path": "TensorBoardLogger", "init_args": {"save_dir": str(tmp_path), "name": "run"}},
            "callbacks": [{"class_path": "gopo_lightning.callbacks.SampleTable"}],
        },
        "model": {
            "class_path": "gopo_lightning.GOPOModule",
            "init_args": {
                "policy": {"name": str(tiny_policy)},
                "rewards": {"sources": [reward]},
                "rollout": {"sampling": {"max_new_tokens": 4}, "num_completions": 2, "eval_num_completions": 1},
            },
        },
        "data": {
            "class_path": "gopo_lightning.PromptDataModule",
            "init_args": {
                "prompts_per_step": 2,
                "train": source,
                **dict.fromkeys(("validation", "test", "predict"), source),
            },
        },
    }


def gopo(values: dict[str, Any], command: str, folder: Path, *options: str) -> None:
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(values))
    run([command, "--config", str(path), *options])


# -------------------------------------------------------------------------------------------------------------- secrets


def test_a_key_from_the_environment_is_written_nowhere(
    values: dict[str, Any],
    server: Server,  # noqa: F811
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture,
) -> None:
    """Neither to the saved config nor to checkpoints, TensorBoard, the verdict cache or the console."""
    monkeypatch.setenv("JUDGE_KEY", KEY)
    server.key = KEY
    judge = {"model": "m", "base_url": server.url, "api_key_env": "JUDGE_KEY", "cache_dir": str(tmp_path / "cache")}
    values["model"]["init_args"]["rewards"]["sources"] = [
        {"class_path": "gopo_lightning.rewards.LLMJudge", "init_args": judge},
    ]
    gopo(values, "fit", tmp_path, "--export_every_n_steps=1")
    assert server.questions
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    kinds = {path.name.split(".")[0] if "events" in path.name else path.suffix for path in files}
    assert {"events", ".ckpt", ".yaml", ".jsonl", ".safetensors"} <= kinds
    assert "JUDGE_KEY" in (tmp_path / "run" / "version_0" / "config.yaml").read_text()
    assert not [path for path in files if KEY.encode() in path.read_bytes()]
    checkpoint = torch.load(next(tmp_path.rglob("*.ckpt")), weights_only=True)
    assert "hyper_parameters" not in checkpoint
    assert KEY not in "".join(capfd.readouterr())


def test_a_server_that_repeats_the_key_does_not_put_it_into_errors(
    server: Server,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("JUDGE_KEY", KEY)
    judge = LLMJudge("m", base_url=server.url, api_key_env="JUDGE_KEY", cache_dir=None, max_retries=0)
    errors = []
    server.key = "another"
    with pytest.raises(SourceConfigError, match="refuses model m with the key in JUDGE_KEY") as error:
        judge.setup(torch.device("cpu"))
    errors.append(error.value)
    server.key = KEY
    judge.setup(torch.device("cpu"))
    for fault, kind in ((401, SourceConfigError), (400, RuntimeError)):
        server.faults = [fault]
        with pytest.raises(kind) as error:
            score_groups([judge], [prompt("say")], [["a", "bb"]])
        errors.append(error.value)
    for said in ("".join(traceback.format_exception(error)) for error in errors):
        assert KEY not in said and "<the key>" in said


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("model.init_args.rewards.sources.0.init_args.extra_body.api_key", "x"),
        ("model.init_args.rewards.sources.0.init_args.api_key_env", KEY),
        ("trainer.logger.init_args.password", "x"),
        ("trainer.logger.init_args.access_token", "x"),
        ("trainer.logger.init_args.token", "x"),
        ("data.init_args.url", "https://me:hunter22@example.org/data"),
        ("data.init_args.note", "the value of a variable: correct-horse"),
        ("data.init_args.note", "hf_" + "a" * 30),
        ("data.init_args.headers", "Bearer abcdefgh"),
        *((f"data.init_args.headers.{name}", "x") for name in SECRET_NAMES),
        ("data.init_args.api_keys.0.api_key", "x"),
        ("trainer.logger.init_args.password", 12345678),
        ("data.init_args.path", "https://example.org/a?api_key=abc"),
        ("data.init_args.path", "https://example.org/a?x=1&access_token=abc#b"),
        ("data.init_args.path", "https://example.org/a?key=abc"),
        ("data.init_args.path", "https://bucket.example.org/a.jsonl?X-Amz-Expires=60&X-Amz-Signature=abc"),
        ("data.init_args.note", "-----BEGIN RSA PRIVATE KEY-----\nabc"),
        ("data.init_args.note", "AIza" + "a" * 35),
    ],
)
def test_secrets_in_configs_are_refused_and_not_repeated(
    path: str, value: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MY_API_KEY", "correct-horse")
    config: Any = value
    for part in reversed(path.split(".")):
        config = [config] if part == "0" else {part: config}
    with pytest.raises(ValueError, match=f"^{path} holds a secret.*environment variable") as error:
        refuse_secrets({"seed_everything": 1, **config})
    assert str(value) not in str(error.value) or value == "x"


def test_ordinary_options_hold_no_secrets(values: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TOKENIZER_PATH", "/models/tokenizer")
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "false")
    monkeypatch.setenv("RETRY_TOKEN", "12345678")  # a number may stand anywhere
    monkeypatch.setenv("EMPTY_API_KEY", "")
    others = {"pad_token": "<pad>", "tokenizer": "/models/tokenizer", "max_new_tokens": 12345678, "api_key": None}
    urls = {
        "base_url": "http://localhost:8000/v1",
        "api_key_env": "OPENAI_API_KEY",
        "hub": "trl-lib/tldr",
        "n": "12345678",
        "path": "https://example.org/data?split=train&tokens=5&keyword=a&monkey=b",
    }
    monkeypatch.delenv("RETRY_TOKEN")
    refuse_secrets({**values, "others": others, "urls": urls})


def test_shipped_configs_and_our_own_options_hold_no_secrets() -> None:
    for path in Path("configs").rglob("*.yaml"):
        refuse_secrets(yaml.safe_load(path.read_text()) or {})
    classes = [GOPOModule, RewardModelModule, PromptDataModule, PreferenceDataModule, PromptSource, PolicyConfig]
    classes += [RolloutConfig, RewardConfig, ObjectiveConfig, UpdateConfig, ClippedSurrogate]
    classes += [getattr(room, name) for room in (rewards, rollout, callbacks) for name in room.__all__]
    names = {name for cls in classes for name in inspect.signature(cls.__init__).parameters}
    assert {"num_completions", "tokenizer", "max_tokens", "stop_strings", "api_key_env"} <= names
    refuse_secrets(dict.fromkeys(names | {"eos_token", "num_tokens", "sort_key", "public_key", "tokens", "keys"}, "x"))


def test_a_secret_in_the_config_is_refused_before_it_is_saved(values: dict[str, Any], tmp_path: Path) -> None:
    judge = {"model": "m", "api_key_env": None, "extra_body": {"api_key": "hunter2"}}
    values["model"]["init_args"]["rewards"]["sources"] = [
        {"class_path": "gopo_lightning.rewards.LLMJudge", "init_args": judge}
    ]
    with pytest.raises(ValueError, match="extra_body.api_key holds a secret") as error:
        gopo(values, "fit", tmp_path)
    assert not (tmp_path / "run").exists() and "hunter2" not in "".join(traceback.format_exception(error.value))


# -------------------------------------------------------------------------------------------------- files that are read


@pytest.mark.parametrize("command", ["fit", "validate", "test", "predict"])
def test_a_checkpoint_that_would_run_code_is_refused(
    command: str, values: dict[str, Any], tiny_policy: Path, prompts_file: Path, tmp_path: Path
) -> None:
    """By the command line and by a Trainer of one's own, also if that asks for more than weights."""
    path, marker = tmp_path / "evil.ckpt", tmp_path / "marker"
    torch.save({"state_dict": {}, "evil": RunsCode(marker)}, path)
    with pytest.raises(ValueError, match="holds more than tensors and plain values"):
        gopo(values, command, tmp_path, "--ckpt_path", str(path))
    trainer, data = make_trainer(tmp_path), make_data(prompts_file, test=PromptSource(str(prompts_file)))
    with pytest.raises(ValueError, match="holds more than tensors and plain values"):
        getattr(trainer, command)(make_module(tiny_policy), data, ckpt_path=path, weights_only=False)
    assert not marker.exists()
    torch.load(path, weights_only=False)
    assert marker.exists()  # it would have


def test_reward_models_load_no_code_either(tmp_path: Path, tiny_policy: Path) -> None:
    path, marker = tmp_path / "evil.ckpt", tmp_path / "marker"
    torch.save({"state_dict": {}, "evil": RunsCode(marker)}, path)
    pairs = tmp_path / "pairs.jsonl"
    pairs.write_text('{"chosen": "a", "rejected": "b"}\n' * 8)
    trainer = make_trainer(tmp_path)
    with pytest.raises(ValueError, match="holds more than tensors and plain values"):
        trainer.fit(
            RewardModelModule(str(tiny_policy)),
            PreferenceDataModule(str(pairs), batch_size=2),
            ckpt_path=path,
            weights_only=False,
        )
    assert not marker.exists()


def test_a_checkpoint_cannot_change_the_config(values: dict[str, Any], tmp_path: Path) -> None:
    """Lightning's command line takes hyperparameters from it, and they could name any callable as the reward."""
    gopo(values, "fit", tmp_path)
    path = next(tmp_path.rglob("*.ckpt"))
    checkpoint = torch.load(path, weights_only=True)
    reward = {
        "class_path": "gopo_lightning.rewards.FunctionReward",
        "init_args": {"function": "tests.runs.some_invalid"},
    }
    checkpoint["hyper_parameters"] = {"num_completions": 7, "rewards": [reward]}
    torch.save(checkpoint, path)
    gopo(values, "predict", tmp_path, "--ckpt_path", str(path))
    saved = [config.read_text() for config in (tmp_path / "run").rglob("config*.yaml")]
    assert len(saved) == 2 and all("count_vowels" in text for text in saved)
    assert not any("some_invalid" in text or "num_completions: 7" in text for text in saved)


@pytest.mark.parametrize("load", ["policy", "reference", "classifier", "judge", "training"])
def test_weights_must_be_safetensors(load: str, tiny_policy: Path, tmp_path: Path) -> None:
    auto = AutoModelForCausalLM if load in ("policy", "reference", "judge") else AutoModelForSequenceClassification
    model = auto.from_pretrained(tiny_policy, num_labels=1)
    model.config.save_pretrained(tmp_path)
    byte_tokenizer().save_pretrained(tmp_path)
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    with pytest.raises(ValueError, match=r"no weights in safetensors .* convert them"):
        load_by(load, tmp_path)
    model.save_pretrained(tmp_path)  # beside it
    load_by(load, tmp_path)


def load_by(load: str, folder: Path) -> None:
    """Load the model in ``folder`` in one of the app's ways."""
    if load == "policy":
        load_policy(PolicyConfig(str(folder)))
    elif load == "reference":
        load_reference(PolicyConfig(str(folder)))
    elif load == "training":
        RewardModelModule(str(folder))
    else:
        source = SequenceClassifierReward(str(folder)) if load == "classifier" else LocalJudge(str(folder))
        source.setup(torch.device("cpu"))


@pytest.mark.parametrize("load", ["policy", "reference", "training", "classifier", "judge"])
def test_a_wrong_name_is_not_blamed_on_the_format(load: str) -> None:
    with pytest.raises(ValueError, match="there is no folder 'no-such-model', and"):
        load_by(load, Path("no-such-model"))


@pytest.mark.parametrize("load", ["policy", "reference", "classifier", "judge", "training"])
def test_code_that_comes_with_a_model_does_not_run(load: str, tmp_path: Path) -> None:
    marker = tmp_path / "marker"
    folder = tmp_path / "model"
    classes = ("AutoModelForCausalLM", "AutoModelForSequenceClassification")
    folder.mkdir()
    config = {"model_type": "evil", "auto_map": {"AutoConfig": "evil.Config", **dict.fromkeys(classes, "evil.Model")}}
    (folder / "config.json").write_text(json.dumps(config))
    byte_tokenizer().save_pretrained(folder)
    (folder / "evil.py").write_text(
        f"import os\nos.makedirs({str(marker)!r}, exist_ok=True)\n"
        "from transformers import LlamaConfig\nclass Config(LlamaConfig):\n    model_type = 'evil'\n"
    )
    with pytest.raises(ValueError, match="trust_remote_code"):
        load_by(load, folder)
    tokenizer = {"tokenizer_class": "Evil", "auto_map": {"AutoTokenizer": ["evil.Tokenizer", None]}}
    (folder / "tokenizer_config.json").write_text(json.dumps(tokenizer))
    with pytest.raises(ValueError, match="trust_remote_code"):
        load_tokenizer(PolicyConfig(str(folder)))
    assert not marker.exists()


# ----------------------------------------------------------------------------------------------- files that are written


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"logger": TensorBoardLogger("runs", name="../../escaped")}, "name of TensorBoardLogger='../../escaped'"),
        ({"logger": TensorBoardLogger("runs", name="x", version="../../../y")}, "version of TensorBoardLogger"),
        ({"logger": TensorBoardLogger("runs", name="x", sub_dir="/elsewhere")}, "sub_dir of TensorBoardLogger"),
        ({"logger": CSVLogger("runs", name="a/../../b")}, "name of CSVLogger"),
        ({"callbacks": [ModelCheckpoint(filename="../{step}")]}, "filename of ModelCheckpoint"),
    ],
)
@pytest.mark.parametrize("kind", ["policy", "reward model"])
def test_names_that_lead_out_of_the_run_folder_are_refused(
    kind: str,
    options: dict[str, Any],
    message: str,
    tiny_policy: Path,
    prompts_file: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    module: LightningModule = make_module(tiny_policy) if kind == "policy" else RewardModelModule(str(tiny_policy))
    with pytest.raises(ValueError, match=f"{message}.* leads out of the run's folder"):
        make_trainer(tmp_path / "inside", **options).fit(module, make_data(prompts_file))
    assert not list(tmp_path.rglob("*"))


@pytest.mark.parametrize("name", ["..", "../x", "a/../../b", "/etc/x", "..\\x", "C:/x", "a/.."])
def test_what_leads_out(name: str) -> None:
    with pytest.raises(ValueError, match="leads out of the run's folder"):
        check_stays_inside("name", name)


@pytest.mark.parametrize("name", [None, "", "run", "runs/today", "{epoch}-{val/reward:.2f}", "a..b", ".hidden", 3])
def test_what_stays_inside(name: Any) -> None:
    check_stays_inside("name", name)


# -------------------------------------------------------------------------------------------------- text on a terminal


@pytest.mark.parametrize(
    "text", ["a [red]warning[/red] b", "closed [/] it", "[/b] x", "[link=http://evil]x[/link]", "[1] list [2]", "\\[b]"]
)
def test_the_quickstart_shows_markup_as_text(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert text in printed_samples(text, monkeypatch)


def test_the_quickstart_shows_no_characters_that_a_terminal_obeys(monkeypatch: pytest.MonkeyPatch) -> None:
    out = printed_samples("\x1b[31mred\x1b[0m\x1b]0;title\x07\x9b2J\u202eabc\r\b", monkeypatch)
    assert "]0;title" in out and not {"\x1b", "\x07", "\x9b", "\u202e", "\r", "\b"} & set(out)


def printed_samples(text: str, monkeypatch: pytest.MonkeyPatch) -> str:
    """What the quickstart prints of a prompt and a completion that are both ``text``."""
    quickstart = importlib.import_module("gopo_lightning.commands.quickstart")
    console = Console(file=io.StringIO(), width=300, color_system=None)
    monkeypatch.setattr(quickstart, "console", console)
    row = {"index": 0, "prompt": text, "completions": [text], "rewards": {"sentiment": [0.5]}}
    quickstart.print_samples([row], [row], "sentiment", 1)
    return console.file.getvalue()

"""Wrong input, as users write it: one sentence that names the cause, on few lines, and exit code 2."""

import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from gopo_lightning.commands import errors, layers, usage
from gopo_lightning.distributed import collectives
from gopo_lightning.objectives import named
from tests.conftest import save_tiny_policy, write_prompts
from tests.use import commands

CONFIG = """\
trainer:
  accelerator: cpu
  max_steps: 1
  logger: {class_path: CSVLogger, init_args: {save_dir: runs, name: run}}
model:
  class_path: gopo_lightning.GOPOModule
  init_args:
    policy: {name: policy}
    rollout:
      num_completions: 4
      sampling:
        max_new_tokens: 8
    rewards:
      sources:
        - class_path: gopo_lightning.rewards.FunctionReward
          init_args: {function: mine.vowels}
    objective:
      advantage: ordinal
    update:
      optimizer: {class_path: torch.optim.AdamW, init_args: {lr: 1.0e-3}}
data:
  class_path: gopo_lightning.PromptDataModule
  init_args:
    prompts_per_step: 4
    train: {path: prompts.jsonl}
    validation: {path: prompts.jsonl, limit: 4}
"""

MINE = """\
import torch


def vowels(completions):
    return [float(sum(c in "aeiou" for c in text)) for text in completions]


def pairs(first, second):
    return [0.5 for _ in first]


def fails(completions):
    return [{}["score"] for _ in completions]


def no_texts(answers):
    return [0.0 for _ in answers]


def no_pairs(left, right):
    return [0.5 for _ in left]


def two_arguments(rewards_PG, baseline):
    return rewards_PG - baseline


def one_a_group(rewards_PG):
    return rewards_PG.mean(-1)


def no_argument():
    return torch.zeros(1, 2)


def no_tensor(rewards_PGK):
    return rewards_PGK.sum(-1).tolist()


def number(completions):
    return 1.0


too_few = lambda completions: [0.0]
constant = 3
"""

MODEL, DATA, TRAINER = "--model.init_args.", "--data.init_args.", "--trainer."


@dataclass(frozen=True)
class Case:
    """What is wrong, and a regular expression of what must be said."""

    name: str
    said: str
    flags: tuple[str, ...] = ()
    edit: tuple[str, str] | None = None
    """Text of the config, and what stands in its place."""
    command: tuple[str, ...] = ("fit", "--config", "config.yaml")


def source(kind: str, function: str) -> tuple[str, ...]:
    """A flag that makes it the only reward source."""
    value = f'[{{"class_path": "gopo_lightning.rewards.{kind}", "init_args": {{"function": "mine.{function}"}}}}]'
    return (f"{MODEL}rewards.sources={value}",)


CASES = [
    # the command line
    Case("unknown command", "did you mean 'fit'", command=("fti",)),
    Case("no command before options", "first word is one of fit", command=("--config", "config.yaml")),
    Case("fit alone", r"--config", command=("fit",)),
    Case("no such config", r"absent\.yaml", command=("fit", "--config", "absent.yaml")),
    Case("config without a value", "--config", command=("fit", "--config")),
    Case("config is a folder", "policy", command=("fit", "--config", "policy")),
    Case("unknown flag", "--trainer.max_setps.*did you mean.*max_steps", (TRAINER + "max_setps=3",)),
    Case("flag without a group", "--max_steps.*trainer.max_steps", ("--max_steps=3",)),
    Case(
        "misspelt flag of the model",
        r"num_completoins.*did you mean.*num_completions",
        (MODEL + "rollout.num_completoins=4",),
    ),
    Case("flag of the wrong type", "max_steps.*many", (TRAINER + "max_steps=many",)),
    # the YAML
    Case("no YAML", r"config\.yaml, line 9", edit=("{name: policy}", "{name: policy")),
    Case("a tab", r"config\.yaml.*line 9.*tab", edit=("    rollout:", "\trollout:")),
    Case("a list", r"config\.yaml", edit=(CONFIG, "- 1\n")),
    Case("empty", r"config\.yaml", edit=(CONFIG, "")),
    Case("unknown top-level key", r"modle.*did you mean.*model.*config\.yaml.*line 5", edit=("\nmodel:", "\nmodle:")),
    Case("misspelt key of the trainer", r"max_step\b.*max_steps.*config\.yaml.*line 3", edit=("max_steps", "max_step")),
    Case("misspelt key of the model", r"rolout.*rollout.*config\.yaml.*line 9", edit=("rollout:", "rolout:")),
    Case(
        "misspelt nested key",
        r"max_new_token\b.*max_new_tokens.*config\.yaml.*line 12",
        edit=("max_new_tokens", "max_new_token"),
    ),
    Case(
        "misspelt key of data",
        r"promts_per_step.*prompts_per_step.*config\.yaml.*line 24",
        edit=("prompts_per_step", "promts_per_step"),
    ),
    Case("misspelt key of a data set", r"pth.*path.*config\.yaml.*line 25", edit=("train: {path:", "train: {pth:")),
    Case(
        "part of several keys",
        r"'column'; did you mean 'prompt_column' or 'messages_column' or 'system_column'\?.*line 25",
        edit=("train: {path: prompts.jsonl}", "train: {path: prompts.jsonl, column: question}"),
    ),
    Case(
        "misspelt key of a reward",
        r"functoin.*function.*config\.yaml.*line 16",
        edit=("{function: mine.vowels}", "{functoin: mine.vowels}"),
    ),
    Case(
        "misspelt init_args",
        r"init_arg\b.*init_args.*config\.yaml.*line 23",
        edit=("  init_args:\n    prompts", "  init_arg:\n    prompts"),
    ),
    Case("wrong type", r"num_completions.*four", edit=("num_completions: 4", "num_completions: four")),
    Case("wrong type of a group", r"sampling", edit=("sampling:\n        max_new_tokens: 8", "sampling: hot")),
    Case(
        "a class's arguments without init_args",
        "",
        edit=("          init_args: {function: mine.vowels}", "          function: mine.vowels"),
    ),
    Case(
        "one source, not a list",
        "sources.*list",
        edit=(
            "        - class_path: gopo_lightning.rewards.FunctionReward\n          init_args: {f",
            "        class_path: gopo_lightning.rewards.FunctionReward\n        init_args: {f",
        ),
    ),
    Case(
        "a field that must be there",
        r"sources lacks function.*line 14",
        edit=("{function: mine.vowels}", "{name: mine}"),
    ),
    # names of classes
    Case(
        "misspelt module",
        r"GOPOModul.*gopo_lightning\.GOPOModule",
        edit=("gopo_lightning.GOPOModule", "gopo_lightning.GOPOModul"),
    ),
    Case("misspelt reward", r"FunctionRewrd.*FunctionReward", edit=("rewards.FunctionReward", "rewards.FunctionRewrd")),
    Case(
        "misspelt short reward",
        r"FunctionRewrd.*FunctionReward",
        edit=("gopo_lightning.rewards.FunctionReward", "FunctionRewrd"),
    ),
    Case(
        "a class of another kind",
        r"PromptDataModule is no RewardSource or PairwiseSource \(config.yaml, line 15",
        edit=("rewards.FunctionReward", "PromptDataModule"),
    ),
    Case(
        "a class elsewhere",
        r"gopo_lightning\.FunctionReward.*gopo_lightning\.rewards\.FunctionReward",
        edit=("gopo_lightning.rewards.FunctionReward", "gopo_lightning.FunctionReward"),
    ),
    Case("no such optimiser", r"AdmaW.*AdamW", edit=("torch.optim.AdamW", "torch.optim.AdmaW")),
    Case(
        "no such callback", r"ModelChekpoint.*ModelCheckpoint", (TRAINER + "callbacks=[{class_path: ModelChekpoint}]",)
    ),
    Case("no such loss", r"ClippedSurogate.*ClippedSurrogate", (MODEL + "objective.loss=ClippedSurogate",)),
    Case("no such engine", r"VLLMEngin\b.*VLLMEngine", (MODEL + "rollout.engine=VLLMEngin",)),
    Case("no such advantage", r"ordinl.*ordinal", edit=("advantage: ordinal", "advantage: ordinl")),
    Case("a class of the user's that is not there", "No module named 'yours'", (MODEL + "objective.loss=yours.Loss",)),
    # files
    Case("no such model folder", r"nomodel", edit=("{name: policy}", "{name: ./nomodel}")),
    Case("no such model", r"nomodel", edit=("{name: policy}", "{name: nomodel}")),
    Case("no such prompts", r"absent\.jsonl", edit=("train: {path: prompts.jsonl}", "train: {path: absent.jsonl}")),
    Case("no such column", r"question.*prompt", (DATA + "train.prompt_column=question",)),
    Case("no rows", r"empty\.jsonl", edit=("train: {path: prompts.jsonl}", "train: {path: empty.jsonl}")),
    Case("torn JSON", r"torn\.jsonl.*line 2", edit=("train: {path: prompts.jsonl}", "train: {path: torn.jsonl}")),
    Case("no such checkpoint", r"absent\.ckpt", ("--ckpt_path", "absent.ckpt")),
    Case("no checkpoint", r"torn\.jsonl", ("--ckpt_path", "torn.jsonl")),
    # values
    Case("negative learning rate", r"learning rate: -1", edit=("lr: 1.0e-3", "lr: -1.0")),
    Case("unknown option of the optimiser", r"lrr", edit=("{lr: 1.0e-3}", "{lrr: 1.0e-3}")),
    Case("prompts do not divide", r"num_minibatches=3", (MODEL + "update.num_minibatches=3", TRAINER + "max_steps=3")),
    Case("more prompts than rows", "prompts_per_step", (DATA + "prompts_per_step=100",)),
    Case("one completion", "at least 2", (MODEL + "rollout.num_completions=1",)),
    Case("too many devices", "gpu", (TRAINER + "accelerator=gpu", TRAINER + "devices=8")),
    # functions
    Case("no such function", r"mine.*vowel", edit=("mine.vowels", "mine.vowel")),
    Case("no such module of functions", r"yours", edit=("mine.vowels", "yours.vowels")),
    Case("no function", r"constant.*int", edit=("mine.vowels", "mine.constant")),
    Case("signature of a reward", r"no_texts.*completions", edit=("mine.vowels", "mine.no_texts")),
    Case("signature of a comparator", r"no_pairs.*first.*second", source("FunctionComparator", "no_pairs")),
    Case("signature of an oracle", r"no_texts.*completions", source("RankingOracle", "no_texts")),
    Case(
        "signature of an advantage", r"two_arguments.*rewards_PG", (MODEL + "objective.advantage=mine.two_arguments",)
    ),
    Case(
        "advantage without an argument", r"no_argument.*rewards_PG", (MODEL + "objective.advantage=mine.no_argument",)
    ),
    Case("shape of an advantage", r"one_a_group.*shape", (MODEL + "objective.advantage=mine.one_a_group",)),
    Case("combine without an argument", r"no_argument.*rewards_PGK", (MODEL + "rewards.combine=mine.no_argument",)),
    Case("combine returns a list", r"no_tensor.*list", (MODEL + "rewards.combine=mine.no_tensor",)),
    Case("credit without an argument", r"no_argument.*experience", (MODEL + "objective.credit=mine.no_argument",)),
    Case("reward of a wrong length", r"too_few|<lambda>", edit=("mine.vowels", "mine.too_few")),
    Case("reward of a wrong type", r"number", edit=("mine.vowels", "mine.number")),
    Case("reward that raises", r"fails.*KeyError: 'score'.*mine\.py.*line 13", edit=("mine.vowels", "mine.fails")),
    # our own commands
    Case("inspect alone", "--config", command=("inspect",)),
    Case(
        "inspect of a wrong number",
        "num_prompts.*many",
        command=("inspect", "--config", "config.yaml", "--num_prompts=many"),
    ),
    Case("duel of one", "2", command=("duel", "policy", "--judge", "rewards:vowels")),
    Case("duel without a judge", "--judge", command=("duel", "policy", "policy")),
    Case("duel with no such judge", r"LLMJudg\b.*LLMJudge", command=("duel", "policy", "policy", "--judge=LLMJudg")),
    Case(
        "duel with an unknown option", r"--drwas.*--draws", command=("duel", "a", "b", "--judge=LLMJudge", "--drwas=3")
    ),
    Case("report of nothing", "absent", command=("report", "absent")),
    Case("report without runs", "RUN", command=("report",)),
    Case("compare with itself", "itself", command=("compare", "config.yaml", "config.yaml")),
    Case("compare of one", "CONFIG", command=("compare", "config.yaml")),
    Case(
        "validate without a checkpoint of the run",
        "last",
        ("--ckpt_path", "last"),
        command=("validate", "--config", "config.yaml"),
    ),
]


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder as a user's, and warm imports."""
    folder = tmp_path_factory.mktemp("errors")
    make_workspace(folder)
    commands.preload()
    return folder


def make_workspace(folder: Path) -> None:
    save_tiny_policy(folder / "policy")
    write_prompts(folder)
    (folder / "mine.py").write_text(MINE)
    (folder / "empty.jsonl").write_text("")
    (folder / "torn.jsonl").write_text('{"prompt": "a"}\n{"prompt": \n')


def run(case: Case, folder: Path) -> commands.Ended:
    text = CONFIG
    if case.edit is not None:
        assert case.edit[0] in text
        text = text.replace(*case.edit, 1)
    (folder / "config.yaml").write_text(text)
    return commands.run([*case.command, *case.flags], folder)


def printed(ended: commands.Ended) -> list[str]:
    """From the error on: what a run says of devices and models stands before it."""
    lines = ended.text.splitlines()
    first = [number for number, line in enumerate(lines) if line.startswith("error: ")]
    return lines[first[0] :] if len(first) == 1 else []


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_wrong_input_is_answered_in_a_sentence(case: Case, workspace: Path) -> None:
    ended = run(case, workspace)
    said = printed(ended)
    assert ended.code == errors.USERS, ended.text
    assert 1 <= len(said) <= errors.MAX_LINES and re.search(case.said, "\n".join(said), re.DOTALL), ended.text
    assert "Traceback" not in ended.text and "usage:" not in ended.text
    assert not list(workspace.rglob("*.ckpt"))


@pytest.mark.parametrize("debug", [("--debug",), ()])
def test_debug_shows_the_traceback(debug: tuple[str, ...], workspace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if not debug:
        monkeypatch.setenv(errors.DEBUG, "1")
    ended = run(Case("", "", (MODEL + "rollout.num_completions=1", *debug)), workspace)
    assert ended.code == errors.USERS and "Traceback" in ended.text and "checks.py" in ended.text
    assert printed(ended) == ["error: num_completions=1: ranking needs at least 2 completions; use 8"]


def test_a_bug_keeps_its_traceback(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended, errors.reported(["gopo-lightning"]):
        layers.files([None])  # type: ignore[list-item]
    said = capsys.readouterr().err
    assert ended.value.code == errors.CRASH
    assert said.startswith("Traceback") and "layers.py" in said and said.endswith(f"\n{errors.REPORT}\n")


def raised(function: Callable[[], Any]) -> Exception:
    try:
        function()
    except Exception as error:  # noqa: BLE001 - of any kind
        return error
    raise AssertionError("it raised nothing")


@pytest.mark.parametrize(
    ("function", "users"),
    [
        (lambda: usage.check_command("x"), True),
        (lambda: layers.files([None]), False),  # type: ignore[list-item]
        (lambda: named.check_choice("x", 1, None), False),  # type: ignore[arg-type]
        (lambda: Path("absent").read_text(), True),
        (lambda: 1 / 0, True),
    ],
)
def test_whose_error_it_is(function: Callable[[], Any], users: bool) -> None:
    """A `raise` of ours, a call of ours that fails, a file that is not there, code outside of the package."""
    error = raised(function)
    if not isinstance(error, ZeroDivisionError):  # this file's own frames are no part of the command
        while error.__traceback__ is not None and error.__traceback__.tb_frame.f_code.co_filename == __file__:
            error.__traceback__ = error.__traceback__.tb_next
    assert errors.is_users(error) is users


@pytest.mark.parametrize(
    ("rank", "local", "error", "said"),
    [
        ("0", "0", ValueError("bad"), ["error: bad"]),
        ("1", "1", ValueError("bad"), []),
        ("8", "0", ValueError("bad"), ["rank 8: error: bad"]),
        ("0", "0", collectives.PeerError("rank 1 failed"), ["error: rank 1 failed"]),
        ("8", "0", collectives.PeerError("rank 1 failed"), []),
    ],
)
def test_before_ranks_meet_the_first_of_a_machine_speaks(
    rank: str, local: str, error: Exception, said: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RANK", rank)
    monkeypatch.setenv("LOCAL_RANK", local)
    assert errors.of_this_rank(error, errors.sentence(error)) == said


def test_a_long_message_is_cut() -> None:
    lines = errors.sentence(ValueError("\n".join(map(str, range(30)))))
    assert len(lines) == errors.MAX_LINES and lines[0] == "error: 0" and "--debug" in lines[-1]


HELP = [line.partition("gopo-lightning ")[2].split("  ")[0] for line in usage.FIELDS.splitlines()[1:]]


@pytest.mark.parametrize("command", [*HELP, *(f"{name} --help" for name in usage.OWN)])
def test_every_help_that_help_names_answers(command: str, workspace: Path) -> None:
    (workspace / "CONFIG.yaml").write_text(CONFIG)
    ended = commands.run(command.split(), workspace)
    assert ended.code == 0 and len(ended.text.splitlines()) > 10, ended.text
    assert not re.search(r"\(<class '[\w.]+'>, <class", ended.text)  # a tuple of them is no heading


@pytest.mark.parametrize("command", ["--help", "--version", *(f"{name} --help" for name in usage.OWN)])
def test_help_needs_no_torch(command: str) -> None:
    arguments = [sys.executable, "-X", "importtime", "-m", "gopo_lightning", *command.split()]
    done = subprocess.run(arguments, capture_output=True, text=True, check=True)
    assert done.stdout and "gopo_lightning.commands" in done.stderr
    assert not re.search(r"\| +(torch|lightning|transformers|matplotlib|scipy)\b", done.stderr)


SHORT = CONFIG.replace("gopo_lightning.rewards.", "").replace("gopo_lightning.", "").replace("torch.optim.", "")


@pytest.mark.parametrize(
    "flags",
    [
        (),
        (MODEL + "objective.loss=ClippedSurrogate", MODEL + "rollout.engine=TransformersEngine"),
        (TRAINER + "callbacks=[{class_path: SampleTable}, {class_path: ModelCheckpoint}]",),
        (MODEL + "rewards.sources=[{class_path: LocalJudge, init_args: {model: policy}}]",),
        (MODEL + "rewards.transforms=[{class_path: KLInReward, init_args: {coef: 0.1}}]",),
        source("FunctionComparator", "pairs"),
    ],
)
def test_short_class_names_are_enough(flags: tuple[str, ...], workspace: Path) -> None:
    (workspace / "short.yaml").write_text(SHORT)
    short = [flag.replace("gopo_lightning.rewards.", "") for flag in flags]
    ended = commands.run(["fit", "--config", "short.yaml", *short, "--print_config"], workspace)
    assert ended.code == 0 and "torch.optim.AdamW" in ended.text, ended.text

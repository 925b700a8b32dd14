"""Every command and every piece of Python in README and docs is parsed, instantiated or run; the site lacks nothing."""

import doctest
import importlib
import re
import shlex
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
import yaml
from lightning.pytorch import Trainer
from lightning.pytorch.loggers import CSVLogger

from gopo_lightning.commands import compare, config, duel, duel_job, estimate, export, inspect, quickstart, rank, report
from gopo_lightning.commands.judges import prepared
from gopo_lightning.commands.lightning_cli import run
from gopo_lightning.commands.named_configs import resolve
from gopo_lightning.commands.usage import OF_LIGHTNING, OWN
from scripts.docs.configuration import options, sections, texts
from scripts.docs.pages import Block, blocks, commands, pages

ROOT = Path.cwd()
PAGES = [(page, list(blocks(page.read_text(encoding="utf-8")))) for page in pages()]
COMMANDS = [
    pytest.param(page, block, command, id=f"{page}: {command}")
    for page, found in PAGES
    for block in found
    if block.language == "console"
    for command in commands(block)
]
PYTHON = [
    pytest.param(found, id=str(page))
    for page, found in PAGES
    if any(block.language == "python" and not block.title for block in found)
    and page.name not in ("CONTRIBUTING.md", "configure.md", "integrations.md")
]
"""Those pages' Python is run in test_docs_examples.py and test_trl.py, with tiny models."""
STAND_INS = {"try.yaml": "configs/quickstart/gopo.yaml"}
"""A file that a page names without showing it → what it is for this test."""
NEEDS_MARK = ("pip install", "make install", "sbatch", "scripts/torchrun.sh", "fit --config paper/", "compare ")
"""What asks for a network, a cluster, a GPU or hours."""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Where a reader would be: a checkout, with the files that the pages show."""
    for name in ("configs", "scripts", "Makefile", "pyproject.toml"):
        (tmp_path / name).symlink_to(ROOT / name)
    for _, found in PAGES:
        write_files(tmp_path, found)
    for name, other in STAND_INS.items():
        (tmp_path / name).write_text((ROOT / other).read_text())
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    yield tmp_path
    for name in ("my_rewards", "my_methods"):  # of the same name on several pages
        sys.modules.pop(name, None)


def write_files(folder: Path, found: list[Block]) -> None:
    for block in found:
        if block.title:
            (folder / block.title).write_text(block.text, encoding="utf-8")


@pytest.mark.parametrize(("page", "block", "command"), COMMANDS)
def test_commands(page: Path, block: Block, command: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gopo_lightning.rollout.engines.vllm_start.find_spec", lambda name: True)
    write_files(folder, dict(PAGES)[page])
    words = resolve(shlex.split(re.sub(r"^(\w+=\S+ )+", "", command)))
    for (program, *start), check in CHECKS.items():
        if words[0] == program and words[1 : 1 + len(start)] == start:
            check(words[1 + len(start) :])
            return
    pytest.fail(f"{page} shows `{command}`, which no entry of CHECKS knows: add one")


@pytest.mark.parametrize(("page", "block", "command"), COMMANDS)
def test_what_needs_more_than_a_laptop_is_marked(page: Path, block: Block, command: str) -> None:
    if any(sign in command for sign in NEEDS_MARK):
        assert block.needs, f"write `<!-- needs: … -->` above the block of `{command}` in {page}"


@pytest.mark.parametrize("page", [page for page, _ in PAGES], ids=str)
def test_commands_are_shown_as_commands(page: Path) -> None:
    """In a block of console, behind a $, by the name of the script: else the tests above pass them over."""
    text = page.read_text(encoding="utf-8")
    assert not re.findall(r"^ *(?:gopo-lightning|python -m gopo_lightning) .*", text, re.M)
    assert "$ python -m gopo_lightning " not in text


def instantiate(arguments: list[str]) -> None:
    """Everything that the command line builds, on a CPU; nothing is run."""
    line = re.sub(r"--ckpt_path[= ]\S+", "", shlex.join(arguments))
    built = (line, *(Path(file).read_text(encoding="utf-8") for file in re.findall(r"--config[= ](\S+)", line)))
    if built not in INSTANTIATED:
        run([*shlex.split(line), "--trainer.accelerator=cpu", "--trainer.logger=false"], instantiate_only=True)
        INSTANTIATED.add(built)


INSTANTIATED: set[tuple[str, ...]] = set()
"""What several pages show is built once."""


def check_inspect(arguments: list[str]) -> None:
    own, flags = inspect.parser().parse_known_args(arguments)
    assert all(file is None or file.exists() for file in (own.judge, own.pairs))
    instantiate(flags)


def check_rank(arguments: list[str]) -> None:
    _, flags = rank.parser().parse_known_args(arguments)
    if flags:
        instantiate(flags)


def check_estimate(arguments: list[str]) -> None:
    _, flags = estimate.parser().parse_known_args(arguments)
    instantiate(flags)


def check_compare(arguments: list[str]) -> None:
    own = arguments[: arguments.index("--")] if "--" in arguments else arguments
    for joined in compare._parser().parse_args(own).configs:
        instantiate([f"--config={file}" for file in compare.layers(joined)])


def check_duel(arguments: list[str]) -> None:
    own, overrides = duel_job._split(arguments)
    given, _, _ = prepared(own)
    found = duel.make_parser(duel_job.JUDGES).parse_args(given)
    duel_job._check(found)
    if found.config:
        instantiate([*(f"--config={file}" for file in found.config), *overrides])


def check_target(arguments: list[str]) -> None:
    targets = re.findall(r"^([\w-]+):", Path("Makefile").read_text(), re.M)
    assert {word for word in arguments if "=" not in word} <= set(targets)


def check_extras(arguments: list[str]) -> None:
    known = re.findall(r"^(\w+) = \[", Path("pyproject.toml").read_text().split("optional-dependencies]")[1], re.M)
    for extras in re.findall(r"\[([\w,]+)\]", " ".join(arguments)):
        assert set(extras.split(",")) <= set(known), extras


def check_script(arguments: list[str]) -> None:
    """It is there, and reads the flags."""
    source = Path(arguments[0]).read_text(encoding="utf-8")
    for flag in (word.partition("=")[0] for word in arguments if word.startswith("--")):
        assert f'"{flag}"' in source, flag


def check_module(arguments: list[str]) -> None:
    check_script([str(ROOT / (arguments[0].replace(".", "/") + ".py")), *arguments[1:]])


def check_launcher(arguments: list[str]) -> None:
    assert (ROOT / arguments[0]).is_file()
    instantiate(arguments[1:])


def check_nothing(arguments: list[str]) -> None:
    """Of programs that are not ours."""


CHECKS: dict[tuple[str, ...], Callable[[list[str]], object]] = {
    **{("gopo-lightning", command): instantiate for command in OF_LIGHTNING},
    ("gopo-lightning", "inspect"): check_inspect,
    ("gopo-lightning", "compare"): check_compare,
    ("gopo-lightning", "duel"): check_duel,
    ("gopo-lightning", "rank"): check_rank,
    ("gopo-lightning", "report"): lambda arguments: report._parser().parse_args(arguments),
    ("gopo-lightning", "estimate"): check_estimate,
    ("gopo-lightning", "export"): lambda arguments: export._parser().parse_args(arguments),
    ("gopo-lightning", "config"): lambda arguments: config._parser().parse_args(arguments),
    ("gopo-lightning", "quickstart"): lambda arguments: quickstart._parser().parse_args(arguments),
    ("gopo-lightning", "--help"): check_nothing,
    ("make",): check_target,
    ("pip", "install"): check_extras,
    ("python", "-m", "verl.trainer.main_ppo"): check_nothing,
    ("python", "-m"): check_module,
    ("python3.11", "-m", "venv"): check_nothing,
    ("python",): check_script,
    ("sbatch",): check_launcher,
    ("scripts/torchrun.sh",): lambda arguments: check_launcher(["scripts/torchrun.sh", *arguments]),
    ("tensorboard",): check_nothing,
    ("vllm", "serve"): check_nothing,
    (".", ".venv/bin/activate"): check_nothing,
}
"""How a command begins → how the rest of it is checked."""


def test_every_command_of_ours_can_be_checked() -> None:
    assert {start[1] for start in CHECKS if start[0] == "gopo-lightning"} >= {*OWN}


@pytest.mark.parametrize("found", PYTHON)
def test_the_python_of_a_page_runs_in_its_order(found: list[Block], folder: Path) -> None:
    write_files(folder, found)
    trainer = Trainer(accelerator="cpu", logger=CSVLogger(folder), enable_checkpointing=False)
    names: dict[str, object] = {"trainer": trainer, "rewards_PG": torch.tensor([[1.0, 2.0]])}
    for block in found:
        if block.language == "python" and not block.title and not block.needs:
            exec(block.text, names)


@pytest.mark.parametrize("title", ["first.yaml", "own.yaml"])
def test_configs_that_pages_show_name_what_exists(title: str, folder: Path) -> None:
    assert yaml.safe_load((folder / title).read_text())["model"]["init_args"]["rewards"]["combine"] == "lexicographic"


MODULES = [
    ".".join(path.with_suffix("").parts)
    for path in sorted([*Path("gopo_lightning").rglob("*.py"), *Path("scripts/docs").glob("*.py")])
    if ">>>" in path.read_text(encoding="utf-8")
]


@pytest.mark.parametrize("name", MODULES)
def test_doctests(name: str) -> None:
    failed, tried = doctest.testmod(importlib.import_module(name), extraglobs={"torch": torch})
    assert tried and not failed


def test_every_option_has_a_text() -> None:
    """In the page that is made of signatures and docstrings."""
    missing = [
        f"{path}.{name}"
        for _, things in sections()
        for path, thing in things
        for name, _, _ in options(thing)
        if not texts(thing).get(name)
    ]
    assert not missing


def test_the_notebook_is_the_tutorial() -> None:
    nbformat = pytest.importorskip("nbformat", reason="make install-docs")
    from scripts.docs.notebook import NOTEBOOK, PAGE, notebook

    assert nbformat.read(NOTEBOOK, as_version=4) == notebook(PAGE.read_text(encoding="utf-8")), (
        "docs/tutorial.md has changed: python -m scripts.docs.notebook"
    )

"""What a policy may be given as, and its completions: those of a file, or sampled by `predict` and kept.

A sampled policy's seed follows from its content and the given seed, and the second time that the same policy comes in a
duel, from the count too. So different policies draw independently, which the interval takes for granted; a policy keeps
its completions in every duel, on either side; and a policy against itself is two independent samplings. (With one seed
for all, equal policies would write equal texts, and a small difference would be measured on coupled samples.)
"""

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import yaml

from gopo_lightning.data.assets import PREFIX
from gopo_lightning.distributed.atomic_files import writing_aside
from gopo_lightning.evaluation.duels.digests import code_of, config_identity, content_of, digest
from gopo_lightning.evaluation.duels.predictions import FILE

BASE = "base"
"""The policy that the config names, before any training."""
Kind = Literal["predictions", "export", "checkpoint", "base", "packaged"]
_STEP = re.compile(r"(?:\A|[-_./])step[-_=]?(\d+)(?:\D|\Z)")


@dataclass(frozen=True)
class PolicyFiles:
    """A policy as it was named."""

    name: str
    kind: Kind
    path: Path | None
    """Of its predictions, export or checkpoint."""

    @property
    def flags(self) -> list[str]:
        """What `predict` is told to sample from it."""
        policy = "--model.init_args.policy"
        if self.kind == "checkpoint":
            return [f"--ckpt_path={self.path}"]
        if self.kind == "base":
            return []
        return [f"{policy}.name={self.path or self.name}", f"{policy}.revision=null", f"{policy}.lora=null"]


@dataclass(frozen=True)
class Sampling:
    """How completions are sampled of what is no predictions file yet."""

    configs: tuple[Path, ...]
    """The training config, and what overrides it."""
    overrides: tuple[str, ...]
    """Further options of `predict`."""
    seed: int
    folder: Path
    """Where samples are kept."""

    @property
    def values(self) -> list[Any]:
        """The configs as read, and each of the overrides as one: a later one overrides."""
        return [*(read_yaml(path) for path in self.configs), *_as_configs(self.overrides)]


def _as_configs(overrides: Sequence[str]) -> Iterator[Any]:
    """`--a.b=1`, or `--a.b 1`, is {a: {b: 1}}; `--config FILE` is what the file says."""
    for argument, following in zip(overrides, [*overrides[1:], ""], strict=False):
        option, equals, text = argument.partition("=")
        if not option.startswith("--"):  # the value of the one before
            continue
        text = text if equals else following
        if option == "--config":
            yield read_yaml(Path(text))
            continue
        try:
            value = yaml.safe_load(text)
        except yaml.YAMLError:
            value = text
        for key in reversed(option.removeprefix("--").split(".")):
            value = {key: value}
        yield value


def read_yaml(path: Path) -> Any:
    """The content of ``path``.

    Raises:
        ValueError: no such file, or no YAML.
    """
    try:
        return yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise ValueError(f"{path} cannot be read as YAML: {error}. Correct the path or the file.") from error


def find_policy(name: str) -> PolicyFiles:
    """What ``name`` stands for.

    Raises:
        ValueError: nothing is there, or nothing that a policy can be read from.
    """
    path = Path(name)
    if not path.exists() and (name == BASE or name.startswith(PREFIX)):
        return PolicyFiles(name, "base" if name == BASE else "packaged", None)
    forms = (
        f"Name a predictions.jsonl or the folder of one, an exported model, a checkpoint (.ckpt), '{BASE}' for the "
        f"policy that --config names, or {PREFIX}NAME."
    )
    if not path.exists():
        raise ValueError(f"there is nothing at {name}. {forms}")
    if (kind := _kind(path)) is None:
        torn = sorted(path.glob("predictions.rank*.jsonl")) if path.is_dir() else []
        why = f"it holds {torn[0].name}, whose `predict` has not ended" if torn else "it is none of these"
        raise ValueError(f"no policy can be read from {name}: {why}. {forms}")
    return PolicyFiles(name, kind, path / FILE if kind == "predictions" and path.is_dir() else path)


def by_step(run: Path) -> dict[int, PolicyFiles]:
    """Policies of a run by their step, from names such as `policy-step-100`, `step100` or `step=100.ckpt`.

    A prediction precedes an export of the same step, an export a checkpoint.

    Raises:
        ValueError: no such folder, no step in it, or two of a kind at one step.
    """
    if not run.is_dir():
        raise ValueError(f"there is no folder {run}. Name a run's folder, with exports or predictions of its steps.")
    found: dict[int, dict[str, Path]] = {}
    for path in sorted(p for pattern in ("*", "checkpoints/*") for p in run.glob(pattern)):
        match, kind = _STEP.search(path.name), _kind(path)
        if match is None or kind is None:
            continue
        at_step = found.setdefault(int(match[1]), {})
        if kind in at_step:
            raise ValueError(f"{at_step[kind]} and {path} are both of step {match[1]}. Move one of them away.")
        at_step[kind] = path
    if not found:
        raise ValueError(
            f"{run} holds no policy of a step. Export during training (--export_every_n_steps), or write predictions "
            "to folders called step100 and so on."
        )
    order = ("predictions", "export", "checkpoint")
    return {
        step: find_policy(str(next(kinds[k] for k in order if k in kinds))) for step, kinds in sorted(found.items())
    }


def predictions_of(
    policies: Sequence[PolicyFiles], sampling: Sampling, say: Callable[[str], None] = lambda text: None
) -> list[Path]:
    """A predictions file of each; what is not there yet is sampled.

    Raises:
        ValueError: a policy that must be sampled, without a config; or a `predict` that failed.
    """
    seen: dict[str, int] = {}
    files = []
    for policy in policies:
        if policy.kind == "predictions":
            assert policy.path is not None
            files.append(policy.path)
            continue
        if not sampling.configs:
            raise ValueError(
                f"{policy.name} has no completions yet. Give --config, the training config, whose data.predict prompts "
                "it is to answer; or name a predictions.jsonl."
            )
        identity = digest([policy.kind, "" if policy.path else policy.name, *_contents(policy)])
        seen[identity] = seen.get(identity, -1) + 1
        files.append(_sampled(policy, identity, seen[identity], sampling, say))
    return files


def _contents(policy: PolicyFiles) -> list[str]:
    """Of its files; of an exported adapter, those of the local model that it belongs to as well."""
    if policy.path is None:
        return [""]
    contents = [content_of(policy.path)]
    if policy.kind == "export" and (adapter := policy.path / "adapter_config.json").is_file():
        base = read_yaml(adapter).get("base_model_name_or_path")
        contents += [content_of(Path(base))] if base and Path(base).is_dir() else []
    return contents


def _sampled(policy: PolicyFiles, identity: str, repeat: int, sampling: Sampling, say: Callable[[str], None]) -> Path:
    seed = int(digest([sampling.seed, identity, repeat])[:8], 16) % 2**31
    made_of = {
        "policy": identity,
        "seed": seed,
        "configs": sampling.values,
        "files": config_identity(sampling.values),
        "overrides": list(sampling.overrides),
        "code": code_of(),
    }
    target = sampling.folder / digest(made_of)[:16]
    if (target / FILE).is_file():
        say(f"{policy.name}: the completions are there already, {target / FILE}")
        return target / FILE
    with writing_aside(target, is_folder=True) as aside:
        logger = {"class_path": "CSVLogger", "init_args": {"save_dir": str(aside), "name": "run", "version": "predict"}}
        command = [
            *(f"--config={path}" for path in sampling.configs),
            *sampling.overrides,
            *policy.flags,
            f"--seed_everything={seed}",
            f"--model.init_args.seed={seed}",
            f"--trainer.logger={json.dumps(logger)}",
        ]
        say(f"{policy.name}: sampling, with seed {seed}")
        done = subprocess.run([sys.executable, "-m", "gopo_lightning", "predict", *command], check=False)
        if done.returncode != 0 or not (aside / "run" / "predict" / FILE).is_file():
            raise ValueError(
                f"`predict` of {policy.name} failed with exit code {done.returncode}; its own message is above. It was "
                f"called with {' '.join(command)}"
            )
        (aside / "run" / "predict" / FILE).rename(aside / FILE)
        shutil.rmtree(aside / "run")
        (aside / "made_of.json").write_text(json.dumps({"name": policy.name, **made_of}, indent=1), encoding="utf-8")
        try:
            aside.rename(target)
        except OSError:
            if not (target / FILE).is_file():  # else another duel has just sampled the same
                raise
            shutil.rmtree(aside)
    return target / FILE


def prompt_source(configs: Sequence[Any]) -> Mapping[str, Any] | None:
    """The settings of data.predict in ``configs``, of which a later one overrides; None where none names it."""
    merged: dict[str, Any] = {}
    for config in configs:
        data = config.get("data") if isinstance(config, Mapping) else None
        arguments = data.get("init_args") if isinstance(data, Mapping) else None
        predict = arguments.get("predict") if isinstance(arguments, Mapping) else None
        merged |= predict if isinstance(predict, Mapping) else {}
    return merged or None


def _kind(path: Path) -> Kind | None:
    if path.is_file():
        return "predictions" if path.suffix == ".jsonl" else "checkpoint" if path.suffix == ".ckpt" else None
    if (path / FILE).is_file():
        return "predictions"
    if path.suffix == ".ckpt":
        return "checkpoint"
    return "export" if any((path / name).is_file() for name in ("config.json", "adapter_config.json")) else None

"""What ``duel`` does once its options are read: sample, ask the judge, print and save."""

import os
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from rich.console import Console

from gopo_lightning.commands.duel import RECORDED, make_parser
from gopo_lightning.commands.errors import UsageError
from gopo_lightning.commands.explained import class_named, explain
from gopo_lightning.commands.judges import JUDGES, chosen_judge, device_of, prepared
from gopo_lightning.commands.layers import options as options_of
from gopo_lightning.commands.secrets import refuse_secrets
from gopo_lightning.data.sources import PromptSource, load_rows
from gopo_lightning.evaluation.bradley_terry import ladder
from gopo_lightning.evaluation.duel import DuelResult, duels
from gopo_lightning.evaluation.duels import written
from gopo_lightning.evaluation.duels.asking import Asker
from gopo_lightning.evaluation.duels.digests import content_of, digest, judge_identity
from gopo_lightning.evaluation.duels.policies import (
    PolicyFiles,
    Sampling,
    by_step,
    find_policy,
    predictions_of,
    prompt_source,
)
from gopo_lightning.evaluation.duels.predictions import RecordedScores, common, read_predictions, with_columns
from gopo_lightning.rewards import HoldsModels, SourceConfigError
from gopo_lightning.rewards.verdict_cache import VerdictCache
from gopo_lightning.types import Prompt


@dataclass(frozen=True)
class Job:
    """All that duels of one command have in common."""

    options: Any
    sampling: Sampling
    judge: Any
    """A reward source, set up; a text is the name of rewards in the predictions."""
    judge_config: Any
    identity: str
    """Of the judge; empty for recorded rewards."""
    cache: VerdictCache
    console: Console

    def duels(
        self, policies: Sequence[PolicyFiles], paths: Sequence[Path]
    ) -> tuple[dict[tuple[int, int], DuelResult], Any, list[Any]]:
        """Results and shares_nKK of ``policies``, whose files are ``paths``; and what these were."""
        names = _labels([str(path) for path in paths])
        files = {name: read_predictions(path) for name, path in zip(names, paths, strict=True)}
        indices, dropped = common(files)
        for name, number in dropped.items():
            if number:
                self.console.print(
                    written.shown(f"{name}: {number} prompts are left out, for not all have answered them")
                )
        prompts = self._prompts([files[names[0]][index].prompt for index in indices])
        groups = [[files[name][index].completions for name in names] for index in indices]
        judge, identity = self.judge, self.identity
        if isinstance(judge, str):
            judge, identity = RecordedScores(judge, files), digest([judge, sorted(content_of(path) for path in paths)])
        elif isinstance(judge, HoldsModels):  # only now, for `predict` has had the accelerator to itself
            judge.setup(device_of(self.options.device))
        asker = Asker(judge, self.cache, identity, self.options.orders, self.options.seed)
        try:
            results, shares_nKK = duels(
                prompts,
                groups,
                asker,
                prompts_per_call=self.options.prompts_per_call,
                draws=self.options.draws,
                seed=self.options.seed,
                progress=self._progress,
            )
        except SourceConfigError as error:
            if self.sampling.configs or "column" not in str(error):
                raise
            raise ValueError(
                f"{error} Predictions hold no other columns: name the training config by --config, and they are read "
                "from its data.predict."
            ) from error
        about = [
            {"name": policy.name, "kind": policy.kind, "file": str(path), "sha256": content_of(path)}
            for policy, path in zip(policies, paths, strict=True)
        ]
        return results, shares_nKK, about

    def predictions(self, policies: Sequence[PolicyFiles]) -> list[Path]:
        """Their files; what is not there is sampled."""
        return predictions_of(policies, self.sampling, lambda text: self.console.print(written.shown(text)))

    def _prompts(self, prompts: list[Prompt]) -> list[Prompt]:
        """With the columns of the dataset, where a config names it."""
        settings = prompt_source(self.sampling.values)
        if settings is None:
            return prompts
        source = PromptSource(**{**settings, "limit": None})
        rows = load_rows(source)
        if prompts[-1].index >= len(rows):
            raise ValueError(
                f"the predictions go up to row {prompts[-1].index} (counted from 0), but {source.path} has {len(rows)} "
                "rows. Name the config that they were made with."
            )
        return [with_columns(prompt, rows[prompt.index], source.column, source.path) for prompt in prompts]

    def _progress(self, done: int, of: int) -> None:
        if sys.stderr.isatty():
            print(f"\rjudged {done} of {of} prompts", end="\n" if done == of else "", file=sys.stderr, flush=True)

    def save(self, folder: Path, values: dict[str, Any]) -> None:
        """``duel.json`` with what all of them have in common."""
        name = f"rewards:{self.judge}" if isinstance(self.judge, str) else self.judge.name
        common_values = {
            "judge": {"name": name, "config": self.judge_config},
            **{key: self.options[key] for key in ("orders", "seed", "draws")},
            "configs": [str(path) for path in self.sampling.configs],
            "overrides": list(self.sampling.overrides),
            "versions": written.versions(),
        }
        written.save_json(folder / "duel.json", {**values, **common_values})
        self.console.print(written.shown(f"everything is in {folder / 'duel.json'}"))


def run(arguments: Sequence[str]) -> None:
    """Run the command."""
    os.environ.setdefault("JSONARGPARSE_DEPRECATION_WARNINGS", "off")
    given, overrides = _split(list(arguments))
    refuse_secrets({"options": overrides})  # they are saved in duel.json
    given, recorded, sources = prepared(given)
    parser = make_parser(JUDGES)
    try:
        options = parser.parse_args(given)
    except UsageError as error:
        named = next((value for option, value in options_of(given) if option == "--judge"), "")
        raise UsageError(explain(str(error), given, (), {"judge": class_named(named)})) from error
    _check(options)
    judge: Any = recorded
    config: Any = {"rewards": recorded}
    identity = ""
    if recorded is None:
        judge, config = chosen_judge(parser, options, sources, options.judge_name)
        identity = judge_identity(config)
        if not isinstance(judge, HoldsModels):  # a wrong key is found before anything is sampled
            judge.setup(device_of(options.device))
    cache = Path(options.cache_dir)
    sampling = Sampling(tuple(map(Path, options.config)), tuple(overrides), options.seed, cache / "samples")
    console = Console(width=None if sys.stdout.isatty() else 120)
    job = Job(options, sampling, judge, config, identity, VerdictCache(cache / "verdicts"), console)
    name = str(recorded if recorded is not None else judge.name)
    folder = Path(options.output or Path("runs/duel") / _folder_name(options, name, identity))
    label = f"{RECORDED}{name}" if recorded is not None else f"{name} ({_described(config)})"
    {"curve": _curve, "ladder": _ladder, "duel": _duel}[_kind(options)](job, options.policies, folder, label)


def _duel(job: Job, names: Sequence[str], folder: Path, judge: str) -> None:
    policies = [find_policy(name) for name in names]
    results, _, about = job.duels(policies, job.predictions(policies))
    result = results[0, 1]
    job.console.print(written.duel_table(result, names[0], names[1], judge))
    job.save(folder, {"policies": about, "duels": [written.plain(result, *_labels(names))]})


def _ladder(job: Job, names: Sequence[str], folder: Path, judge: str) -> None:
    policies = [find_policy(name) for name in names]
    results, shares_nKK, about = job.duels(policies, job.predictions(policies))
    ratings = ladder(shares_nKK, draws=job.options.draws, seed=job.options.seed).ratings
    K, labels = len(names), _labels(names)
    rates = [[0.5] * K for _ in range(K)]
    for (i, j), result in results.items():
        rates[i][j], rates[j][i] = result.win_rate.mean, 1 - result.win_rate.mean
    job.console.print(written.ladder_table(labels, ratings, np.array(rates)))
    elo = [{"name": name, "elo": written.plain_interval(r)} for name, r in zip(labels, ratings, strict=True)]
    pairs = [written.plain(result, labels[i], labels[j]) for (i, j), result in results.items()]
    job.save(folder, {"policies": about, "ladder": elo, "duels": pairs})


def _curve(job: Job, names: Sequence[str], folder: Path, judge: str) -> None:
    first, second = (by_step(Path(name)) for name in names)
    steps = sorted(first.keys() & second.keys())
    if not steps:
        raise ValueError(
            f"{names[0]} has the steps {sorted(first)} and {names[1]} {sorted(second)}: none is in both. Export both "
            "runs at the same steps (--export_every_n_steps)."
        )
    if alone := sorted(first.keys() ^ second.keys()):
        job.console.print(written.shown(f"left out, for only one run has them: the steps {alone}"))
    results, about = {}, []
    paths = {step: job.predictions([first[step], second[step]]) for step in steps}  # all, before a judge is loaded
    for step in steps:
        found, _, files = job.duels([first[step], second[step]], paths[step])
        results[step] = found[0, 1]
        about.append({"step": step, "policies": files})
    folder.mkdir(parents=True, exist_ok=True)
    job.console.print(written.curve_table(results))
    written.save_curve(results, folder / "curve.png", f"judge: {judge}")
    curve = [{"step": step, **written.plain(result, *_labels(names))} for step, result in results.items()]
    job.save(folder, {"policies": about, "curve": curve})


def _described(judge: Any) -> str:
    """`LocalJudge of packaged:smollm2-135m-instruct`."""
    kind, model = judge["class_path"].rpartition(".")[2], (judge.get("init_args") or {}).get("model")
    return kind + (f" of {model}" if model else "")


def _kind(options: Any) -> Literal["curve", "ladder", "duel"]:
    return "curve" if options.curve else "ladder" if options.ladder else "duel"


def _check(options: Any) -> None:
    number = len(options.policies)
    if options.curve and options.ladder:
        raise ValueError("--curve and --ladder are two commands. Give one of them.")
    if number < 2 or (number > 2 and not options.ladder):
        raise ValueError(f"{number} policies are named: a duel and a curve take 2, --ladder takes 2 or more.")
    for name, least in (("draws", 100), ("prompts_per_call", 1)):
        if options[name] < least:
            raise ValueError(f"--{name}={options[name]} must be at least {least}. Leave it out.")


def _split(arguments: list[str]) -> tuple[list[str], list[str]]:
    """What stands before and behind ``--``."""
    place = arguments.index("--") if "--" in arguments else len(arguments)
    return arguments[:place], arguments[place + 1 :]


def _labels(names: Sequence[str]) -> list[str]:
    """``names``, each told from the others.

    >>> _labels(["a", "b", "a"])
    ['a', 'b', 'a (2)']
    """
    counts = [names[: k + 1].count(name) for k, name in enumerate(names)]
    return [name if count == 1 else f"{name} ({count})" for name, count in zip(names, counts, strict=True)]


def _folder_name(options: Any, judge: str, identity: str) -> str:
    """Of the policies' last two parts and the judge, and a digest of all that tells this duel from others."""
    parts = ["-".join(part for part in Path(name).parts[-2:] if part != "/") for name in options.policies]
    text = f"{'' if _kind(options) == 'duel' else _kind(options) + '-'}{'-vs-'.join(parts[:4])}-by-{judge}"
    compared = digest([_kind(options), list(options.policies), judge, identity])
    return re.sub(r"[^\w.-]+", "_", text)[:110] + f"-{compared[:8]}"

"""Would the tests notice? Breaks one place of the code at a time, runs the tests that execute it, prints what survived.

    python scripts/mutate.py map                          which test executes which line: once for a state of the code
    python scripts/mutate.py run --seed 1 --results FILE  25 places; goes on where FILE ends, and prints the table

Operators: `comparison` (< and <=, == and !=, …), `off_by_one` (an integer ± 1), `sign` (+ and −, −x and x), `call` (a
call whose value nobody reads is left out), `arguments` (the first two are swapped), `return` (zeros, the empty or the
opposite of what is returned). A place is drawn in two steps: a line that tests execute, then what can be broken on it.
All happens in copies of the tree. Tests that are marked slow are left out; the quickest run first, up to the first that
fails. What code does only in other processes is not seen by `map`, hence not drawn.
"""

import argparse
import hashlib
import json
import os
import queue
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from xml.etree import ElementTree

import coverage
from mutants import Lines, Place, broken, draw, places

PACKAGE = "gopo_lightning"
TARGETS = (
    "types",
    "objectives",
    "policy/logprobs",
    "policy/lm_head",
    "rewards",
    "rollout",
    "training/gopo_module",
    "training/update",
    "training/forward",
    "training/micro_batches",
)
"""Modules and folders of the package."""
MAP = Path(".mutation-map.json")
SLACK_SECONDS = 120.0
"""A mutant may take three times what its tests took, and this; beyond it hangs."""


@dataclass(frozen=True)
class Result:
    """A mutant: caught (by which test), survived, or timeout."""

    seed: int
    tree: str
    file: str
    line: int
    operator: str
    before: str
    after: str
    outcome: str
    by: str
    num_tests: int
    seconds: float


# ------------------------------------------------------------------------------ which test executes which line


def tracked(root: Path) -> list[Path]:
    """The files of the tree, relative."""
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=root, capture_output=True, check=True, text=True).stdout
    return [Path(name) for name in listed.split("\0") if name and (root / name).is_file()]


def tree_of(root: Path) -> str:
    """A digest of all Python files."""
    digest = hashlib.sha256()
    for path in sorted(path for path in tracked(root) if path.suffix == ".py"):
        digest.update(str(path).encode() + (root / path).read_bytes())
    return digest.hexdigest()[:12]


def copy(root: Path, target: Path) -> None:
    """The tracked files."""
    for path in tracked(root):
        (target / path).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(root / path, target / path)


def make_map(root: Path, package: str, tests: Sequence[str], output: Path) -> None:
    """Run ``tests`` once under coverage, and write lines and seconds; tests that fail are left out.

    Raises:
        ValueError: no test passed.
    """
    with tempfile.TemporaryDirectory() as folder:
        tree = Path(folder) / "tree"
        copy(root, tree)
        settings = Path(folder) / "rc"
        settings.write_text(f"[run]\nsource={package}\ndata_file={folder}/data\n")
        report = Path(folder) / "report.xml"
        command = ["coverage", "run", f"--rcfile={settings}", "-m", "pytest", *_OPTIONS, f"--junitxml={report}"]
        environment = _environment(tree)
        environment["PYTHONPATH"] += f"{os.pathsep}{Path(__file__).parent}"
        plugin = ["-p", "mutation_contexts"]
        subprocess.run([sys.executable, "-m", *command, *plugin, *tests], cwd=tree, env=environment)
        seconds = _passed(report) if report.exists() else {}
        if not seconds:
            raise ValueError(f"no test of {list(tests)} passed in {root}; run them with pytest and mend them first")
        data = coverage.Coverage(data_file=f"{folder}/data", config_file=False).get_data()
        data.read()
        lines = {
            str(Path(file).relative_to(tree)): _lines(data.contexts_by_lineno(file), seconds)
            for file in data.measured_files()
        }
    output.write_text(json.dumps({"tree": tree_of(root), "seconds": seconds, "lines": lines}, indent=1))


_OPTIONS = ("-q", "-p", "no:cacheprovider", "-m", "not slow", "--durations=0")


def _environment(tree: Path) -> dict[str, str]:
    """One thread a process; under ``CI`` hypothesis draws the same examples each time and has no deadlines."""
    return os.environ | {"PYTHONPATH": str(tree), "OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1", "CI": "1"}


def _passed(report: Path) -> dict[str, float]:
    """Test function, as pytest takes it → seconds of all its cases; without those of which a case failed."""
    seconds: dict[str, float] = {}
    failed = set()
    for case in ElementTree.parse(report).iter("testcase"):
        test = _test(f"{case.get('classname')}.{(case.get('name') or '').partition('[')[0]}")
        seconds[test] = seconds.get(test, 0.0) + float(case.get("time") or 0)
        if any(case.find(kind) is not None for kind in ("failure", "error")):
            failed.add(test)
    return {test: value for test, value in seconds.items() if test not in failed}


def _test(context: str) -> str:
    """tests.test_a.test_b → tests/test_a.py::test_b"""
    parts = context.split(".")
    split = next((n for n, part in enumerate(parts, 1) if part.startswith("test_")), len(parts))
    return "::".join([f"{'/'.join(parts[:split])}.py", *parts[split:]])


def _lines(contexts: Mapping[int, Sequence[str]], seconds: Mapping[str, float]) -> Lines:
    """A line that runs at import or in a fixture is that of every test of the file."""
    by_line = {line: [test for test in names if test in seconds] for line, names in contexts.items()}
    everyone = sorted({test for tests in by_line.values() for test in tests})
    return {0: everyone} | {line: sorted(tests) or everyone for line, tests in by_line.items()}


def read_map(path: Path, root: Path) -> tuple[dict[str, Lines], dict[str, float]]:
    """Lines and seconds.

    Raises:
        ValueError: there is none, or it is of another state of the code.
    """
    if not path.exists():
        raise ValueError(f"there is no {path}; make it with `python scripts/mutate.py map`")
    content = json.loads(path.read_text())
    if content["tree"] != tree_of(root):
        raise ValueError(f"{path} is of another state of the code; make it anew with `python scripts/mutate.py map`")
    lines = {file: {int(line): tests for line, tests in of.items()} for file, of in content["lines"].items()}
    return lines, content["seconds"]


# ------------------------------------------------------------------------------ mutants


def try_place(tree: Path, place: Place, tests: Sequence[str], limit_seconds: float) -> tuple[str, str]:
    """(outcome, by which test) of breaking ``place`` in the copy ``tree``, which is whole again afterwards."""
    path = tree / place.file
    source = path.read_text(encoding="utf-8")
    path.write_text(broken(source, place), encoding="utf-8")
    command = [sys.executable, "-m", "pytest", "-x", *_OPTIONS, *tests]
    try:
        with subprocess.Popen(
            command,
            cwd=tree,
            env=_environment(tree),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        ) as process:
            try:
                text, _ = process.communicate(timeout=limit_seconds)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)  # with what the tests have started
                return "timeout", ""
    finally:
        path.write_text(source, encoding="utf-8")
    if process.returncode == 0:
        return "survived", ""
    failed = re.search(r"^(?:FAILED|ERROR) (\S+)", text, re.MULTILINE)
    return "caught", failed[1] if failed else text.strip().splitlines()[-1][:200]


def run(root: Path, package: str, targets: Sequence[str], map_path: Path, results: Path, seed: int, count: int) -> None:
    """Try the places of ``seed`` that ``results`` does not hold, two at a time, and append what came out."""
    lines, seconds = read_map(map_path, root)
    files = files_of(targets, root, package, lines)
    candidates = [place for file in files for place in places(file, (root / file).read_text(encoding="utf-8"))]
    drawn, tree = draw(candidates, lines, seed, count), tree_of(root)
    done = [row for row in read(results) if row.seed == seed]
    if strange := [row for row in done if row.tree != tree]:
        raise ValueError(f"{results} holds {len(strange)} results of seed {seed} of other code; name another file")
    known = {(row.file, row.line, row.operator, row.before, row.after) for row in done}
    todo = [p for p in drawn if (p.file, p.line, p.operator, p.before, p.after) not in known]
    print(f"seed {seed}: {len(drawn)} places of {len(candidates)}, {len(todo)} to try", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        copies: queue.Queue[Path] = queue.Queue()
        for number in range(2):
            copy(root, Path(folder) / str(number))
            copies.put(Path(folder) / str(number))

        def work(place: Place) -> None:
            of_file = lines[place.file]
            tests = sorted(of_file.get(place.line) or of_file[place.statement], key=lambda test: seconds[test])
            copied, start = copies.get(), time.monotonic()
            limit = SLACK_SECONDS + 3 * sum(seconds[test] for test in tests)
            outcome, by = try_place(copied, place, tests, limit) if tests else ("survived", "")
            copies.put(copied)
            spent = round(time.monotonic() - start, 1)
            shown = (place.file, place.line, place.operator, place.before, place.after)
            row = Result(seed, tree, *shown, outcome, by, len(tests), spent)
            with results.open("a") as file:
                file.write(json.dumps(asdict(row)) + "\n")
            print(f"{outcome:9}{place.file}:{place.line} {place.operator}  ({spent} s)", flush=True)

        with ThreadPoolExecutor(2) as pool:
            list(pool.map(work, todo))


def files_of(targets: Sequence[str], root: Path, package: str, files: Iterable[str]) -> list[str]:
    """Those of ``files`` that are a target, or in one; sorted.

    Raises:
        ValueError: a target is neither a module nor a folder of the package.
    """
    paths = {target: Path(package) / target for target in targets}
    for target, path in paths.items():
        if not ((root / path).is_dir() or (root / path).with_suffix(".py").is_file()):
            raise ValueError(f"{target} is neither a module nor a folder of {package}; name one, as policy/lm_head")
    return [file for file in sorted(files) if any(Path(file).with_suffix("").is_relative_to(p) for p in paths.values())]


def read(results: Path) -> list[Result]:
    """What ``results`` holds."""
    return [Result(**json.loads(line)) for line in results.read_text().split("\n") if line] if results.exists() else []


def table(rows: Sequence[Result]) -> str:
    """In markdown, the survivors first, and a sum."""
    lines = ["| place | operator | before | after | outcome |", "|---|---|---|---|---|"]
    for row in sorted(rows, key=lambda row: (row.outcome != "survived", row.file, row.line)):
        cells = [" ".join(text.split())[:60].replace("|", "\\|") for text in (row.before, row.after)]
        outcome = f"caught by {row.by}" if row.outcome == "caught" else row.outcome
        lines.append(f"| {row.file}:{row.line} | {row.operator} | `{cells[0]}` | `{cells[1]}` | {outcome} |")
    caught = sum(row.outcome != "survived" for row in rows)
    return "\n".join([*lines, "", f"{caught} of {len(rows)} were noticed (a test failed, or did not end)."])


def main(arguments: Sequence[str] | None = None) -> None:
    """See the top of the file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("action", choices=["map", "run"])
    parser.add_argument("--seed", type=int, default=random.SystemRandom().randrange(10**6), help="of the draw")
    parser.add_argument("--count", type=int, default=25, help="places")
    parser.add_argument("--results", type=Path, default=Path("mutants.jsonl"), help="JSON lines, one a mutant")
    parser.add_argument("--map", type=Path, default=MAP, help="what `map` writes and `run` reads")
    parser.add_argument("--tests", nargs="+", default=["tests"], help="of `map`: files, or all")
    parser.add_argument("--targets", nargs="+", default=list(TARGETS), help="modules or folders of the package")
    parser.add_argument("--root", type=Path, default=Path(__file__).parents[1], help="of the repository")
    parser.add_argument("--package", default=PACKAGE)
    options = parser.parse_args(arguments)
    if options.action == "map":
        make_map(options.root, options.package, options.tests, options.map)
        return
    run(options.root, options.package, options.targets, options.map, options.results, options.seed, options.count)
    print(table([row for row in read(options.results) if row.seed == options.seed]))


if __name__ == "__main__":
    main()

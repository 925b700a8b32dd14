"""The mutation check on a package of its own: what it breaks, what it notices, how it goes on."""

import importlib
import json
import subprocess
from pathlib import Path
from typing import Any

import pytest

SOURCE = '''import math


def clipped(x: float, limit: int = 3) -> float:
    """The nearest to x that is not beyond limit."""
    assert limit > 0, f"{limit - 1} is too small"
    return min(x, limit)


def halves(values: list[float]) -> list[float]:
    """Half of each."""
    found = []
    for value in values:
        found.append(value / 2)
    return found


def unused() -> int:
    return 1 - 2
'''
TESTS = """import pytest
from hypothesis import given
from hypothesis import strategies as st

from toy.maths import clipped, halves


@pytest.fixture(scope="module")
def limit() -> float:
    return clipped(9.0)


@given(st.floats(-9, 3))
def test_small_values_stay(limit: float, x: float) -> None:
    assert clipped(x) == x


def test_clipped() -> None:
    assert clipped(5.0) == 3 and clipped(2.0) == 2


def test_halves() -> None:
    assert halves([2.0, 4.0]) == [1.0, 2.0]


def test_that_fails() -> None:
    assert clipped(1.0) == 7
"""


@pytest.fixture
def scripts(monkeypatch: pytest.MonkeyPatch) -> Any:
    """`mutate` and `mutants`, as modules."""
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "scripts"))
    return importlib.import_module("mutate"), importlib.import_module("mutants")


@pytest.fixture
def toy(tmp_path: Path) -> Path:
    """A repository with a package and its tests."""
    root = tmp_path / "repository"
    for name, text in {
        "toy/__init__.py": "",
        "tests/__init__.py": "",
        "toy/maths.py": SOURCE,
        "tests/test_maths.py": TESTS,
    }.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    subprocess.run(["git", "init", "-q"], cwd=root, check=True)
    subprocess.run(["git", "add", "-A"], cwd=root, check=True)
    return root


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("a < b", {("comparison", "a <= b")}),
        ("x[0] is None", {("comparison", "x[0] is not None"), ("off_by_one", "1"), ("off_by_one", "-1")}),
        ("-x + y", {("sign", "(x)"), ("sign", "-x - y")}),
        ("x += y", {("sign", "x -= y")}),
        ("'a' + b", set()),
        ("f(a, b, c)", {("call", "pass"), ("arguments", "f(b, a, c)")}),
        ("f(a, a)", {("call", "pass")}),
        ("f(*a, b)", {("call", "pass")}),
        ("x = True", set()),
        ("x: Literal[1] = y", set()),
        ("def f() -> bool:\n    return g()", {("return", "return True"), ("return", "return False")}),
        ("def f() -> list[int]:\n    return g()", {("return", "return []")}),
        ("def f() -> Tensor:\n    return g()", {("return", "return torch.zeros_like(g())")}),
        ("def f():\n    return None", set()),
        ("def f() -> dict[str, int]:\n    return {}", set()),
        ("f'{a + 1}'", set()),
    ],
)
def test_what_can_be_broken(source: str, expected: set[tuple[str, str]], scripts: Any) -> None:
    assert {(place.operator, place.after) for place in scripts[1].places("a.py", source)} == expected


def test_a_place_is_replaced_where_it_stands(scripts: Any) -> None:
    source = "é = 'é', a < b\nc = (a\n     < b)\n"
    first, second = (p for p in scripts[1].places("a.py", source) if p.operator == "comparison")
    assert scripts[1].broken(source, first) == "é = 'é', a <= b\nc = (a\n     < b)\n"
    assert scripts[1].broken(source, second) == "é = 'é', a < b\nc = (a <= b)\n"


def test_only_executed_lines_are_drawn_and_a_seed_draws_the_same(scripts: Any) -> None:
    found = scripts[1].places("toy/maths.py", SOURCE)
    lines = {"toy/maths.py": {0: ["t"], 7: ["t"], 14: ["t"]}}
    drawn = scripts[1].draw(found, lines, seed=1, count=25)
    assert sorted(place.line for place in drawn) == [7, 14]
    assert drawn == scripts[1].draw(found, lines, seed=1, count=25)


def test_what_is_broken_by_default_is_there(scripts: Any) -> None:
    root = Path(__file__).parents[1]
    sources = [str(path.relative_to(root)) for path in (root / "gopo_lightning").rglob("*.py")]
    drawn_from = scripts[0].files_of(scripts[0].TARGETS, root, "gopo_lightning", sources)
    assert {"gopo_lightning/types.py", "gopo_lightning/objectives/advantages/ranks.py"} <= set(drawn_from)
    assert not {"gopo_lightning/policy/model.py", "gopo_lightning/training/schedules.py"} & set(drawn_from)


def test_a_target_that_is_not_there_is_refused(toy: Path, scripts: Any) -> None:
    assert scripts[0].files_of(["maths"], toy, "toy", ["toy/maths.py", "toy/maths_too.py"]) == ["toy/maths.py"]
    with pytest.raises(ValueError, match="losses is neither a module nor a folder of toy"):
        scripts[0].files_of(["losses"], toy, "toy", ["toy/maths.py"])


def test_mutants_are_tried_once_and_survivors_are_named(
    toy: Path, scripts: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    mutate, results = scripts[0], tmp_path / "results.jsonl"
    shared = ["--root", str(toy), "--package", "toy", "--map", str(tmp_path / "map.json")]
    run = ["run", *shared, "--targets", "maths", "--seed", "1", "--results", str(results)]
    with pytest.raises(ValueError, match="make it with"):
        mutate.main(run)
    mutate.main(["map", *shared])
    lines, seconds = mutate.read_map(tmp_path / "map.json", toy)
    names = {f"tests/test_maths.py::test_{name}" for name in ("clipped", "halves", "small_values_stay")}
    assert set(seconds) == names
    assert set(lines["toy/maths.py"][7]) == names - {"tests/test_maths.py::test_halves"}  # Hypothesis is seen
    assert lines["toy/maths.py"][14] == ["tests/test_maths.py::test_halves"]
    assert set(lines["toy/maths.py"][4]) == set(seconds)  # the default of an argument, at import
    assert 19 not in lines["toy/maths.py"]

    mutate.main([*run, "--count", "2"])
    assert len(results.read_text().splitlines()) == 2
    mutate.main(run)
    rows = [json.loads(line) for line in results.read_text().splitlines()]
    assert len(rows) == 6 and {row["line"] for row in rows} == {4, 6, 7, 14, 15} | {row["line"] for row in rows[:2]}
    outcome = {row["line"]: row["outcome"] for row in rows}
    assert outcome[14] == outcome[7] == "caught" and outcome[6] == "survived"  # nobody tests the limit of the limit
    assert {row["by"].partition("[")[0] for row in rows if row["outcome"] == "caught"} <= set(seconds)
    assert (toy / "toy" / "maths.py").read_text() == SOURCE
    assert "of 6 were noticed" in capsys.readouterr().out

    (toy / "toy" / "maths.py").write_text(SOURCE + "\n")
    with pytest.raises(ValueError, match="another state of the code"):
        mutate.main(run)


def test_a_mutant_without_end_is_a_timeout(toy: Path, scripts: Any) -> None:
    place = scripts[1].Place("toy/maths.py", 14, 14, SOURCE.index("found.append"), "call", "found", "while True: found")
    outcome = scripts[0].try_place(toy, place, ["tests/test_maths.py::test_halves"], limit_seconds=5)
    assert outcome == ("timeout", "") and (toy / "toy" / "maths.py").read_text() == SOURCE

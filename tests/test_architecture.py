"""The packages in their order: each imports only from those before it, and no file grows too large to read."""

import ast
import re
import sys
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "gopo_lightning"
FILES = sorted(PACKAGE.rglob("*.py"))
MAX_LINES = 300
LARGER = {"training/gopo_module.py": 400}  # the wiring

PARTS = [
    "_compat",
    "types",
    "objectives",
    "data",
    "distributed",
    "policy",
    "human",
    "rewards",
    "rollout",
    "training",
    "evaluation",
    "commands",
    "integrations",
]
"""A part is a module or a folder of the package. It may import from itself and from what stands before it."""
ASIDE = {"integrations": {"integrations", "_compat", "types", "objectives", "rewards"}}
"""No other part imports these; each may import only from the parts named."""
ENTRANCES = {"__init__", "__main__"}
"""They open onto every part, and no part imports from them."""
PURE = ["types.py", "objectives", "rewards/metrics.py"]
"""Maths and data: nothing but torch and the standard library."""


def part_of(file: Path) -> str:
    """``rewards`` for gopo_lightning/rewards/base.py, ``types`` for gopo_lightning/types.py."""
    return file.relative_to(PACKAGE).with_suffix("").parts[0]


def imports(tree: ast.AST) -> Iterator[str]:
    """Dotted names that are imported anywhere in ``tree``, inside functions and `if TYPE_CHECKING` too."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: relative import; name the package"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def imported_parts(tree: ast.AST) -> set[str]:
    """Second parts of the package's names: `gopo_lightning.rewards.base.score` gives ``rewards``."""
    return {name.split(".")[1] for name in imports(tree) if name.startswith(f"{PACKAGE.name}.")}


def violations(part: str, tree: ast.AST) -> set[str]:
    """What ``part`` may not import, but does."""
    return imported_parts(tree) - ASIDE.get(part, set(PARTS[: PARTS.index(part) + 1]) - ASIDE.keys())


def name_of(file: Path) -> str:
    return str(file.relative_to(PACKAGE))


def is_pure(file: Path) -> bool:
    return any(file.is_relative_to(PACKAGE / path) for path in PURE)


def file_graph() -> dict[str, set[str]]:
    """Which file imports which, by dotted names; a package's name stands for its `__init__`."""
    modules = {".".join(("gopo_lightning", *file.relative_to(PACKAGE).with_suffix("").parts)): file for file in FILES}
    named = {name.removesuffix(".__init__"): file for name, file in modules.items()}
    graph: dict[str, set[str]] = {}
    for name, file in named.items():
        targets = set(imports(ast.parse(file.read_text())))
        found = {t if t in named else t.rpartition(".")[0] for t in targets if t.startswith("gopo_lightning")}
        graph[name] = (found & named.keys()) - {name}
    return graph


def test_every_file_has_its_place() -> None:
    unknown = {part_of(file) for file in FILES} - set(PARTS) - ENTRANCES
    assert not unknown, f"add {unknown} to PARTS, where it belongs in the order"


@pytest.mark.parametrize("file", [f for f in FILES if part_of(f) in PARTS], ids=name_of)
def test_a_part_imports_only_from_those_before_it(file: Path) -> None:
    later = violations(part_of(file), ast.parse(file.read_text()))
    assert not later, f"{name_of(file)} imports from {later}, which are not before {part_of(file)!r}"


def test_no_file_imports_itself_by_a_detour() -> None:
    try:
        TopologicalSorter(file_graph()).prepare()
    except CycleError as error:
        pytest.fail(f"a circle of imports: {' → '.join(error.args[1])}")


@pytest.mark.parametrize("file", [f for f in FILES if is_pure(f)], ids=name_of)
def test_pure_files_need_only_torch(file: Path) -> None:
    allowed = {"torch", "typing_extensions", PACKAGE.name}
    others = {name.split(".")[0] for name in imports(ast.parse(file.read_text()))} - allowed
    assert others <= sys.stdlib_module_names


def private_names(tree: ast.AST) -> Iterator[str]:
    """Names with one underscore that ``tree`` takes from another module, or reads or sets of an object but `self`."""
    for name in imports(tree):
        if not name.startswith(f"{PACKAGE.name}.") and re.search(r"(\A|\.)_\w", name):
            yield name
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and ast.unparse(node.value) not in ("self", "cls"):
            yield from [node.attr] if re.match(r"_[a-z]", node.attr) else []
        elif isinstance(node, ast.Call) and ast.unparse(node.func) in ("getattr", "setattr", "hasattr"):
            yield from re.findall(r"\A'(_[a-z]\w*)'", ast.unparse(node.args[1]))


@pytest.mark.parametrize("file", [f for f in FILES if part_of(f) != "_compat"], ids=name_of)
def test_private_names_of_libraries_are_those_of_compat(file: Path) -> None:
    names = set(private_names(ast.parse(file.read_text())))
    assert not names, f"{name_of(file)} uses {names}: take public ones, or add to _compat with a probe"


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("trainer._connector.x", {"_connector"}),
        ("module._parameters[name] = 1", {"_parameters"}),
        ("getattr(model, '_no_split_modules', None)", {"_no_split_modules"}),
        ("from torch.utils._pytree import tree_map", {"torch.utils._pytree.tree_map"}),
        ("from torch.nn.modules.dropout import _DropoutNd", {"torch.nn.modules.dropout._DropoutNd"}),
        ("self._x = cls._y", set()),
        ("x.__dict__", set()),
    ],
)
def test_the_check_of_private_names(source: str, expected: set[str]) -> None:
    assert set(private_names(ast.parse(source))) == expected


@pytest.mark.parametrize("file", FILES, ids=name_of)
def test_no_file_is_too_long_to_read(file: Path) -> None:
    lines = len(file.read_text().splitlines())
    assert lines <= LARGER.get(name_of(file), MAX_LINES), f"{name_of(file)} has {lines} lines; split it at a seam"


@pytest.mark.parametrize(
    ("part", "source", "expected"),
    [
        ("objectives", "from gopo_lightning.types import Experience", set()),
        ("objectives", "from gopo_lightning import policy", {"policy"}),
        ("objectives", "def f():\n    import gopo_lightning.rewards.base", {"rewards"}),
        ("rollout", "from gopo_lightning.rollout.engines.base import RolloutEngine", set()),
        ("rollout", "if TYPE_CHECKING:\n    from gopo_lightning.training.gopo_module import M", {"training"}),
        ("integrations", "from gopo_lightning import rewards, training", {"training"}),
        ("commands", "from gopo_lightning import integrations", {"integrations"}),
        ("commands", "from gopo_lightning import GOPOModule", {"GOPOModule"}),  # by the entrance, not by its part
    ],
)
def test_the_check_itself(part: str, source: str, expected: set[str]) -> None:
    assert violations(part, ast.parse(source)) == expected

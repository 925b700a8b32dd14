"""The rooms of the package: each imports only from those before it, and none grows too large to read."""

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "gopo_lightning"
FILES = sorted(PACKAGE.rglob("*.py"))
MAX_LINES = 300
LARGER = {"module.py": 400}  # a third of it documents the options that users set

ROOMS = [
    "structs",
    "json_lines",
    "distributed",
    "security",
    "aside",
    "export_folder",
    "run_folder",
    "advantages",
    "losses",
    "metrics",
    "assets",
    "pretrained",
    "adapters",
    "shared_prefix",
    "layers",
    "positions",
    "batching",
    "logprobs",
    "prefix_sharing",
    "policy",
    "sharding",
    "gathering",
    "shardwise",
    "checkpoints",
    "resume",
    "schedules",
    "optimisation",
    "strategies",
    "rewards",
    "placement",
    "rollout",
    "checks",
    "data",
    "callbacks",
    "reward_model",
    "evaluation",
    "curves",
    "module",
    "usage",
    "cli",
]
"""A room is a module or a folder of the package. It may import from itself and from what stands before it."""
ENTRANCES = {"__init__", "__main__"}
"""They open onto every room, and no room imports from them."""
PURE = {"structs", "advantages", "losses", "metrics"}
"""Maths and data: nothing but torch and the standard library."""


def room_of(file: Path) -> str:
    """``rewards`` for gopo_lightning/rewards/base.py, ``losses`` for gopo_lightning/losses.py."""
    return file.relative_to(PACKAGE).with_suffix("").parts[0]


def is_type_checking(node: ast.AST) -> bool:
    """Whether ``node`` is `if TYPE_CHECKING:`, whose imports never happen."""
    return isinstance(node, ast.If) and ast.unparse(node.test) in ("TYPE_CHECKING", "typing.TYPE_CHECKING")


def imports(node: ast.AST) -> Iterator[str]:
    """Dotted names that are imported anywhere under ``node``, inside functions too."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.Import):
            yield from (alias.name for alias in child.names)
        elif isinstance(child, ast.ImportFrom):
            assert child.level == 0, f"line {child.lineno}: relative import; name the room"
            yield from (f"{child.module}.{alias.name}" for alias in child.names)
        elif is_type_checking(child):
            yield from (name for other in child.orelse for name in imports(other))  # type: ignore[attr-defined]
        else:
            yield from imports(child)


def imported_rooms(tree: ast.AST) -> set[str]:
    """Second parts of the package's names: `gopo_lightning.rewards.base.score` gives ``rewards``."""
    return {name.split(".")[1] for name in imports(tree) if name.startswith(f"{PACKAGE.name}.")}


def violations(room: str, tree: ast.AST) -> set[str]:
    """What ``room`` may not import, but does."""
    return imported_rooms(tree) - set(ROOMS[: ROOMS.index(room) + 1])


def name_of(file: Path) -> str:
    return str(file.relative_to(PACKAGE))


def test_every_file_has_a_room() -> None:
    unknown = {room_of(file) for file in FILES} - set(ROOMS) - ENTRANCES
    assert not unknown, f"add {unknown} to ROOMS, where it belongs in the order"


@pytest.mark.parametrize("file", [f for f in FILES if room_of(f) in ROOMS], ids=name_of)
def test_a_room_imports_only_from_the_rooms_before_it(file: Path) -> None:
    later = violations(room_of(file), ast.parse(file.read_text()))
    assert not later, f"{name_of(file)} imports from {later}, which are not before {room_of(file)!r}"


@pytest.mark.parametrize("file", [f for f in FILES if room_of(f) in PURE], ids=name_of)
def test_pure_rooms_need_only_torch(file: Path) -> None:
    allowed = {"torch", "typing_extensions", PACKAGE.name}
    others = {name.split(".")[0] for name in imports(ast.parse(file.read_text()))} - allowed
    assert others <= sys.stdlib_module_names


@pytest.mark.parametrize("file", FILES, ids=name_of)
def test_no_file_is_too_long_to_read(file: Path) -> None:
    lines = len(file.read_text().splitlines())
    assert lines <= LARGER.get(name_of(file), MAX_LINES), f"{name_of(file)} has {lines} lines; split it at a seam"


@pytest.mark.parametrize(
    ("room", "source", "expected"),
    [
        ("losses", "from gopo_lightning.structs import Experience", set()),
        ("losses", "from gopo_lightning import policy", {"policy"}),
        ("losses", "def f():\n    import gopo_lightning.rewards.base", {"rewards"}),
        ("rollout", "from gopo_lightning.rollout.engine import RolloutEngine", set()),
        ("rollout", "if TYPE_CHECKING:\n    from gopo_lightning.module import GOPOModule", set()),
        ("cli", "from gopo_lightning import GOPOModule", {"GOPOModule"}),  # by the entrance, not by its room
    ],
)
def test_the_check_itself(room: str, source: str, expected: set[str]) -> None:
    assert violations(room, ast.parse(source)) == expected

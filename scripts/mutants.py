"""What can be broken in a module, one place at a time; the operators are listed at the top of `mutate.py`."""

import ast
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

Lines = dict[int, list[str]]
"""Line → tests that execute it; under 0 all that execute any line of the file."""


@dataclass(frozen=True)
class Place:
    """What can be broken: ``before`` at an offset of the file's bytes, and what stands there then."""

    file: str
    line: int
    statement: int
    """Line where its statement begins."""
    start: int
    operator: str
    before: str
    after: str


_OPPOSITE: dict[type[ast.AST], type[ast.AST]] = {
    ast.Lt: ast.LtE,
    ast.LtE: ast.Lt,
    ast.Gt: ast.GtE,
    ast.GtE: ast.Gt,
    ast.Eq: ast.NotEq,
    ast.NotEq: ast.Eq,
    ast.Is: ast.IsNot,
    ast.IsNot: ast.Is,
    ast.In: ast.NotIn,
    ast.NotIn: ast.In,
    ast.Add: ast.Sub,
    ast.Sub: ast.Add,
}
_EMPTY = {"bool": ("True", "False"), "int": ("0",), "float": ("0.0",), "str": ("''",), "list": ("[]",), "dict": ("{}",)}


def mutations(node: ast.AST, returns: str) -> Iterator[tuple[str, str]]:
    """(operator, new source) of what can be broken at ``node`` itself, in a function that is annotated ``returns``."""
    if isinstance(node, ast.Compare):
        ops = [_OPPOSITE[type(node.ops[0])](), *node.ops[1:]]
        yield "comparison", ast.unparse(ast.Compare(node.left, ops, node.comparators))
    elif isinstance(node, ast.Constant) and type(node.value) is int:
        yield from (("off_by_one", str(node.value + step)) for step in (1, -1))
    elif isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
        yield "sign", f"({ast.unparse(node.operand)})"
    elif isinstance(node, ast.BinOp | ast.AugAssign) and isinstance(node.op, ast.Add | ast.Sub):
        if isinstance(node, ast.AugAssign):
            yield "sign", ast.unparse(ast.AugAssign(node.target, _OPPOSITE[type(node.op)](), node.value))
        elif not any(map(_is_text, (node.left, node.right))):
            yield "sign", ast.unparse(ast.BinOp(node.left, _OPPOSITE[type(node.op)](), node.right))
    elif isinstance(node, ast.Expr) and isinstance(node.value, ast.Call):
        yield "call", "pass"
    elif isinstance(node, ast.Return) and node.value is not None and not isinstance(node.value, ast.Constant):
        value = ast.unparse(node.value)
        zeros = f"torch.zeros_like({value})" if returns == "Tensor" else "None"
        choices = _EMPTY.get(returns.partition("[")[0], (zeros,))
        yield from (("return", f"return {choice}") for choice in choices if choice != value)
    if isinstance(node, ast.Call) and len(node.args) >= 2:
        first, second, *rest = node.args
        if not isinstance(first, ast.Starred) and not isinstance(second, ast.Starred):
            swapped = ast.unparse(ast.Call(node.func, [second, first, *rest], node.keywords))
            if swapped != ast.unparse(node):
                yield "arguments", swapped


def _is_text(node: ast.AST) -> bool:
    return isinstance(node, ast.JoinedStr) or (isinstance(node, ast.Constant) and isinstance(node.value, str))


def places(file: str, source: str) -> list[Place]:
    """All of them in a module. Annotations and what stands in f-strings are left alone."""
    starts = [0]
    for line in source.splitlines(keepends=True):
        starts.append(starts[-1] + len(line.encode()))
    found: list[Place] = []

    def visit(node: ast.AST, statement: int, returns: str) -> None:
        if isinstance(node, ast.JoinedStr):
            return  # Python 3.11 does not know where its parts are
        if isinstance(node, ast.FunctionDef):
            returns = "" if node.returns is None else ast.unparse(node.returns)
        if isinstance(node, ast.stmt):
            statement = node.lineno
        if isinstance(node, ast.expr | ast.stmt):
            start = starts[node.lineno - 1] + node.col_offset
            end = starts[(node.end_lineno or node.lineno) - 1] + (node.end_col_offset or 0)
            before = source.encode()[start:end].decode()
            found.extend(
                Place(file, node.lineno, statement, start, operator, before, after)
                for operator, after in mutations(node, returns)
            )
        for name, value in ast.iter_fields(node):
            if name not in ("annotation", "returns"):
                for child in value if isinstance(value, list) else [value]:
                    if isinstance(child, ast.AST):
                        visit(child, statement, returns)

    visit(ast.parse(source), 0, "")
    return found


def broken(source: str, place: Place) -> str:
    """``source`` with ``place`` broken."""
    code = source.encode()
    end = place.start + len(place.before.encode())
    assert code[place.start : end].decode() == place.before
    return (code[: place.start] + place.after.encode() + code[end:]).decode()


def draw(candidates: Sequence[Place], lines: Mapping[str, Lines], seed: int, count: int) -> list[Place]:
    """``count`` places on different lines that tests execute."""
    by_line: dict[tuple[str, int], list[Place]] = {}
    for place in candidates:
        if place.line in lines.get(place.file, {}) or place.statement in lines.get(place.file, {}):
            by_line.setdefault((place.file, place.line), []).append(place)
    rng = random.Random(seed)
    chosen = rng.sample(sorted(by_line), min(count, len(by_line)))
    return [rng.choice(by_line[key]) for key in chosen]

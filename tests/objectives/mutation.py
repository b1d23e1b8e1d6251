"""Small mistakes planted one at a time in a module's syntax tree: an operator turned, a constant moved, and so on.

A mutant is (where it is, what was changed, the tree). Docstrings, type annotations and messages are left alone.
"""

from __future__ import annotations

import ast
import inspect
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import ModuleType

OPERATORS: dict[type, type] = {
    ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Div, ast.Div: ast.Mult, ast.BitAnd: ast.BitOr,
    ast.Lt: ast.GtE, ast.GtE: ast.Lt, ast.Gt: ast.LtE, ast.LtE: ast.Gt, ast.Eq: ast.NotEq, ast.NotEq: ast.Eq,
    ast.Is: ast.IsNot, ast.IsNot: ast.Is, ast.And: ast.Or, ast.Or: ast.And,
}  # fmt: skip
BOUNDARIES: dict[type, type] = {ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt}
NAMES = {
    "minimum": "maximum", "maximum": "minimum", "min": "max", "max": "min", "log": "log1p", "log1p": "log",
    "exp": "expm1", "expm1": "exp", "softmax": "log_softmax", "mean": "sum", "sum": "mean", "zeros_like": "ones_like",
    "new_zeros": "new_ones", "rsqrt": "sqrt", "logsigmoid": "sigmoid", "sigmoid": "logsigmoid", "unbind": "chunk",
}  # fmt: skip
DROPPED = {"detach", "float", "square", "clone"}
"""Methods without arguments that are left out."""

Change = Callable[[ast.AST], str | None]


@dataclass(frozen=True)
class Mutant:
    """One planted mistake."""

    place: str
    """`function: the changed line`."""
    tree: ast.Module


def _operator(node: ast.AST) -> str | None:
    if isinstance(node, ast.BinOp | ast.BoolOp) and type(node.op) in OPERATORS:
        node.op = OPERATORS[type(node.op)]()
        return "operator"
    if isinstance(node, ast.AugAssign) and type(node.op) in OPERATORS:
        node.op = OPERATORS[type(node.op)]()
        return "operator"
    if isinstance(node, ast.Compare) and type(node.ops[0]) in OPERATORS:
        node.ops[0] = OPERATORS[type(node.ops[0])]()
        return "comparison"
    return None


def _boundary(node: ast.AST) -> str | None:
    if isinstance(node, ast.Compare) and type(node.ops[0]) in BOUNDARIES:
        node.ops[0] = BOUNDARIES[type(node.ops[0])]()
        return "boundary"
    return None


def _sign(node: ast.AST) -> str | None:
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub | ast.Invert | ast.Not):
        node.op = ast.UAdd() if isinstance(node.op, ast.USub) else ast.Not()
        if isinstance(node.op, ast.Not):
            node.operand = ast.UnaryOp(ast.Not(), node.operand)
        return "sign"
    return None


def _constant(node: ast.AST) -> str | None:
    if not isinstance(node, ast.Constant) or not isinstance(node.value, bool | int | float):
        return None
    if isinstance(node.value, bool):
        node.value = not node.value
    elif isinstance(node.value, int):
        node.value += 1
    else:
        node.value = node.value * 1.25 + (node.value == 0)
    return "constant"


def _name(node: ast.AST) -> str | None:
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in NAMES:
        node.func.attr = NAMES[node.func.attr]
        return "name"
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in NAMES:
        node.func.id = NAMES[node.func.id]
        return "name"
    if isinstance(node, ast.keyword) and node.arg in ("min", "max"):
        node.arg = NAMES[node.arg]
        return "bound"
    return None


def _swap(node: ast.AST) -> str | None:
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "where":
        node.args[1], node.args[2] = node.args[2], node.args[1]
        return "where"
    if isinstance(node, ast.IfExp):
        node.body, node.orelse = node.orelse, node.body
        return "if"
    if isinstance(node, ast.If):
        node.test = ast.UnaryOp(ast.Not(), node.test)
        return "if"
    return None


def _drop(node: ast.AST) -> str | None:
    if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Attribute):
        return None
    if node.func.attr in DROPPED and not node.args:
        inner = node.func.value
        node.func, node.args = ast.Name("_same", ast.Load()), [inner]
        return "dropped"
    if node.func.attr in ("clamp", "where"):
        kept = node.func.value if node.func.attr == "clamp" and ast.unparse(node.func.value) != "torch" else None
        kept = kept or node.args[1 if node.func.attr == "where" else 0]
        node.func, node.args, node.keywords = ast.Name("_same", ast.Load()), [kept], []
        return "dropped"
    return None


CHANGES: tuple[Change, ...] = (_operator, _boundary, _sign, _constant, _name, _swap, _drop)


def _code(tree: ast.Module) -> Iterator[tuple[str, ast.AST]]:
    """(function, node) of all nodes inside functions, annotations and raised messages left out."""
    for function in ast.walk(tree):
        if not isinstance(function, ast.FunctionDef):
            continue
        defaults = [d for d in (*function.args.defaults, *function.args.kw_defaults) if d is not None]
        left = [*function.body, *defaults]
        while left:
            node = left.pop(0)
            if isinstance(node, ast.Raise | ast.FunctionDef):
                continue
            yield function.name, node
            left += [n for n in ast.iter_child_nodes(node) if not _is_annotation(node, n)]


def _is_annotation(parent: ast.AST, child: ast.AST) -> bool:
    return isinstance(parent, ast.AnnAssign) and child is parent.annotation


def mutants(module: ModuleType) -> Iterator[Mutant]:
    """Every mutant of every function of a module."""
    source = inspect.getsource(module)
    tree = ast.parse(source)
    nodes = list(_code(tree))
    for index, (function, original) in enumerate(_code(ast.parse(source))):
        for change in CHANGES:
            if (kind := change(nodes[index][1])) is None:
                continue
            before, after = (ast.unparse(node).split("\n")[0] for node in (original, nodes[index][1]))
            tree.body += ast.parse("def _same(x): return x").body
            yield Mutant(f"{function}: {kind}: {before} -> {after}", ast.fix_missing_locations(tree))
            tree = ast.parse(source)
            nodes = list(_code(tree))

"""The layer table of the design: imports go downward only, and torch stays above its line."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from rlhf_cli.catalog import STAGES

ROOT = Path(__file__).parents[1] / "rlhf_cli"
LEVELS = {
    "cli": 5,
    "stages": 4,
    "report": 4,
    "rollouts": 3,
    "train": 3,
    "models": 2,
    "data": 2,
    "runs": 2,
    "objectives": 1,
    "catalog": 0,
    "recipe": 0,
    "errors": 0,
}
BESIDE = {
    ("models", "data"),
    ("models", "runs"),
    ("stages", "report"),
    ("catalog", "errors"),
    ("recipe", "catalog"),
    ("recipe", "errors"),
}
"""Packages of one level that may import each other, in this direction."""
LIGHT = ("cli", "runs", "recipe", "report", "catalog", "errors")
"""Packages that import nothing heavy when they are imported."""
HEAVY = {"torch", "transformers", "peft", "datasets", "matplotlib", "bitsandbytes", "accelerate", "safetensors"}
SWITCHES = {"set_adapter", "disable_adapter", "disable_adapters", "enable_adapters", "disable_adapter_layers"}
FLAGS = {"disable_adapters"}
"""Of a layer this is a flag, which anyone may read; of a model it is called."""


@dataclass(frozen=True)
class Module:
    """A source file of the package."""

    path: Path
    tree: ast.Module

    @property
    def package(self) -> str:
        """The first name below rlhf_cli."""
        return self.path.relative_to(ROOT).with_suffix("").parts[0]

    @property
    def name(self) -> str:
        """The dotted name."""
        return ".".join(("rlhf_cli", *self.path.relative_to(ROOT).with_suffix("").parts))


MODULES = [Module(path, ast.parse(path.read_text(encoding="utf-8"))) for path in sorted(ROOT.rglob("*.py"))]
NAMED = [module for module in MODULES if module.package not in ("__init__", "__main__")]


def targets(tree: ast.AST) -> Iterator[str]:
    """Every module that is imported, wherever the import stands."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            yield node.module or ""
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def at_import(tree: ast.Module) -> ast.Module:
    """Only what runs when the module is imported: no function bodies, nothing for type checkers."""

    class Outer(ast.NodeTransformer):
        def visit_FunctionDef(self, node: ast.FunctionDef) -> None:
            return None

        def visit_AsyncFunctionDef(self, node: ast.AsyncFunctionDef) -> None:
            return None

        def visit_If(self, node: ast.If) -> ast.AST | None:
            checking = isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"
            return None if checking else self.generic_visit(node)

    copy = ast.parse(ast.unparse(tree))
    return Outer().visit(copy)


def ours(name: str) -> str:
    """The package below rlhf_cli that an import goes to, or an empty string."""
    parts = name.split(".")
    return parts[1] if parts[0] == "rlhf_cli" and len(parts) > 1 else ""


@pytest.mark.parametrize("module", NAMED, ids=lambda module: module.name)
def test_imports_go_downward(module: Module) -> None:
    assert module.package in LEVELS, "a package that the table does not know"
    for name in targets(module.tree):
        target = ours(name)
        if not target or target == module.package:
            continue
        down = LEVELS[target] < LEVELS[module.package]
        assert down or (module.package, target) in BESIDE, f"{module.name} imports {name}"


@pytest.mark.parametrize("module", [m for m in NAMED if m.package == "stages"], ids=lambda module: module.name)
def test_no_stage_is_imported_by_another(module: Module) -> None:
    commands = {f"rlhf_cli.{stage.path.split(':')[0]}" for stage in STAGES.values()} - {module.name}
    assert not commands & set(targets(module.tree))


@pytest.mark.parametrize("module", [m for m in NAMED if m.package == "objectives"], ids=lambda module: module.name)
def test_objectives_are_pure(module: Module) -> None:
    for name in targets(module.tree):
        top = name.split(".")[0]
        assert top == "torch" or top in sys.stdlib_module_names or ours(name) == "objectives", name


@pytest.mark.parametrize("module", MODULES, ids=lambda module: module.name)
def test_adapters_are_switched_in_one_place(module: Module) -> None:
    called = {id(node.func) for node in ast.walk(module.tree) if isinstance(node, ast.Call)}
    used = {
        node.attr for node in ast.walk(module.tree)
        if isinstance(node, ast.Attribute) and not (node.attr in FLAGS and id(node) not in called)
    } & SWITCHES  # fmt: skip
    assert not used or module.name == "rlhf_cli.models.roles", used


@pytest.mark.parametrize("module", [m for m in NAMED if m.package in LIGHT], ids=lambda module: module.name)
def test_nothing_heavy_at_import(module: Module) -> None:
    loaded = {name.split(".")[0] for name in targets(at_import(module.tree))}
    assert not loaded & HEAVY
    assert not {ours(name) for name in targets(at_import(module.tree))} & {"objectives", "models", "train", "stages"}


@pytest.mark.parametrize("module", MODULES, ids=lambda module: module.name)
def test_nothing_unsafe(module: Module) -> None:
    for node in ast.walk(module.tree):
        if isinstance(node, ast.ImportFrom):
            assert all(alias.name != "*" for alias in node.names)
        if isinstance(node, ast.keyword):
            assert not (node.arg == "trust_remote_code" and getattr(node.value, "value", None) is True)
    assert not {"pickle", "cPickle", "dill"} & {name.split(".")[0] for name in targets(module.tree)}
    dotted = {ast.unparse(node) for node in ast.walk(module.tree) if isinstance(node, ast.Attribute)}
    assert not {"yaml.load", "yaml.load_all", "yaml.unsafe_load"} & dotted


def test_the_checks_can_fail() -> None:
    tree = ast.parse(
        "import torch\nif TYPE_CHECKING:\n    import peft\ndef f():\n    from rlhf_cli.stages import sft\n"
    )
    assert set(targets(tree)) == {"torch", "peft", "rlhf_cli.stages", "rlhf_cli.stages.sft"}
    assert set(targets(at_import(tree))) == {"torch"}
    assert ours("rlhf_cli.stages.sft") == "stages"

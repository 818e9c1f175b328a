"""The house: each wing's face is light, imports go one way, and no module or function outgrows its reader."""

import ast
import subprocess
import sys

import pytest

from helpers.base import ROOT

HELPERS = ROOT / "helpers"
MODULES = sorted(HELPERS.rglob("*.py"))
WINGS = sorted(path.parent.name for path in HELPERS.glob("*/__init__.py"))
HEAVY = {"torch", "transformers", "datasets", "unsloth", "huggingface_hub", "matplotlib"}


def name_of(path):
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def imports_of(path):
    """The modules of ours that a module names, in functions too."""
    nodes = ast.walk(ast.parse(path.read_text(encoding="utf-8")))
    return {node.module for node in nodes if isinstance(node, ast.ImportFrom) and node.module.startswith("helpers")}


def circle_in(graph):
    """The first circle of a graph {node: nodes it leads to}, as a list; [] where there is none."""
    finished = set()

    def walk(node, path):
        if node in path:
            return [*path[path.index(node) :], node]
        for following in sorted(graph.get(node, ())) if node not in finished else ():
            if circle := walk(following, [*path, node]):
                return circle
        finished.add(node)
        return []

    return next((circle for node in sorted(graph) if (circle := walk(node, []))), [])


def test_a_circle_is_seen():
    assert circle_in({"a": {"b"}, "b": {"c"}, "c": {"b"}}) == ["b", "c", "b"]
    assert circle_in({"a": {"b", "c"}, "b": {"c"}}) == []


def test_no_wing_and_no_module_imports_in_a_circle():
    assert circle_in({name_of(path): imports_of(path) for path in MODULES if path.name != "__init__.py"}) == []
    wings = {}
    for path in MODULES:
        if path.parent != HELPERS:
            wings.setdefault(path.parent.name, set()).update(
                parts[1] for parts in (name.split(".") for name in imports_of(path)) if parts[1] in WINGS
            )
    assert circle_in({wing: others - {wing} for wing, others in wings.items()}) == []


@pytest.mark.parametrize("wing", WINGS)
def test_a_face_loads_nothing_heavy_and_gives_what_it_names(wing):
    code = f"import sys, helpers.{wing}; print(*sorted({HEAVY!r} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.split() == []
    tree = ast.parse((HELPERS / wing / "__init__.py").read_text(encoding="utf-8"))
    names = [alias.name for node in tree.body if isinstance(node, ast.ImportFrom) for alias in node.names]
    assert names and not [name for name in names if name.startswith("_")]


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_a_module_has_at_most_450_lines_and_a_function_60(path):
    text = path.read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 450
    functions = [node for node in ast.walk(ast.parse(text)) if isinstance(node, ast.FunctionDef)]
    # The words that explain a function are not counted.
    lengths = {
        f.name: f.end_lineno - f.body[0].end_lineno if ast.get_docstring(f) else f.end_lineno - f.lineno + 1
        for f in functions
    }
    assert {name: length for name, length in lengths.items() if length > 60} == {}

"""The house rules of the one file: rooms in bottom-up order, no long function or wide class, documented names."""

import ast
import functools
import re
from pathlib import Path

import persona_memory as pm

SOURCE = Path(pm.__file__).read_text(encoding="utf8")
TREE = ast.parse(SOURCE)
FUNCTIONS = [n for n in ast.walk(TREE) if isinstance(n, ast.FunctionDef | ast.AsyncFunctionDef)]


@functools.cache
def rooms() -> dict[str, int]:
    """Name of each room -> line of its banner."""
    lines = SOURCE.splitlines()
    return {
        lines[i][2:]: i + 1
        for i in range(1, len(lines) - 1)
        if lines[i - 1].startswith("# ===") == lines[i + 1].startswith("# ===") is True
    }


@functools.cache
def room_of(line: int) -> str:
    """The room that a line stands in; empty above the first."""
    return max((start, name) for name, start in {"": 0, **rooms()}.items() if start <= line)[1]


def test_the_contents_list_names_the_rooms_in_their_order():
    """The module's docstring is the plan of the house."""
    listed = re.findall(r"^    ([A-Z][a-z]+(?: [a-z]+)?)  ", ast.get_docstring(TREE, clean=False), re.MULTILINE)
    assert listed == list(rooms())


def test_each_room_uses_only_the_rooms_above_it():
    """No top-level name is used in a room above the one that defines it."""
    home = {}
    for node in TREE.body:
        targets = getattr(node, "targets", [getattr(node, "target", None)])
        names = [t.id for t in targets if isinstance(t, ast.Name)] + [getattr(node, "name", None)]
        home |= {name: list(rooms()).index(room_of(node.lineno)) for name in names if name and room_of(node.lineno)}
    annotations = {
        id(inner)
        for node in ast.walk(TREE)
        for part in (getattr(node, "annotation", None), getattr(node, "returns", None))
        if part
        for inner in ast.walk(part)
    }
    upward = [
        f"{room_of(node.lineno)} uses {node.id} (line {node.lineno})"
        for node in ast.walk(TREE)
        if isinstance(node, ast.Name)
        and isinstance(node.ctx, ast.Load)
        and id(node) not in annotations
        and room_of(node.lineno)
        if home.get(node.id, -1) > list(rooms()).index(room_of(node.lineno))
    ]
    assert not upward, "\n".join(upward)


def test_functions_are_short():
    """None over sixty lines."""
    sizes = {f"{f.name} (line {f.lineno})": f.end_lineno - f.lineno + 1 for f in FUNCTIONS}
    assert [name for name, size in sizes.items() if size > 60] == []


def test_classes_have_one_duty():
    """None has more than forty methods."""
    classes = [node for node in ast.walk(TREE) if isinstance(node, ast.ClassDef)]
    sizes = {c.name: sum(isinstance(m, ast.FunctionDef) for m in c.body) for c in classes}
    assert [name for name, size in sizes.items() if size > 40] == []


def test_public_names_are_documented():
    """Classes, functions and methods that others may call say what they do."""
    bare = [
        node.name
        for node in ast.walk(TREE)
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_")
        if not ast.get_docstring(node)
        and node.name not in ("wrapped", "texts", "parts", "put", "get", "store", "fetch", "rank")
    ]
    assert bare == []

"""Every key of ``node.meta`` that the rooms use is declared once, in ``NodeMeta``; and nothing is declared in vain."""

import ast
from collections.abc import Iterator
from pathlib import Path

from netsurgery.capture.program import NodeMeta

ROOT = Path(__file__).resolve().parent.parent
#: The graphs that ``module_tracer`` makes are others, with notes of their own.
ROOMS = ("netsurgery/capture", "netsurgery/analysis", "netsurgery/verification", "netsurgery/rewriting", "passes")
FILES = (
    "netsurgery/notation.py", "netsurgery/edit.py", "netsurgery/adaptation/size_checker.py",
)  # fmt: skip


def is_meta(node: ast.AST) -> bool:
    return isinstance(node, ast.Attribute) and node.attr == "meta"


def keys(tree: ast.AST) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Subscript) and is_meta(node.value):
            found = [node.slice]
        elif isinstance(node, ast.Compare) and is_meta(node.comparators[0]):
            found = [node.left]
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and is_meta(node.func.value):
            found = node.args[:1]
            yield from (keyword.arg for keyword in node.keywords if keyword.arg)
        else:
            continue
        yield from (one.value for one in found if isinstance(one, ast.Constant) and isinstance(one.value, str))


def test_keys_of_nodes_are_declared() -> None:
    files = [ROOT / file for file in FILES] + [file for room in ROOMS for file in sorted((ROOT / room).rglob("*.py"))]
    used = {key: file.name for file in files for key in keys(ast.parse(file.read_text(encoding="utf-8")))}
    assert {key: file for key, file in used.items() if key not in NodeMeta.__annotations__} == {}
    assert set(NodeMeta.__annotations__) == set(used)

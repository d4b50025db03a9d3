"""Imports point one way, down a list of rooms, and in no circle."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import networkx as nx

ROOT = Path(__file__).resolve().parent.parent

#: From the ground up: a room imports from itself and from rooms before it.
ROOMS = (
    "errors", "arguments", "outputs", "axes", "units", "positions", "tables", "fidelity", "compensated",  # values
    "kernels", "capture", "notation", "analysis", "adaptation", "module_rewrites", "outcome", "edit_json", "edit",
    "rewriting", "verification", "pipeline", "models", "passes", "search", "model_lookup", "demo", "training",
    "weight_sources", "persistence", "cli",
)  # fmt: skip

#: On first use, inside of a function: the file that checkpoints are read from stands above.
LATE = {
    ("netsurgery.weight_sources", "netsurgery.training.checkpoints"),
    ("netsurgery.persistence", "netsurgery.training.checkpoints"),
}


def modules() -> dict[str, Path]:
    found = {}
    for folder, package in (("netsurgery", ""), ("passes", ".passes"), ("kernels", ".kernels")):
        for file in sorted((ROOT / folder).rglob("*.py")):
            parts = file.relative_to(ROOT / folder).with_suffix("").parts
            if folder != "netsurgery" or parts[0] not in ("passes", "kernels"):  # these are links
                found[".".join((f"netsurgery{package}", *parts)).removesuffix(".__init__")] = file
    return found


MODULES = modules()


def imports(tree: ast.AST) -> Iterator[ast.ImportFrom]:
    """All but those for annotations alone."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING":
            continue
        if isinstance(node, ast.ImportFrom):
            yield node
        yield from imports(node)


def graph() -> nx.DiGraph:
    found = nx.DiGraph()
    for name, file in MODULES.items():
        for node in imports(ast.parse(file.read_text(encoding="utf-8"))):
            module = node.module or ""
            for one in (f"{module}.{alias.name}" for alias in node.names):
                target = one if one in MODULES else module
                if target in MODULES and target != name:
                    found.add_edge(name, target)
    return found


def room(module: str) -> str:
    return module.split(".")[1] if "." in module else ""


def test_every_module_stands_in_a_room() -> None:
    assert {room(name) for name in MODULES} - {"", "namesakes"} == set(ROOMS)


def test_imports_point_down() -> None:
    up = [
        (one, other)
        for one, other in graph().edges
        if room(one) and room(one) != room(other) and ROOMS.index(room(other)) > ROOMS.index(room(one))
    ]
    assert not up


def test_passes_and_their_oracle_share_nothing() -> None:
    """Else both may be wrong alike. ``SoftPruning`` asks ``verify``, as a user may, whether a zero leaks."""
    edges = set(graph().edges)
    borrowing = {one for one, other in edges if room(other) == "verification" and room(one) in ("passes", "rewriting")}
    assert borrowing == {"netsurgery.passes.filter_positions"}
    own = ("netsurgery.positions", "netsurgery.analysis.replay_without", "netsurgery.analysis.statistics")
    assert not [one for one, other in edges if room(one) == "verification" and other in own]


def test_imports_run_in_no_circle() -> None:
    assert [sorted(some) for some in nx.strongly_connected_components(graph()) if len(some) > 1] == []


def test_contributing_names_every_room_and_only_files_that_exist() -> None:
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    tree = text[text.index("## The rooms") : text.index("## The walk")]
    assert {name for name in ROOMS if not re.search(rf"\b{name}\b", tree)} == set()
    named = set(re.findall(r"`((?:\w+/)*\w+\.py)`", text))
    folders = [ROOT, ROOT / "netsurgery", ROOT / "netsurgery" / "adaptation"]
    assert {name for name in named if not any((folder / name).exists() for folder in folders)} == set()

"""Code that hard-codes a size is made to follow: by integer attributes of its module, or as a rewritten graph.

``solve`` finds the attributes, ``rebuild`` writes the graph with the new sizes; an ``Adaptation`` is what a whole
model needs. A module whose graph was rewritten stays the same object with the same parameters, submodules, hooks
and attributes; its class becomes a subclass of its own class with another ``forward``.
"""

from __future__ import annotations

import functools
import linecache
import operator
from collections.abc import Container, Mapping
from dataclasses import dataclass, field
from math import inf, nan, sqrt
from typing import Any

import torch
from torch import fx, nn

from netsurgery.axes import Axis, leaves
from netsurgery.costs import Sizes
from netsurgery.listening import Deaf

__all__ = ["Adaptation", "Rewritten", "rebuild", "solve"]

Attributes = Mapping[str, Any]


@dataclass
class Adaptation:
    """What the code of a model needs so that it follows an edit.

    Attributes:
        attributes: new values of attributes, by path of the module and name.
        code: the new ``forward`` of modules, by path.
        reasons: why these modules need one, by path.
    """

    attributes: dict[str, dict[str, Any]] = field(default_factory=dict)
    code: dict[str, str] = field(default_factory=dict)
    reasons: dict[str, str] = field(default_factory=dict)

    def carry_out(self, model: nn.Module) -> None:
        """Change the attributes and the classes of the modules of a model."""
        for path, values in self.attributes.items():
            model.get_submodule(path).__dict__.update(values)
        for path, code in self.code.items():
            module = model.get_submodule(path)
            module.__class__ = _class(_own_class(type(module)), code)
            if isinstance(module, nn.MultiheadAttention):
                module._qkv_same_embed_dim = False  # keeps torch's fused encoder, which wants square weights, away


# A rewritten forward -------------------------------------------------------------------------------------------


class Rewritten:
    """A module whose ``forward`` is a rewritten graph.

    Attributes:
        netsurgery_class: its own class.
        netsurgery_code: the source of its ``forward``. Long names: parts of a module may be called anything else.
    """

    netsurgery_class: type
    netsurgery_code: str

    def __reduce__(self) -> Any:
        return _blank, (_own_class(type(self)), self.netsurgery_code), self.__getstate__()


def _own_class(kind: type) -> Any:
    """What a class made here was made of; others, such as those of parametrised modules, are their own."""
    return vars(kind).get("netsurgery_class", kind)


def _blank(kind: type, code: str) -> Any:
    rewritten: Any = _class(kind, code)
    return rewritten.__new__(rewritten)


_SCOPE = {"torch": torch, "operator": operator, "inf": inf, "nan": nan, "device": torch.device}


@functools.cache
def _class(kind: type, code: str) -> type:
    file = f"<netsurgery {kind.__name__} {abs(hash(code)):x}>"
    linecache.cache[file] = len(code), None, code.splitlines(keepends=True), file  # tracebacks and compilers read it
    scope = dict(_SCOPE)
    exec(compile(code, file, "exec"), scope)
    made = {"netsurgery_class": kind, "netsurgery_code": code}
    members = {**made, "forward": scope["forward"], "__module__": kind.__module__}
    bases = (kind,) if issubclass(kind, Rewritten) else (Rewritten, kind)
    return type(f"Rewritten{kind.__name__}", bases, members)


# Working out the sizes -----------------------------------------------------------------------------------------


class _Values:
    """The value of each number of a graph at other sizes, given the attributes."""

    def __init__(self, sizes: Sizes, attributes: Attributes, units: Container[Axis]):
        self.sizes, self.attributes, self.units = sizes, attributes, units
        self.memo: dict[fx.Node, Any] = {}

    def free(self, axis: Axis) -> bool:
        """Whether a dimension has other sizes for other inputs: batch, space, time."""
        return any(leaf not in self.units for leaf in leaves(axis))

    def depends(self, value: Any) -> bool:
        """Whether a number depends on what the module is given."""
        if not isinstance(value, fx.Node):
            return False
        axis = value.meta.get("axis")
        if value.op == "placeholder" or (axis is not None and self.free(axis)):
            return True
        return any(map(self.depends, value.args))

    def __call__(self, value: Any) -> Any:
        if not isinstance(value, fx.Node):
            return value
        if value not in self.memo:
            self.memo[value] = self.work_out(value)
        return self.memo[value]

    def work_out(self, node: fx.Node) -> Any:
        if node.meta.get("axis") is not None:
            return self.sizes(node.meta["axis"])
        if "attribute" in node.meta:
            name, index = node.meta["attribute"]
            return self.attributes[name] if index is None else self.attributes[name][index]
        if node.op == "call_function" and all("value" in a.meta for a in node.all_input_nodes):
            return node.target(*map(self, node.args))  # type: ignore[operator]
        return node.meta["value"]


def _wants(graph: fx.Graph) -> list[tuple[fx.Node, tuple[int, ...], Any, Axis]]:
    """Every integer that is the size of a dimension: its node, its place there, itself, the dimension."""
    found = []
    for node in graph.nodes:
        for place, axis in node.meta.get("sizes", ()):
            value: Any = node.args
            for step in place:
                value = (value.start, value.stop, value.step)[step] if isinstance(value, slice) else value[step]
            if isinstance(value, fx.Node) or value >= 0:  # -1 is worked out by torch
                found.append((node, place, value, axis))
    return found


def solve(graph: fx.Graph, module: nn.Module, sizes: Sizes) -> dict[str, Any]:
    """The attributes of a module that must change so that its code follows; empty where none or no value does."""
    found: dict[tuple[str, int | None], set[int]] = {}
    for _, _, value, axis in _wants(graph):
        if isinstance(value, fx.Node) and "attribute" in value.meta:
            found.setdefault(value.meta["attribute"], set()).add(sizes(axis))
    if any(len(wanted) > 1 for wanted in found.values()):
        return {}
    attributes: dict[str, Any] = {}
    for (name, index), (wanted,) in found.items():
        old = attributes.get(name, module.__dict__[name])
        new = wanted if index is None else type(old)([*old[:index], wanted, *old[index + 1 :]])
        if new != old:
            attributes[name] = new
    return attributes


def rebuild(graph: fx.Graph, module: nn.Module, sizes: Sizes, attributes: Attributes, units: Container[Axis]) -> str:
    """The source of a ``forward`` that does what a graph does, at other sizes and with these attributes of the module.

    Dimensions of channels that are not among ``units`` (batch, space, time) may be of any size.

    Raises:
        Deaf: a size cannot be worked out.
    """
    copy = fx.Graph()
    renamed: dict[fx.Node, fx.Node] = {}
    result = copy.graph_copy(graph, renamed)
    copy.output(result)
    for old, new in renamed.items():
        new.meta = dict(old.meta)
    known = {name: attributes.get(name, value) for name, value in module.__dict__.items()}
    values = _Values(sizes, known, units)
    for node, place, value, axis in _wants(copy):
        if values(value) != sizes(axis):
            node.args = _put(node.args, place, _mended(value, axis, values, node))
    for node in list(copy.nodes):
        axis = node.meta.get("scale")
        if axis is not None and sizes(axis) != axis.size:
            node.kwargs = {**node.kwargs, "scale": 1.0 / sqrt(axis.size)}
        if node.meta.get("guard") and not (values(node.args[0]) and values.depends(node.args[0])):
            copy.erase_node(node)
    for node in reversed(list(copy.nodes)):
        bare = "value" in node.meta or node.op == "get_attr" or node.target in (operator.getitem, getattr)
        if bare and not node.users and node.op != "placeholder":
            copy.erase_node(node)
    code = copy.python_code("self")
    foreign = {name: f for name, f in code.globals.items() if name not in _SCOPE and name in code.src}
    lines = [f"from {f.__module__} import {f.__qualname__} as {name}" for name, f in foreign.items()]
    return "\n".join([*lines, code.src])


def _mended(value: Any, axis: Axis, values: _Values, node: fx.Node) -> Any:
    """An expression that has the right value: the old one with other constants, or a constant."""
    sizes = values.sizes
    changed = {leaf.size: sizes(leaf) for leaf in leaves(axis) if sizes(leaf) != leaf.size}
    if isinstance(value, fx.Node):
        with node.graph.inserting_before(node):
            other = _with_constants(value, changed)
        if values(other) == sizes(axis):
            return other
    if values.free(axis):
        raise Deaf(f"computes {value} in a way that cannot be followed")
    return sizes(axis)


def _with_constants(value: Any, changed: Mapping[int, int]) -> Any:
    if not isinstance(value, fx.Node):
        return changed.get(value, value) if type(value) is int else value
    if "attribute" in value.meta:
        return changed.get(value.meta["value"], value)
    if value.op != "call_function" or "value" not in value.meta:
        return value
    new = value.graph.call_function(value.target, tuple(_with_constants(a, changed) for a in value.args))  # type: ignore[arg-type]
    new.meta["value"] = value.meta["value"]
    return new


def _put(args: Any, place: tuple[int, ...], value: Any) -> Any:
    if not place:
        return value
    if isinstance(args, slice):
        bounds = [args.start, args.stop, args.step]
        bounds[place[0]] = value
        return slice(*bounds)
    items = list(args)
    items[place[0]] = _put(items[place[0]], place[1:], value)
    return type(args)(items) if type(args) in (tuple, list) else tuple(items)

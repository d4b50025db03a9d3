"""Code that hard-codes a size is made to follow: by integer attributes of its module, or as a rewritten graph.

``solve`` finds the attributes, ``rebuild`` writes the graph with the new sizes; an ``Adaptation`` is what a whole
model needs. A module whose graph was rewritten stays the same object with the same parameters, submodules, hooks
and attributes; its class becomes a subclass of its own class with another ``forward``.
"""

from __future__ import annotations

import copy
import functools
import linecache
import operator
import weakref
from collections.abc import Container, Iterator, Mapping
from dataclasses import dataclass, field
from math import inf, nan, sqrt
from typing import Any

import torch
from torch import fx, nn

from netsurgery.axes import Axis, leaves
from netsurgery.costs import Sizes
from netsurgery.listening import Deaf, Worth

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
    model: weakref.ref[nn.Module] | None = None  # the one whose code it is about

    def carry_out(self, model: nn.Module) -> None:
        """Change the attributes and the classes of the modules of a model."""
        for path, values in self.attributes.items():
            model.get_submodule(path).__dict__.update({name: copy.copy(value) for name, value in values.items()})
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


def solve(graph: fx.Graph, module: nn.Module, sizes: Sizes) -> tuple[dict[str, Any], bool]:
    """The attributes of a module that are sizes of dimensions, at other sizes; and whether that is all they are."""
    found: dict[tuple[str, int | None], set[int]] = {}
    for _, _, value, axis in _wants(graph):
        if isinstance(value, fx.Node) and "attribute" in value.meta:
            found.setdefault(value.meta["attribute"], set()).add(sizes(axis))
    agreed = {key: wanted for key, wanted in found.items() if len(wanted) == 1}
    attributes: dict[str, Any] = {}
    for (name, index), (wanted,) in agreed.items():
        old = attributes.get(name, module.__dict__[name])
        new = wanted if index is None else type(old)([*old[:index], wanted, *old[index + 1 :]])
        if new != old:
            attributes[name] = new
    return attributes, len(agreed) == len(found) and not _used_otherwise(graph, agreed)


def _used_otherwise(graph: fx.Graph, found: Mapping[tuple[str, int | None], Any]) -> bool:
    """Whether one of these attributes is also used for something that is not the size of a dimension."""
    places = {(node, place) for node, place, _, _ in _wants(graph)}
    numbers = [node for node in graph.nodes if node.meta.get("attribute") in found]
    while numbers:
        number = numbers.pop()
        for user in number.users:
            if "value" in user.meta and any(node.meta.get("axis") is not None for node in _sources(user)):
                return True  # computed from a size too, or compared with one
            if "value" in user.meta:
                numbers.append(user)
            elif not user.meta.get("guard") and any(
                value is number and (user, place) not in places for place, value in _placed((), user.args)
            ):
                return True
    return False


def _settle_other_uses(graph: fx.Graph, attributes: Attributes) -> None:
    """Where an attribute that changes is no size of a dimension, its old value stays."""
    places = {(node, place) for node, place, _, _ in _wants(graph)}
    for number in list(graph.nodes):
        if number.meta.get("attribute", ("",))[0] not in attributes:
            continue
        for user in list(number.users):
            for place, value in _placed((), user.args):
                if value is number and (user, place) not in places:
                    user.args = _put(user.args, place, number.meta["value"])


def _sources(node: fx.Node) -> list[fx.Node]:
    """A number and all that it is computed from."""
    return [node, *(found for source in node.all_input_nodes if "value" in source.meta for found in _sources(source))]


def _placed(place: tuple[int, ...], value: Any) -> Iterator[tuple[tuple[int, ...], Any]]:
    """Every argument with its place."""
    if isinstance(value, tuple | list):
        for index, item in enumerate(value):
            yield from _placed((*place, index), item)
    elif isinstance(value, slice):
        yield from _placed(place, (value.start, value.stop, value.step))
    else:
        yield place, value


def rebuild(graph: fx.Graph, module: nn.Module, sizes: Sizes, attributes: Attributes, units: Container[Axis]) -> str:
    """The source of a ``forward`` that does what a graph does, at other sizes and with these attributes of the module.

    Dimensions of channels that are not among ``units`` (batch, space, time) may be of any size.

    Raises:
        Deaf: a size cannot be worked out.
    """
    new_graph = fx.Graph()
    renamed: dict[fx.Node, fx.Node] = {}
    result = new_graph.graph_copy(graph, renamed)
    new_graph.output(result)
    for old, new in renamed.items():
        new.meta = dict(old.meta)
    known = {name: attributes.get(name, value) for name, value in module.__dict__.items()}
    values = Worth(sizes, known, units)
    _settle_other_uses(new_graph, attributes)
    for node, place, value, axis in _wants(new_graph):
        if values(value) != sizes(axis):
            node.args = _put(node.args, place, _mended(value, axis, values, node))
    for node in list(new_graph.nodes):
        axis = node.meta.get("scale")
        if axis is not None and sizes(axis) != axis.size:
            node.kwargs = {**node.kwargs, "scale": 1.0 / sqrt(axis.size)}
        if node.meta.get("guard") and not (values(node.args[0]) and values.depends(node.args[0])):
            new_graph.erase_node(node)
    for node in reversed(list(new_graph.nodes)):
        bare = "value" in node.meta or node.op == "get_attr" or node.target in (operator.getitem, getattr)
        if bare and not node.users and node.op != "placeholder":
            new_graph.erase_node(node)
    code = new_graph.python_code("self")
    foreign = {name: f for name, f in code.globals.items() if name not in _SCOPE and name in code.src}
    lines = [f"from {f.__module__} import {f.__qualname__} as {name}" for name, f in foreign.items()]
    return "\n".join([*lines, code.src])


def _mended(value: Any, axis: Axis, values: Worth, node: fx.Node) -> Any:
    """An expression that has the right value: the old one with other constants, or a constant."""
    sizes = values.sizes
    changed = {leaf.size: sizes(leaf) for leaf in leaves(axis) if sizes(leaf) != leaf.size}
    if not isinstance(value, fx.Node):  # written in the code, as were the sizes of space that are part of it
        return sizes(axis)
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

"""Make code that hard-codes a size follow: by integer attributes of its module, or by a rewritten ``forward``.

``solve_attributes`` finds the attributes, ``generate_forward`` writes a traced graph as code with the new sizes. An
``Adaptation`` holds all that a model needs. A module with a rewritten ``forward`` stays the same object with the same
parameters, submodules, hooks and attributes; its class becomes a subclass of its own class.
"""

from __future__ import annotations

import copy
import functools
import hashlib
import inspect
import linecache
import operator
import weakref
from collections.abc import Container, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from math import inf, nan, prod, sqrt
from typing import Any, NamedTuple

import torch
from torch import fx, nn

from netsurgery.adaptation.function_recorder import Untraceable
from netsurgery.adaptation.input_guards import EXPECTATIONS
from netsurgery.adaptation.repeated_sizes import Repeat
from netsurgery.adaptation.traced_numbers import SizeEvaluator
from netsurgery.analysis.costs import Sizes
from netsurgery.axes import Axis, leaves
from netsurgery.capture.inputs import Kwargs, Tree

__all__ = [
    "Adaptation",
    "Rewritten",
    "agreed_attributes",
    "by_mode",
    "compiled",
    "generate_forward",
    "joined",
    "kinds",
    "solve_attributes",
]

Attributes = Mapping[str, object]  # new values of attributes of one module, by name
Attribute = tuple[str, int | None]  # the name of an attribute, and an index where it is a list
Place = tuple[int, ...]  # indices that lead to an integer in the arguments of a node


@dataclass
class Adaptation:
    """Changes to the code of a model that make it follow an edit.

    Attributes:
        attributes: new values of attributes, by path of the module and name.
        code: the new ``forward`` of modules, by path.
        reasons: why these modules need one, by path.
        stays: numbers of modules that stay although dimensions of their size change, each with a reason.
    """

    attributes: dict[str, dict[str, object]] = field(default_factory=dict)
    code: dict[str, str] = field(default_factory=dict)
    reasons: dict[str, str] = field(default_factory=dict)
    stays: dict[str, str] = field(default_factory=dict)
    model: weakref.ref[nn.Module] | None = None  # the model that it was found for

    def __repr__(self) -> str:
        count = sum(map(len, self.attributes.values()))
        return f"Adaptation({count} attributes, {len(self.code)} rewritten forwards)"

    def joined(self, repeats: Iterable[Repeat]) -> Adaptation:
        """The same adaptation, with the attributes that repeat a size."""
        attributes = {path: dict(values) for path, values in self.attributes.items()}
        stays = dict(self.stays)
        for one in repeats:
            stays.update(one.stays)
            if one.follows:
                attributes.setdefault(one.path, {})[one.name] = one.new
        return replace(self, attributes=attributes, stays=stays)

    def carry_out(self, model: nn.Module) -> None:
        """Change the attributes and the classes of the modules of a model."""
        copies: dict[int, object] = {}  # modules that share a value share the new one, too
        for path, values in self.attributes.items():
            for name, value in values.items():
                if id(value) not in copies:
                    copies[id(value)] = copy.copy(value)
                model.get_submodule(path).__dict__[name] = copies[id(value)]
        for path, code in self.code.items():
            module = model.get_submodule(path)
            module.__class__ = _class(_own_class(type(module)), code)
            if isinstance(module, nn.MultiheadAttention):
                module._qkv_same_embed_dim = False  # keeps torch's fused encoder, which wants square weights, away
        for encoder in model.modules() if self.code else ():
            if isinstance(encoder, nn.TransformerEncoder) and _is_rewritten(encoder):
                encoder.use_nested_tensor = False  # only the fused encoder can read a nested tensor


# A rewritten forward -------------------------------------------------------------------------------------------


class Rewritten:
    """A module whose ``forward`` is a rewritten graph.

    Attributes:
        netsurgery_class: its own class.
        netsurgery_code: the source of its ``forward``. The names are long, since modules may have parts of other names.
    """

    netsurgery_class: type
    netsurgery_code: str

    def __reduce__(self) -> tuple[object, ...]:
        return _blank, (_own_class(type(self)), self.netsurgery_code), self.__getstate__()


def _is_rewritten(model: nn.Module) -> bool:
    return any(isinstance(part, Rewritten) for part in model.modules())


def _own_class(kind: type) -> type:
    """The original of a rewritten class; any other class, such as that of a parametrised module, itself."""
    own: type = vars(kind).get("netsurgery_class", kind)
    return own


def _blank(kind: type, code: str) -> object:
    rewritten: Any = _class(kind, code)
    return rewritten.__new__(rewritten)


_SCOPE = {"torch": torch, "operator": operator, "inf": inf, "nan": nan, "device": torch.device}


@functools.cache
def _class(kind: type, code: str) -> type:
    file = f"<netsurgery {kind.__name__} {hashlib.sha256(code.encode()).hexdigest()[:16]}>"
    linecache.cache[file] = len(code), None, code.splitlines(keepends=True), file  # tracebacks and compilers read it
    scope = dict(_SCOPE)
    exec(compile(code, file, "exec"), scope)
    made = {"netsurgery_class": kind, "netsurgery_code": code}
    members = {**made, "forward": scope["forward"], "__module__": kind.__module__}
    bases = (kind,) if issubclass(kind, Rewritten) else (Rewritten, kind)
    return type(f"Rewritten{kind.__name__}", bases, members)


# New sizes ---------------------------------------------------------------------------------------------------------


class _Size(NamedTuple):
    """An integer among the arguments of a node that is the size of a dimension."""

    node: fx.Node
    place: Place
    value: fx.Node | int
    axis: Axis


def _sizes_in(graph: fx.Graph) -> list[_Size]:
    """Every integer that is the size of a dimension; torch computes -1 itself."""
    found = []
    for node in graph.nodes:
        placed = dict(_placed((), node.args)) if node.meta.get("sizes") else {}
        for place, axis in node.meta.get("sizes", ()):
            if isinstance(value := placed[place], fx.Node) or value >= 0:
                found.append(_Size(node, place, value, axis))
    return found


def solve_attributes(graph: fx.Graph, module: nn.Module, sizes: Sizes) -> tuple[dict[str, object], bool]:
    """The attributes of a module that are sizes of dimensions, at other sizes; True if they are nothing else."""
    found: dict[Attribute, set[int]] = {}
    for _, _, value, axis in _sizes_in(graph):
        if isinstance(value, fx.Node) and "attribute" in value.meta:
            name, index = value.meta["attribute"]
            held = module.__dict__[name]
            if (held if index is None else held[index]) != -1:  # which is worked out from the other sizes
                found.setdefault((name, index), set()).add(sizes(axis))
    agreed = {key: wanted for key, wanted in found.items() if len(wanted) == 1}
    attributes: Kwargs = {}
    for (name, index), (wanted,) in agreed.items():
        old = attributes.get(name, module.__dict__[name])
        new = wanted if index is None else type(old)([*old[:index], wanted, *old[index + 1 :]])
        if new != old:
            attributes[name] = new
    return attributes, len(agreed) == len(found) and not _used_otherwise(graph, agreed)


def agreed_attributes(found: Iterable[tuple[dict[str, object], bool]]) -> tuple[dict[str, object], bool]:
    """The attributes that several runs of a module agree on, none if they do not; True if they are enough for each."""
    wanted: dict[str, object] = {}
    enough = True
    for attributes, alone in found:
        if any(wanted.get(name, value) != value for name, value in attributes.items()):
            return {}, False
        wanted.update(attributes)
        enough = enough and alone
    return wanted, enough


def _used_otherwise(graph: fx.Graph, attributes: Container[Attribute]) -> bool:
    """True if one of these attributes is also used for something that is not the size of a dimension."""
    places = {(size.node, size.place) for size in _sizes_in(graph)}
    numbers = [node for node in graph.nodes if node.meta.get("attribute") in attributes]
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
    """Write the old value of an attribute that changes wherever it is not the size of a dimension."""
    places = {(size.node, size.place) for size in _sizes_in(graph)}
    for number in list(graph.nodes):
        if number.meta.get("attribute", ("",))[0] not in attributes:
            continue
        for user in list(number.users):
            for place, value in _placed((), user.args):
                if value is number and (user, place) not in places:
                    user.args = _put(user.args, place, number.meta["value"])


def _sources(node: fx.Node) -> list[fx.Node]:
    """A number and all numbers that it is computed from."""
    return [node, *(found for source in node.all_input_nodes if "value" in source.meta for found in _sources(source))]


def _placed(place: Place, value: object) -> Iterator[tuple[Place, Any]]:
    """Every argument with its place."""
    if isinstance(value, tuple | list):
        for index, item in enumerate(value):
            yield from _placed((*place, index), item)
    elif isinstance(value, slice):
        yield from _placed(place, (value.start, value.stop, value.step))
    else:
        yield place, value


def generate_forward(
    graph: fx.Graph,
    module: nn.Module,
    sizes: Sizes,
    attributes: Attributes,
    units: Container[Axis],
    written_only: bool = False,
) -> str:
    """The source of a ``forward`` that does the same as a graph, at other sizes and with new attributes of the module.

    Dimensions of channels that are not among ``units`` (batch, space, time) may be of any size.

    Args:
        written_only: refuse code in which more than written numbers would change: a computed size, a branch by size.

    Raises:
        Untraceable: a size cannot be computed.
    """
    new_graph = fx.Graph()
    renamed: dict[fx.Node, fx.Node] = {}
    result = new_graph.graph_copy(graph, renamed)
    new_graph.output(result)
    for old, new in renamed.items():
        new.meta = dict(old.meta)
    known = {name: attributes.get(name, value) for name, value in module.__dict__.items()}
    values = SizeEvaluator(sizes, known, units)
    _settle_other_uses(new_graph, attributes)
    written = _written(new_graph, values)
    for size in _sizes_in(new_graph):
        if values(size.value) != sizes(size.axis):
            value = _at_new_size(size, values, written, written_only)
            size.node.args = _put(size.node.args, size.place, value)
    for node in [node for node in new_graph.nodes if "parts" in node.meta and not written_only]:
        _settle_parts(node, values)
    for node in [node for node in new_graph.nodes if node.meta.get("guard") and not values(node.args[0])]:
        with new_graph.inserting_before(node):
            node.args = (_substituted(node.args[0], written), *node.args[1:])
        if written_only and not values(node.args[0]):
            raise Untraceable("asks for a size that changes")
    for node in list(new_graph.nodes):
        axis = node.meta.get("scale")
        if axis is not None and sizes(axis) != axis.size:
            node.kwargs = {**node.kwargs, "scale": 1.0 / sqrt(axis.size)}
        if node.meta.get("guard") and not (values(node.args[0]) and values.depends(node.args[0])):
            new_graph.erase_node(node)
    for node in reversed(list(new_graph.nodes)):
        picks = node.target in (operator.getitem, getattr) and "sizes" not in node.meta  # no operation on a tensor
        meta = "value" in node.meta or node.op == "get_attr" or picks
        if meta and not node.users and node.op != "placeholder":
            new_graph.erase_node(node)
    code = new_graph.python_code("self")
    foreign = {name: f for name, f in code.globals.items() if name not in _SCOPE and name in code.src}
    lines = [f"from {f.__module__} import {f.__qualname__} as {name}" for name, f in foreign.items()]
    return "\n".join([*lines, code.src])


def kinds(graph: fx.Graph) -> tuple[str, ...]:
    """The kinds of inputs that a graph accepts, as text."""
    return tuple(
        f"{node.target.__name__}{[value for value in node.args if not isinstance(value, fx.Node)]}"
        for node in graph.nodes
        if node.target in EXPECTATIONS
    )


def joined(branches: Iterable[tuple[tuple[str, ...], str]]) -> str:
    """One ``forward`` that tries the ones of several runs, each of which accepts some kinds of inputs.

    Raises:
        Untraceable: they differ for inputs of one kind.
    """
    by_kind: dict[tuple[str, ...], str] = {}
    for kind, code in branches:
        if by_kind.setdefault(kind, code) != code:
            raise Untraceable("takes several branches for inputs of one kind")
    codes = [by_kind[kind] for kind in sorted(by_kind, key=len, reverse=True)]  # the strictest first
    if len(set(codes)) == 1:
        return codes[0]
    names = [f"netsurgery_branch_{i}" for i in range(len(codes))]
    bodies = [_renamed(code, "branch", name) for name, code in zip(names, codes, strict=True)]
    head, passed = _head(codes[0])
    last = f"{head}\n    return first_that_fits(({', '.join(names)}), {passed})\n"
    return "\n".join(["from netsurgery.adaptation.input_guards import first_that_fits", *bodies, last])


def by_mode(in_eval: str, in_training: str) -> str:
    """One ``forward`` that runs the first in eval mode and the second in training."""
    head, passed = _head(in_eval)
    last = f"{head}\n    return (netsurgery_train if self.training else netsurgery_eval)({passed})\n"
    return "\n".join(
        [_renamed(in_eval, "eval", "netsurgery_eval"), _renamed(in_training, "train", "netsurgery_train"), last]
    )


def _renamed(code: str, prefix: str, name: str) -> str:
    """A ``forward`` under another name; the names of the branches in it get a prefix."""
    return code.replace("netsurgery_branch_", f"netsurgery_{prefix}_branch_").replace("def forward(", f"def {name}(")


def _head(code: str) -> tuple[str, str]:
    """The first line of a ``forward``, and its arguments as they are passed on."""
    head = next(line for line in code.splitlines() if line.startswith("def forward("))
    given = inspect.signature(compiled(f"{head} ...")["forward"]).parameters.values()
    stars: dict[object, str] = {inspect.Parameter.VAR_POSITIONAL: "*", inspect.Parameter.VAR_KEYWORD: "**"}
    return head, ", ".join(stars.get(parameter.kind, "") + parameter.name for parameter in given)


def compiled(code: str) -> Kwargs:
    """The names that source code defines, such as ``forward``."""
    scope = dict(_SCOPE)
    exec(code, scope)
    return scope


def _settle_parts(node: fx.Node, values: SizeEvaluator) -> None:
    """Replace ``chunk`` by ``split`` where the parts would get other sizes than predicted."""
    parts = node.meta["parts"]
    wanted = [values.sizes(part) for part in parts]
    if wanted == _chunks(sum(wanted), len(wanted)) or wanted == [part.size for part in parts]:
        return
    if any(map(values.free, parts)):
        raise Untraceable("splits a dimension that inputs and units share")
    dim = node.kwargs.get("dim", node.args[2] if len(node.args) > 2 else 0)
    node.op, node.target, node.args, node.kwargs = "call_method", "split", (node.args[0], wanted, dim), {}


def _chunks(size: int, count: int) -> list[int]:
    """The sizes of the parts that ``chunk`` makes."""
    whole = -(-size // count)
    return [min(whole, size - start) for start in range(0, size, whole)]


def _written(graph: fx.Graph, values: SizeEvaluator) -> dict[int, int]:
    """The new values of sizes that are written in the code and change, such as a number of heads, by old value.

    Products of the sizes of one call count as sizes, as in ``view(n, 3, 4, c // 12)``.
    """
    by_call: dict[fx.Node, list[tuple[int, int]]] = {}
    for node, _, value, axis in _sizes_in(graph):
        if type(value) is int:
            by_call.setdefault(node, []).append((value, values.sizes(axis)))
    found: dict[int, set[int]] = {}
    for sizes in by_call.values():
        for old, new in (*sizes, tuple(map(prod, zip(*sizes, strict=True)))):
            found.setdefault(old, set()).add(new)
    return {old: new for old, (new, *others) in found.items() if not others and new != old}


def _at_new_size(size: _Size, values: SizeEvaluator, written: Mapping[int, int], written_only: bool) -> fx.Node | int:
    """An expression for the new size: the old one with other constants, or a constant."""
    node, _, value, axis = size
    sizes = values.sizes
    changed = {leaf.size: sizes(leaf) for leaf in leaves(axis) if sizes(leaf) != leaf.size}
    if not isinstance(value, fx.Node):  # written in the code
        return sizes(axis)
    for constants in (changed, written):  # one size may be computed from another: view(n, 4, c // 4)
        with node.graph.inserting_before(node):
            other: fx.Node | int = _substituted(value, constants)
        if values(other) == sizes(axis):
            return other
    if values.free(axis) or written_only:
        raise Untraceable(f"computes {value} in a way that cannot be followed")
    return sizes(axis)


def _substituted(value: Tree, changed: Mapping[int, int]) -> Tree:
    if not isinstance(value, fx.Node):
        return changed.get(value, value) if type(value) is int else value
    if "attribute" in value.meta:
        return changed.get(value.meta["value"], value)
    if value.op != "call_function" or "value" not in value.meta:
        return value
    new = value.graph.call_function(value.target, tuple(_substituted(a, changed) for a in value.args))  # type: ignore[arg-type]
    new.meta["value"] = value.meta["value"]
    return new


def _put(args: Tree, place: Place, value: object) -> Tree:
    if not place:
        return value
    if isinstance(args, slice):
        bounds = [args.start, args.stop, args.step]
        bounds[place[0]] = value
        return slice(*bounds)
    items = list(args)
    items[place[0]] = _put(items[place[0]], place[1:], value)
    return type(args)(items) if type(args) in (tuple, list) else tuple(items)

"""Values of tensors without data, for code that looks at them, and the decisions that it takes from them.

A **decision** is a result that is computed from floating-point numbers and holds none: a comparison, the indices of
the largest, the boxes that are left, a number that Python reads. Decisions of the recorded run are kept on its nodes
(``node.meta["decided"]``; a list where there are several results, None for a result that is no decision). Later runs
replay these decisions. So they take the same path through the code, and the numbers on it can be compared.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from netsurgery.axes import Axis
from netsurgery.capture.inputs import Inputs, Kwargs, Tree, with_tensors
from netsurgery.capture.meta_shapes import infer
from netsurgery.capture.operations import OpCall, Target, writes
from netsurgery.positions import positions

__all__ = [
    "VIEWS",
    "ConcreteValues",
    "KnownValues",
    "TensorMap",
    "any_layout",
    "decisions",
    "draw",
    "flat",
    "is_number",
    "needs_values",
    "remapped",
    "replay_decision",
    "select",
    "selected",
]

T = TypeVar("T")
#: The decision of one operation, if there is one; where it has several results, a list with None for other results.
Decided = Tensor | bool | int | float | list[Any] | None

_BY_DATA = {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape}
VIEWS = {torch.ops.aten.view.default, torch.ops.aten._unsafe_view.default}
_PICKS = {torch.ops.aten.index.Tensor, torch.ops.aten.masked_select.default}  # the first argument decides nothing
_PACK = torch.ops.aten._pack_padded_sequence.default  # reads its second argument, lengths, from memory
_RANDOM = torch.Tag.nondeterministic_seeded


class _Ref(weakref.ref[Tensor]):
    __slots__ = ("key",)
    key: int


class TensorMap(Generic[T]):
    """A dictionary by tensor; an entry vanishes with its tensor."""

    def __init__(self) -> None:
        self.items: dict[int, tuple[_Ref, T]] = {}
        self.gone = lambda ref: self.items.pop(ref.key, None)

    def get(self, tensor: Tensor) -> T | None:
        """The entry of a tensor, or None."""
        entry = self.items.get(id(tensor))
        return None if entry is None else entry[1]

    def __setitem__(self, tensor: Tensor, value: T) -> None:
        ref = _Ref(tensor, self.gone)
        ref.key = id(tensor)
        self.items[ref.key] = ref, value


def needs_values(target: Target, error: Exception) -> bool:
    """True if an operation failed because it has no kernel for tensors without data, or has to see values."""
    foreign = not target._schema.name.startswith("aten::")  # operations of torch have tags that tell it
    return foreign or target is _PACK or isinstance(error, NotImplementedError) or not _BY_DATA.isdisjoint(target.tags)


def draw(inputs: Inputs, device: torch.device) -> Inputs:
    """Inputs with values: their own where they have some, else random numbers, or zeros for integers."""
    generator = torch.Generator().manual_seed(0)

    def drawn(tensor: Tensor) -> Tensor:
        if not tensor.is_meta:
            return tensor.to(device)
        if tensor.dtype.is_floating_point:
            return torch.randn(tensor.shape, generator=generator).to(device, tensor.dtype)
        return torch.zeros(tensor.shape, dtype=tensor.dtype, device=device)

    return with_tensors(inputs, drawn)


def flat(value: Tree) -> Iterator[Any]:
    """The items of nested lists and tuples."""
    if isinstance(value, list | tuple):
        for item in value:
            if isinstance(item, list | tuple):
                yield from flat(item)
            else:
                yield item
    else:
        yield value


def _tensors(*values: Tree) -> list[Tensor]:
    return [leaf for leaf in flat(values) if isinstance(leaf, Tensor)]


def _parts(out: Tree) -> list[Tree]:
    return list(out) if isinstance(out, list | tuple) else [out]


def is_number(value: object) -> bool:
    """True if a value is a tensor of floating-point numbers."""
    return isinstance(value, Tensor) and (value.is_floating_point() or value.is_complex())


def decisions(call: OpCall, out: Tree) -> Decided:
    """The decisions of an operation: its results that are no floating-point numbers, though some arguments are.

    Args:
        call: with values, as the result ``out``.
    """
    chosen = _RANDOM in call.target.tags or any(map(is_number, _tensors(call.args, list(call.kwargs.values()))))
    found = [
        part.clone()
        if isinstance(part, Tensor) and chosen and not is_number(part)
        else part
        if isinstance(part, bool | int | float)
        else None
        for part in _parts(out)
    ]
    if all(part is None for part in found):
        return None
    return found if isinstance(out, list | tuple) else found[0]


def remapped(node: fx.Node, units: Callable[[Axis], Tensor]) -> Decided:
    """The decisions of a node, with the units of each dimension as ``units`` lists them."""
    decided: Decided = selected(node.meta["decided"], node.meta["dims"], units)
    return decided


def selected(value: Tree, dims: Tree, units: Callable[[Axis], Tensor]) -> Tree:
    """One result, or a list of several, with the units of each dimension as ``units`` lists them."""
    if isinstance(value, list):
        return [selected(part, axes, units) for part, axes in zip(value, dims, strict=True)]
    return select(value, dims, units) if isinstance(value, Tensor) else value


def select(tensor: Tensor, dims: tuple[Axis, ...], units: Callable[[Axis], Tensor]) -> Tensor:
    """A copy of a tensor with the units of each dimension as ``units`` lists them."""
    for dim, axis in enumerate(dims):
        tensor = tensor.index_select(dim, positions(axis, units).to(tensor.device))
    return tensor.clone()


def any_layout(target: Callable[..., Tree]) -> Callable[..., Tree]:
    """The same operation for an argument in any memory layout: ``reshape`` for ``view``."""
    return torch.ops.aten.reshape if target in VIEWS else target


def replay_decision(call: OpCall, decided: Decided) -> Tree:
    """The recorded decision as a result; numbers beside it, such as the largest, are those of the new arguments."""
    schema = call.target._schema
    if writes(call.target):
        return call.args[0].copy_(decided)
    if not isinstance(decided, list) or None not in decided:
        return decided
    out = list(call.run())
    if [result.name for result in schema.returns] == ["values", "indices"]:
        given: Kwargs = {a.name: call.kwargs.get(a.name, a.default_value) for a in schema.arguments}
        given.update(zip(given, call.args, strict=False))
        out[0] = _taken(given["self"], given["dim"], decided[1])
    return [new if part is None else part for new, part in zip(out, decided, strict=True)]


def _taken(x: Tensor, dim: int, indices: Tensor) -> Tensor:
    if not x.dim():
        return x.clone()
    if indices.dim() == x.dim():
        return x.gather(dim, indices)
    return x.gather(dim, indices.unsqueeze(dim)).squeeze(dim)


class ConcreteValues:
    """The values of tensors without data, for as long as these tensors live.

    The user's own tensors are not copied, unless an operation writes to them.
    """

    def __init__(self, device: torch.device):
        self.device = torch.device("cpu") if device.type == "meta" else device
        self.of: TensorMap[Tensor] = TensorMap()
        self.shared: set[int] = set()  # addresses of memory that is the user's

    def bind(self, meta: Tensor, value: Tensor) -> None:
        """Note that a tensor has the value of one of the user's."""
        self.of[meta] = value.detach()
        self.shared.add(value.untyped_storage().data_ptr())

    def infer(self, call: OpCall, read: bool = False) -> tuple[Tree, Decided]:
        """The result of an operation without data, and its decisions: all of the result where Python will read it."""
        real = self.run(call)
        decided = real.clone() if read else decisions(call.mapped(self.real), real)
        return self.keep(call, real), decided

    def real(self, value: Tree) -> Tree:
        """Arguments with values; a tensor of unknown value becomes zeros."""
        if isinstance(value, Tensor):
            found = self.of.get(value)
            return torch.zeros(value.shape, dtype=value.dtype, device=self.device) if found is None else found
        if isinstance(value, list | tuple):
            return type(value)([self.real(item) for item in value])
        return self.device if isinstance(value, torch.device) else value

    def run(self, call: OpCall) -> Tree:
        """The result of an operation, with values."""
        for tensor in self.written(call):
            self.own(tensor)
        _, args, kwargs = call.mapped(self.real)
        if call.target is _PACK:
            data, sizes = call.target(args[0], args[1].cpu(), *args[2:])
            return data, sizes.to(self.device)
        return any_layout(call.target)(*args, **kwargs)

    def written(self, call: OpCall) -> list[Tensor]:
        """The tensors of known value that an operation writes to."""
        if not writes(call.target):
            return []
        given = [
            call.args[i] if i < len(call.args) else call.kwargs.get(a.name)
            for i, a in enumerate(call.target._schema.arguments)
            if a.alias_info is not None and a.alias_info.is_write
        ]
        return [value for tensor in _tensors(given) if (value := self.of.get(tensor)) is not None]

    def own(self, value: Tensor) -> None:
        """Copy the memory of ``value`` for all tensors that share it, where it is the user's."""
        storage = value.untyped_storage()
        if storage.data_ptr() not in self.shared:
            return
        copied = storage.clone()
        for key, (ref, other) in list(self.of.items.items()):
            if other.untyped_storage().data_ptr() == storage.data_ptr():
                place = (other.storage_offset(), other.shape, other.stride())
                moved = torch.empty(0, dtype=other.dtype, device=other.device).set_(copied, *place)
                self.of.items[key] = ref, moved

    def keep(self, call: OpCall, real: Tree) -> Tree:
        """The result without data of an operation whose result with values is ``real``."""
        out = self.meta(call, real)
        for part, value in zip(flat(out), flat(real), strict=True):
            if isinstance(part, Tensor):
                self.of[part] = value
        return out

    def meta(self, call: OpCall, real: Tree) -> Tree:
        """The result of an operation without data; where that needs values, it is like ``real``."""
        try:
            if _BY_DATA.isdisjoint(call.target.tags):
                return infer(call)
        except RuntimeError:  # no kernel for tensors without data
            pass
        return self.like_real(call, real)

    def like_real(self, call: OpCall, real: Tree) -> Tree:
        """The same as ``real`` without data; an argument that was written to is itself."""
        mine = {id(self.of.get(tensor)): tensor for tensor in _tensors(call.args)}
        return pytree.tree_map_only(Tensor, lambda t: mine[id(t)] if id(t) in mine else _like(t), real)


def _like(value: Tensor) -> Tensor:
    return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device="meta")


def _on_meta(values: Tree) -> Tree:
    return pytree.tree_map_only(Tensor, _like, values)


class KnownValues(ConcreteValues):
    """Holds only values that depend on no floating-point numbers: integers, constants, and results of these."""

    def bind(self, meta: Tensor, value: Tensor) -> None:
        """Note that a tensor has the value of one of the user's, unless that holds floating-point numbers."""
        if not is_number(value) and not value.is_meta:
            super().bind(meta, value)

    def meta(self, call: OpCall, real: Tree) -> Tree:
        """The result of an operation without data, as it is with values."""
        return self.like_real(call, real)

    def knows(self, call: OpCall) -> bool:
        """True if the result of an operation follows from known values."""
        given = _tensors(call.args, *call.kwargs.values())
        return all(id(leaf) in self.of.items for leaf in given) and _RANDOM not in call.target.tags

    def infer(self, call: OpCall, read: bool = False) -> tuple[Tree, Decided]:
        """The result of an operation without data; known values decide nothing."""
        if self.knows(call):
            return self.keep(call, self.run(call)), None
        for value in self.written(call):
            self.forget(value)
        if self.knows_lengths(call):
            return self.packed(call), None
        if call.target in _PICKS and self.knows(call._replace(args=call.args[1:])):
            return self.like(call), None
        return infer(call), None

    def replay(self, node: fx.Node, call: OpCall, units: Callable[[Axis], Tensor]) -> Tree:
        """The result in a later run, for the units that are listed; it knows the decisions of ``node``, too."""
        if self.knows(call):
            return self.keep(call, self.run(call))
        if self.knows_lengths(call):
            return self.packed(call)
        written = self.written(call)
        if "decided" not in node.meta:
            for value in written:
                self.forget(value)
            return self.like(call)
        decided: Any = remapped(node, units)
        if writes(call.target):
            for value in written:
                value.copy_(decided)
            return infer(call)
        out = self.like(call) if isinstance(decided, list) and None in decided else _on_meta(decided)
        for part, value in zip(_parts(out), _parts(decided), strict=True):
            if isinstance(value, Tensor) and value.shape == part.shape:
                self.of[part] = value
        return out

    def knows_lengths(self, call: OpCall) -> bool:
        """True if an operation packs sequences whose lengths are known."""
        return call.target is _PACK and self.knows(OpCall(_PACK, call.args[1:2], {}))

    def packed(self, call: OpCall) -> tuple[Tensor, Tensor]:
        """Sequences without data, one after the other by their known lengths."""
        data, sizes = _PACK(call.args[0], self.real(call.args[1]).cpu(), *call.args[2:])
        meta = _like(sizes)
        self.of[meta] = sizes.to(self.device)
        return data, meta

    def like(self, call: OpCall) -> Tree:
        """The result without data of an operation on values that are not known: zeros where it needs some."""
        try:
            return infer(call)
        except RuntimeError as error:
            if not needs_values(call.target, error):
                raise
        return _on_meta(call.mapped(self.real).run())

    def forget(self, value: Tensor) -> None:
        """Forget the values of all tensors that share memory with ``value``."""
        address = value.untyped_storage().data_ptr()
        for key, (_, other) in list(self.of.items.items()):
            if other.untyped_storage().data_ptr() == address:
                del self.of.items[key]

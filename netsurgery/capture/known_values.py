"""Values of tensors without data, for code that looks at them, and the decisions that it takes from them.

A **decision** is a result that is computed from floating-point numbers and is none itself: a comparison, the indices of
the largest, which boxes are left, a number that Python reads. Decisions of the recorded run are kept on its nodes
(``node.meta["decided"]``; a list where there are several results, None for a result that is no decision). Later runs
replay these decisions. So they take the same path through the code, and the numbers on it can be compared.
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable, Iterator
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from netsurgery.axes import Axis
from netsurgery.capture.meta_shapes import infer
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
]

T = TypeVar("T")

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


def needs_values(func: Any, error: Exception) -> bool:
    """Whether an operation failed on tensors without data for want of values (or of a kernel that does without)."""
    foreign = not func._schema.name.startswith("aten::")  # torch's own say by their tags what they need
    return foreign or func is _PACK or isinstance(error, NotImplementedError) or not _BY_DATA.isdisjoint(func.tags)


def draw(inputs: Any, device: torch.device) -> Any:
    """Inputs with values: their own where they have some, else random numbers, or zeros where these are integers."""
    generator = torch.Generator().manual_seed(0)

    made: dict[int, Tensor] = {}

    def fill(tensor: Tensor) -> Tensor:
        if id(tensor) not in made:  # one that is given twice stays one
            made[id(tensor)] = drawn(tensor)
        return made[id(tensor)]

    def drawn(tensor: Tensor) -> Tensor:
        if not tensor.is_meta:
            return tensor.to(device)
        if tensor.dtype.is_floating_point:
            return torch.randn(tensor.shape, generator=generator).to(device, tensor.dtype)
        return torch.zeros(tensor.shape, dtype=tensor.dtype, device=device)

    return pytree.tree_map_only(Tensor, fill, inputs)


def flat(value: Any) -> Iterator[Any]:
    """The items of nested lists and tuples."""
    if isinstance(value, list | tuple):
        for item in value:
            if isinstance(item, list | tuple):
                yield from flat(item)
            else:
                yield item
    else:
        yield value


def _tensors(*values: Any) -> list[Tensor]:
    return [leaf for leaf in flat(values) if isinstance(leaf, Tensor)]


def _parts(out: Any) -> list[Any]:
    return list(out) if isinstance(out, list | tuple) else [out]


@functools.cache
def _writes(func: Any) -> bool:
    return getattr(func._schema, "is_mutable", False)


def is_number(value: Any) -> bool:
    """Whether a value is a tensor of floating-point numbers."""
    return isinstance(value, Tensor) and (value.is_floating_point() or value.is_complex())


def decisions(func: Any, args: Any, kwargs: dict[str, Any], out: Any) -> Any:
    """The decisions of an operation: its results that are no floating-point numbers, though it was given some.

    Args:
        args, kwargs: with values, as the result ``out``.

    Returns:
        A decision; where the operation has several results, a list with None for those that are no decision; or None.
    """
    chosen = _RANDOM in func.tags or any(map(is_number, _tensors(args, list(kwargs.values()))))
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


def remapped(node: fx.Node, units: Callable[[Axis], Tensor]) -> Any:
    """The decisions of a node, with the units of each dimension as ``units`` lists them."""
    decided, dims = node.meta["decided"], node.meta["dims"]
    if not isinstance(decided, list):
        return select(decided, dims, units) if isinstance(decided, Tensor) else decided
    return [
        select(part, axes, units) if isinstance(part, Tensor) else part
        for part, axes in zip(decided, dims, strict=True)
    ]


def select(tensor: Tensor, dims: tuple[Axis, ...], units: Callable[[Axis], Tensor]) -> Tensor:
    """A copy of a tensor with the units of each dimension as ``units`` lists them."""
    for dim, axis in enumerate(dims):
        tensor = tensor.index_select(dim, positions(axis, units).to(tensor.device))
    return tensor.clone()


def any_layout(func: Any) -> Any:
    """An operation that does not mind how the memory of its argument is laid out."""
    return torch.ops.aten.reshape if func in VIEWS else func


def replay_decision(func: Any, args: Any, kwargs: dict[str, Any], decided: Any) -> Any:
    """The result of an operation as it was decided; numbers that go with a choice are those of the new arguments."""
    schema = func._schema
    if _writes(func):
        return args[0].copy_(decided)
    if not isinstance(decided, list) or None not in decided:
        return decided
    out = list(func(*args, **kwargs))
    if [result.name for result in schema.returns] == ["values", "indices"]:
        given = {a.name: kwargs.get(a.name, a.default_value) for a in schema.arguments}
        given.update(zip(given, args, strict=False))
        out[0] = _taken(given["self"], given["dim"], decided[1])
    return [new if part is None else part for new, part in zip(out, decided, strict=True)]


def _taken(x: Tensor, dim: int, indices: Tensor) -> Tensor:
    if not x.dim():
        return x.clone()
    if indices.dim() == x.dim():
        return x.gather(dim, indices)
    return x.gather(dim, indices.unsqueeze(dim)).squeeze(dim)


class ConcreteValues:
    """The values of the tensors without data of a run, as long as these live.

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

    def infer(self, func: Any, args: Any, kwargs: dict[str, Any], read: bool = False) -> tuple[Any, Any]:
        """The result of an operation without data, and what it decided; all of it, where Python will read it."""
        real = self.run(func, args, kwargs)
        decided = real.clone() if read else decisions(func, *self.reals(args, kwargs), real)
        return self.keep(func, args, kwargs, real), decided

    def real(self, value: Any) -> Any:
        """Arguments with values; a tensor of unknown value becomes zeros."""
        if isinstance(value, Tensor):
            found = self.of.get(value)
            return torch.zeros(value.shape, dtype=value.dtype, device=self.device) if found is None else found
        if isinstance(value, list | tuple):
            return type(value)([self.real(item) for item in value])
        return self.device if isinstance(value, torch.device) else value

    def reals(self, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        """Positional and keyword arguments with values."""
        return self.real(args), {key: self.real(value) for key, value in kwargs.items()}

    def run(self, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        """The result of an operation, with values."""
        for tensor in self.written(func, args, kwargs):
            self.own(tensor)
        args, kwargs = self.reals(args, kwargs)
        if func is _PACK:
            data, sizes = func(args[0], args[1].cpu(), *args[2:])
            return data, sizes.to(self.device)
        return any_layout(func)(*args, **kwargs)

    def written(self, func: Any, args: Any, kwargs: dict[str, Any]) -> list[Tensor]:
        """The tensors of known value that an operation writes to."""
        if not _writes(func):
            return []
        given = [
            args[i] if i < len(args) else kwargs.get(a.name)
            for i, a in enumerate(func._schema.arguments)
            if a.alias_info is not None and a.alias_info.is_write
        ]
        return [value for tensor in _tensors(given) if (value := self.of.get(tensor)) is not None]

    def own(self, value: Tensor) -> None:
        """Give all that share memory with ``value`` a copy of it, where it is the user's."""
        storage = value.untyped_storage()
        if storage.data_ptr() not in self.shared:
            return
        copied = storage.clone()
        for key, (ref, other) in list(self.of.items.items()):
            if other.untyped_storage().data_ptr() == storage.data_ptr():
                place = (other.storage_offset(), other.shape, other.stride())
                moved = torch.empty(0, dtype=other.dtype, device=other.device).set_(copied, *place)
                self.of.items[key] = ref, moved

    def keep(self, func: Any, args: Any, kwargs: dict[str, Any], real: Any) -> Any:
        """The result without data of an operation whose result with values is ``real``."""
        out = self.meta(func, args, kwargs, real)
        for part, value in zip(flat(out), flat(real), strict=True):
            if isinstance(part, Tensor):
                self.of[part] = value
        return out

    def meta(self, func: Any, args: Any, kwargs: dict[str, Any], real: Any) -> Any:
        """The result of an operation without data; where that needs values, it is like ``real``."""
        try:
            if _BY_DATA.isdisjoint(func.tags):
                return infer(func, args, kwargs)
        except RuntimeError:  # no kernel for tensors without data
            pass
        return self.like_real(args, real)

    def like_real(self, args: Any, real: Any) -> Any:
        """The same as ``real`` without data; an argument that was written to is itself."""
        mine = {id(self.of.get(tensor)): tensor for tensor in _tensors(args)}
        return pytree.tree_map_only(Tensor, lambda t: mine[id(t)] if id(t) in mine else _like(t), real)


def _like(value: Tensor) -> Tensor:
    return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device="meta")


def _on_meta(values: Any) -> Any:
    return pytree.tree_map_only(Tensor, _like, values)


class KnownValues(ConcreteValues):
    """Only values that depend on no floating-point numbers: integers, constants, and results computed from these."""

    def bind(self, meta: Tensor, value: Tensor) -> None:
        """Note that a tensor has the value of one of the user's, unless that holds floating-point numbers."""
        if not is_number(value) and not value.is_meta:
            super().bind(meta, value)

    def meta(self, func: Any, args: Any, kwargs: dict[str, Any], real: Any) -> Any:
        """The result of an operation without data, as it is with values."""
        return self.like_real(args, real)

    def knows(self, func: Any, args: Any, kwargs: dict[str, Any]) -> bool:
        """Whether the result of an operation follows from what is known."""
        known = self.of.items
        if not all(id(leaf) in known for leaf in flat([args, *kwargs.values()]) if isinstance(leaf, Tensor)):
            return False
        return _RANDOM not in func.tags

    def infer(self, func: Any, args: Any, kwargs: dict[str, Any], read: bool = False) -> tuple[Any, Any]:
        """The result of an operation without data; nothing is decided by what is known."""
        if self.knows(func, args, kwargs):
            return self.keep(func, args, kwargs, self.run(func, args, kwargs)), None
        for value in self.written(func, args, kwargs):
            self.forget(value)
        if func is _PACK and self.knows(func, args[1:2], {}):
            return self.packed(args), None
        if func in _PICKS and self.knows(func, args[1:], kwargs):
            return self.like(func, args, kwargs), None
        return infer(func, args, kwargs), None

    def replay(
        self, node: fx.Node, func: Any, args: Any, kwargs: dict[str, Any], units: Callable[[Axis], Tensor]
    ) -> Any:
        """The result in a later run, where the decisions of ``node`` are known too, for the units that are listed."""
        if self.knows(func, args, kwargs):
            return self.keep(func, args, kwargs, self.run(func, args, kwargs))
        if func is _PACK and self.knows(func, args[1:2], {}):
            return self.packed(args)
        written = self.written(func, args, kwargs)
        if "decided" not in node.meta:
            for value in written:
                self.forget(value)
            return self.like(func, args, kwargs)
        decided = remapped(node, units)
        if _writes(func):
            for value in written:
                value.copy_(decided)
            return infer(func, args, kwargs)
        several = isinstance(decided, list)
        out = self.like(func, args, kwargs) if several and None in decided else _on_meta(decided)
        for part, value in zip(_parts(out), _parts(decided), strict=True):
            if isinstance(value, Tensor) and value.shape == part.shape:
                self.of[part] = value
        return out

    def packed(self, args: Any) -> Any:
        """Sequences without data, one after the other by their known lengths."""
        data, sizes = _PACK(args[0], self.real(args[1]).cpu(), *args[2:])
        meta = _like(sizes)
        self.of[meta] = sizes.to(self.device)
        return data, meta

    def like(self, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        """The result without data of an operation on values that are not known: zeros where it needs some."""
        try:
            return infer(func, args, kwargs)
        except RuntimeError as error:
            if not needs_values(func, error):
                raise
        args, kwargs = self.reals(args, kwargs)
        return _on_meta(func(*args, **kwargs))

    def forget(self, value: Tensor) -> None:
        """Forget the values of all tensors that share memory with ``value``."""
        address = value.untyped_storage().data_ptr()
        for key, (_, other) in list(self.of.items.items()):
            if other.untyped_storage().data_ptr() == address:
                del self.of.items[key]

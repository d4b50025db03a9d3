"""Rules of your own: how an operation, or a class of modules, relates dimensions."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn
from torch._library.custom_ops import CustomOpDef
from torch._ops import OpOverload, OpOverloadPacket

from netsurgery.analysis.rules import CUSTOM_RULES, Rule, locked, title
from netsurgery.axes import Dims
from netsurgery.capture.custom_modules import CUSTOM_MODULES, CustomModule, Shape, arguments_of
from netsurgery.capture.inputs import Tree
from netsurgery.errors import InputError
from netsurgery.notation import Misfit, Op, Results, names_in, parse, relate, results

__all__ = ["RuleHandle", "rule"]

UserRule = Callable[[Op], Sequence[Dims | None]]
#: An operation, all its overloads, or a class of modules.
Key = OpOverload[..., Any] | OpOverloadPacket[..., Any] | type[nn.Module]


class RuleHandle(AbstractContextManager["RuleHandle"]):
    """A rule that is registered. ``remove()`` takes it away, and so does the end of a ``with`` block."""

    def __init__(self, key: Key, says: str):
        self.key, self.says = key, says
        books: tuple[dict[Any, Any], ...] = (CUSTOM_RULES, CUSTOM_MODULES)
        self.before = [(book, book.get(key)) for book in books]

    def remove(self) -> None:
        """Take the rule away; an earlier rule of the same target holds again."""
        for book, value in self.before:
            book.pop(self.key, None)
            if value is not None:
                book[self.key] = value

    def __exit__(self, *error: object) -> None:
        self.remove()

    def __repr__(self) -> str:
        return f"<rule of {title(self.key)}: {self.says}>"


def rule(
    target: Key | CustomOpDef | str,
    says: str | UserRule | None,
    *,
    operands: str | None = None,
    parameters: Mapping[str, str] | None = None,
    sizes: Mapping[str, str] | None = None,
) -> RuleHandle:
    """Say what an operation does to dimensions; nothing is run or changed, the next ``trace`` uses it.

    Args:
        target: an operation (``"mylib::scale"``, ``torch.ops.mylib.scale``, a ``torch.library.custom_op``), built-in
            ones included; or a class of modules, whose instances are then one operation: nothing inside is looked at.
        says: in the notation of ``netsurgery.notation``; or a function from ``netsurgery.notation.Op`` to a list with
            the dimensions of each result; or None, which locks whatever the operation touches. A name in brackets, as
            in ``"b [n] c -> b n c"``, locks that dimension.
        operands: the names of the tensor arguments in the order of the notation. By default those of the operation's
            schema, or of the module's ``forward``. Tensors that are not named are locked.
        parameters: for a module, the dimensions of its parameters and buffers: ``{"weight": "o i"}``. Those that are
            not named are locked.
        sizes: name of a dimension -> the integer argument (for a module: attribute) that holds its size. Needed inside
            products: ``"b (h d) -> b h d"`` with ``{"h": "num_heads"}``.

    Nothing checks a rule but ``verify``, as far as it can: it gives the operation zeros in place of removed units. So
    it reports a difference where a rule is wrong, and also where the operation takes statistics over units (a norm).

    Returns:
        A handle that takes the rule away: ``.remove()``, or ``with netsurgery.rule(...):``.

    Raises:
        InputError: no such operation, a notation with a mistake, or operands that it does not have. Where a rule does
            not fit the shapes it meets, ``trace`` raises it.

    Example:
        >>> import torch, netsurgery
        >>> class Mixer(torch.nn.Module):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.weight = torch.nn.Parameter(torch.ones(8, 6))
        ...     def forward(self, x):
        ...         return x @ self.weight.tril().T
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 6), Mixer(), torch.nn.Linear(8, 2))
        >>> [group.name for group in netsurgery.trace(model).prunable]  # tril looks at positions
        []
        >>> with netsurgery.rule(Mixer, "b i -> b o", parameters={"weight": "o i"}):
        ...     [group.name for group in netsurgery.trace(model).prunable]
        ['0', '1']
    """
    try:
        key, arguments, tensors = _resolve(target)
        learned: Rule
        if isinstance(says, str):
            left, arrow, right = says.partition("->")
            learned = _Relation(
                says=says,
                notation=", ".join([left.rstrip(), *(parameters or {}).values()]) + f" {arrow}{right}",
                operands=(*(tensors if operands is None else operands.split()), *_owned(parameters or {})),
                sizes=dict(sizes or {}),
            )
            learned.validate(key, arguments)
        elif isinstance(key, type):
            raise ValueError("a module needs a notation, which gives the shapes of its results")
        else:
            learned = _Calling(says)
    except ValueError as error:
        raise InputError(f"no rule for {title(target)}: {error}") from None
    handle = RuleHandle(key, str(learned))
    CUSTOM_RULES[key] = learned, str(learned)
    if isinstance(learned, _Relation) and isinstance(key, type):
        CUSTOM_MODULES[key] = learned.shapes
    return handle


@dataclass(frozen=True)
class _Relation:
    """A rule in the notation, with the operands of a module's parameters behind its inputs."""

    says: str
    notation: str
    operands: tuple[str, ...]
    sizes: dict[str, str]

    def __str__(self) -> str:
        return self.notation

    def validate(self, key: Key, arguments: list[str]) -> None:
        """Raise ValueError for names that do not fit together."""
        left, right = parse(self.notation)
        if unknown := [name for name in self.operands if name not in arguments and not name.startswith("self.")]:
            raise ValueError(f"it has no argument '{unknown[0]}', only {', '.join(arguments)}")
        if len(left) != len(self.operands):
            raise ValueError(
                f"'{self.notation}' has {len(left)} operands for {len(self.operands)} tensors "
                f"({', '.join(self.operands)}): name those that are meant, as in operands='{self.operands[0]}'"
            )
        if unknown := [name for name in self.sizes if name not in names_in((*left, *right))]:
            raise ValueError(f"sizes has the name '{unknown[0]}', which is not in '{self.notation}'")
        if isinstance(key, type):
            if new := sorted(names_in(right) - names_in(left) - set(self.sizes)):
                raise ValueError(f"the size of '{new[0]}' is not known: neither an operand nor sizes has it")
        elif unknown := [argument for argument in self.sizes.values() if argument not in arguments]:
            raise ValueError(f"it has no argument '{unknown[0]}', only {', '.join(arguments)}")

    def __call__(self, op: Op) -> Results:
        nodes = [value if isinstance(value := op[name], fx.Node) else None for name in self.operands]
        for node in op.inputs:
            for axis in op.dims(node) if node not in nodes else ():
                op.lock(axis, "the rule does not name this tensor")
        try:
            known = {name: int(self.size(op, argument)) for name, argument in self.sizes.items()}
            out = relate(op, self.notation, nodes, known)
        except ValueError as error:
            shapes = ["x".join(map(str, n.meta["shape"])) if n else "absent" for n in nodes]
            given = ", ".join(f"{name} {shape}" for name, shape in zip(self.operands, shapes, strict=True))
            raise InputError(f"the rule '{self.notation}' does not fit {op.location} ({given}): {error}") from error
        follow = {argument: op.node.meta["names"][name] for name, argument in self.sizes.items()}
        if isinstance(op.node.target, CustomModule):
            op.node.meta["attributes"] = follow
        else:
            op.expect(follow)
        return out

    def size(self, op: Op, argument: str) -> Tree:
        target = op.node.target
        return getattr(target.module, argument) if isinstance(target, CustomModule) else op[argument]

    def shapes(self, module: nn.Module, given: dict[str, Shape]) -> Sequence[Shape]:
        """The shapes of a module's results."""
        if absent := [name for name in self.operands if name.startswith("self.") and name not in given]:
            own = ", ".join(name for name in given if name.startswith("self."))
            raise InputError(f"{type(module).__name__} has no tensor '{absent[0]}' as its rule says, only {own}")
        known = {name: int(getattr(module, attribute)) for name, attribute in self.sizes.items()}
        try:
            return results(self.notation, [given.get(name) for name in self.operands], known)
        except ValueError as error:
            shapes = ", ".join(f"{name} {'x'.join(map(str, given.get(name, ())))}" for name in self.operands)
            raise Misfit(f"the rule '{self.notation}' does not fit {shapes}: {error}") from error


@dataclass(frozen=True)
class _Calling:
    """A rule that is a function, or None: whatever the operation touches is locked."""

    function: UserRule | None

    def __str__(self) -> str:
        return "whatever it touches is locked" if self.function is None else f"see {self.function.__qualname__}"

    def __call__(self, op: Op) -> Results:
        if self.function is None:
            return locked(op, "netsurgery.rule locks the operation")
        out = list(self.function(op))
        sizes = [None if dims is None else tuple(axis.size for axis in dims) for dims in out]
        if sizes != [None if shape is None else tuple(shape) for shape in op.shapes()]:
            raise InputError(f"the rule of {op.location} gives dimensions of sizes {sizes} to results of {op.shapes()}")
        return out


def _owned(parameters: Mapping[str, str]) -> list[str]:
    return [f"self.{name}" for name in parameters]


def _resolve(target: Key | CustomOpDef | str) -> tuple[Key, list[str], list[str]]:
    """The key of a target, the names of its arguments, and those of them that are tensors.

    Raises:
        ValueError: no such operation, or neither an operation nor a class of modules.
    """
    if isinstance(target, type) and issubclass(target, nn.Module):
        arguments = arguments_of(target)
        return target, arguments, arguments
    if isinstance(target, CustomOpDef):
        target = target._qualname
    if isinstance(target, str):
        namespace, _, name = target.partition("::")
        name, _, overload = name.partition(".")
        found = getattr(getattr(torch.ops, namespace), name, None) if name else None
        if found is None or (overload and overload not in found.overloads()):
            raise ValueError("no such operation is registered; import the library that defines it first")
        target = getattr(found, overload) if overload else found
    if not isinstance(target, OpOverload | OpOverloadPacket):
        raise ValueError("expected an operation such as 'mylib::scale', or a class of modules")
    one = target if isinstance(target, OpOverload) else getattr(target, target.overloads()[0])
    tensors = [a.name for a in one._schema.arguments if str(a.type) in ("Tensor", "Optional[Tensor]")]
    return target, [a.name for a in one._schema.arguments], tensors

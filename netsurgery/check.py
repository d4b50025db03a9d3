"""Does the model's own code follow the new sizes? Run it without data and compare every operation with the prediction.

Code may hard-code a size (``view(b, 2, 58, h, w)``, ``x[:, :32]``), or compute a number from one
(``x / x.shape[1]``). Such an operation is found here, before anything is changed, and its groups are frozen.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from netsurgery.attributes import follow
from netsurgery.axes import Axis, leaves
from netsurgery.copying import named_modules, named_tensors
from netsurgery.costs import Sizes
from netsurgery.errors import RewriteError, TraceError
from netsurgery.network import Network
from netsurgery.rules import SIZED, Op
from netsurgery.shapes import infer
from netsurgery.tracing import Inputs, Program, Watcher, bare_inputs, home, run_guarded, skeleton, tensors_in
from netsurgery.values import Known, draw, is_number, select

__all__ = ["obstacles"]


class _LeftPath(RuntimeError):
    """The code ran another operation than the recorded one."""


def obstacles(model: nn.Module, network: Network, counts: Mapping[str, int]) -> dict[str, str]:
    """Groups that the model's code does not let have these numbers of units, each with the reason.

    Raises:
        RewriteError: the code does not follow, and no group can be blamed for it.
    """
    changed = {network[name].channel: name for name, count in counts.items() if count != network[name].size}
    if not changed:
        return {}
    sizes = network.sizes(counts)
    shapes = {name: tuple(map(sizes, axes)) for name, axes in network.axes.items()}
    found: dict[str, str] = {}
    for program in network.programs:
        bare, names = skeleton(model, program.mode, shapes)
        follow(bare, network, sizes)
        kinds = {path: type(module) for path, module in named_modules(model).items()}
        inputs = bare_inputs(network.inputs)
        values = _known(network, sizes, bare, names, inputs, home(model)) if program.values != "none" else None
        checker = _Checker(program, network, kinds, sizes, changed, values)
        checker.begin(names, inputs, bare)
        try:
            checker.finish(run_guarded(bare, checker, inputs, home(model)))
        except TraceError as error:
            if not checker.blamed:  # what follows from a size already found wrong says nothing new
                checker.blame_module(f"the code refuses other sizes ({str(error.__cause__ or error).splitlines()[0]})")
        found.update({name: why for name, why in checker.blamed.items() if name not in found})
    return found


def _first(sizes: Sizes) -> Callable[[Axis], Tensor]:
    """At other sizes, the first units stand for those that stay."""
    return lambda channel: torch.arange(sizes(channel))


def _known(
    network: Network, sizes: Sizes, bare: nn.Module, names: Mapping[int, str], inputs: Inputs, device: torch.device
) -> Known:
    """Values that do not depend on floating-point numbers: those of integer tensors and inputs."""
    values = Known(device)
    for _, tensor in named_tensors(bare):
        name = names.get(id(tensor), "")
        if name in network.tensors and not is_number(tensor):
            values.of[tensor] = select(network.tensors[name].detach(), network.axes[name], _first(sizes))
    for tensor, value in zip(tensors_in(inputs), tensors_in(draw(network.inputs, values.device)), strict=True):
        if not is_number(tensor):
            values.of[tensor] = value.clone()
    return values


class _Checker(Watcher):
    def __init__(
        self,
        program: Program,
        network: Network,
        kinds: Mapping[str, type],
        sizes: Sizes,
        changed: Mapping[Axis, str],
        values: Known | None = None,
    ):
        super().__init__(values)
        self.known = values
        self.program = program
        self.nodes = iter(program.operations)
        self.sources: dict[int, Any] = {}  # by id of a tensor: what it was in the recorded run
        self.alive: list[Any] = []  # ids are only good while their tensors live
        self.network, self.kinds = network, kinds
        self.sizes, self.changed = sizes, changed
        self.blamed: dict[str, str] = {}
        self.innermost = [""]  # module paths around the last operation

    def blame(self, axes: Iterable[Axis], node: fx.Node, why: str) -> None:
        """Blame the changed groups in some axes, or else those of the module that an operation runs in."""
        names = [self.changed[leaf] for axis in axes for leaf in leaves(axis) if leaf in self.changed]
        reason = Op(node, None).reason(why)
        if names:
            self.blamed.update(dict.fromkeys(names, reason))
        else:
            self.blame_module(reason)

    def blame_module(self, reason: str) -> None:
        """Blame the groups of the innermost module that holds a changed one, and of all that run the same code.

        Raises:
            RewriteError: no module does.
        """
        groups = [group for group in self.network.groups if group.channel in self.changed]
        for path in reversed(self.innermost):
            if not any(_within(member.module, path) for group in groups for member in group.members):
                continue
            same = [
                other for other, kind in self.kinds.items() if kind is self.kinds[path] and kind is not nn.Sequential
            ]
            for place in [path, *same]:
                names = [g.name for g in groups if any(_within(member.module, place) for member in g.members)]
                self.blamed.update(dict.fromkeys(names, f"{reason} in {place or 'the model'}"))
            return
        raise RewriteError(f"the model's code does not follow the new sizes: {reason}")

    def begin(self, names: Mapping[int, str], inputs: Any, model: nn.Module) -> None:
        """Note what the tensors are that the run starts from."""
        self.sources.update(names)
        placeholders = [node for node in self.program.graph.nodes if node.op == "placeholder"]
        self.sources.update((id(t), node) for t, node in zip(tensors_in(inputs), placeholders, strict=True))
        self.alive.extend((inputs, model))

    def finish(self, outputs: Any) -> None:
        """Compare what the run ended with."""
        *_, output = self.program.graph.nodes
        results = [self.sources.get(id(self.stand_in(tensor))) for tensor in tensors_in(outputs)]
        if not self.blamed and (next(self.nodes, None) is not None or results != [*map(_source, output.args[0])]):
            self.blame_module("the code does other things at other sizes")

    def same(self, tensor: Tensor, other: Tensor) -> Tensor:
        self.alive.append(other)
        if id(tensor) in self.reals:
            self.reals[id(other)] = self.reals[id(tensor)]
        elif id(tensor) in self.sources:
            self.sources[id(other)] = self.sources[id(tensor)]
        return other

    def see(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        self.innermost = ["", *self.modules]
        node = next(self.nodes, None)
        if node is None or node.target is not func:
            raise _LeftPath(f"{func} runs where {node.target if node else 'nothing'} ran when it was traced")
        out = self.answer(node, func, args, kwargs)
        parts = out if isinstance(out, list | tuple) else [out]
        self.sources.update((id(t), (node, i) if parts is out else node) for i, t in enumerate(parts))
        self.alive.append(out)
        return out

    def answer(self, node: fx.Node, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The result of an operation; where it is another than predicted, the predicted one."""
        dims = node.meta["dims"] if isinstance(node.meta["shape"], list) else [node.meta["dims"]]
        predicted = [None if axes is None else tuple(map(self.sizes, axes)) for axes in dims]
        if self.tensors_differ(node, args) or self.arguments_differ(node, func, args, kwargs):
            return self.substitute(node, args, predicted)
        try:
            if self.known is None:
                out = infer(func, args, kwargs)
            else:
                out = self.known.follow(node, func, args, kwargs, _first(self.sizes))
        except (RuntimeError, ValueError, IndexError) as error:
            asked = next((v for v in args if isinstance(v, list | tuple) and _is_number(list(v))), None)
            hard_coded = [] if asked is None or dims[0] is None else self.wrong([(dims[0], asked)], only_old=True)
            self.blame(
                hard_coded or _touched(node, *node.all_input_nodes),
                node,
                f"fails at other sizes ({str(error).splitlines()[0]})",
            )
            return self.substitute(node, args, predicted)
        actual = [t.shape if isinstance(t, Tensor) else None for t in (out if isinstance(out, list | tuple) else [out])]
        if len(actual) != len(predicted):
            self.blame(_flat(dims), node, "returns another number of parts")
            return self.substitute(node, args, predicted)
        pairs = [
            (axes, shape) for axes, shape in zip(dims, actual, strict=True) if axes is not None and shape is not None
        ]
        if any(len(axes) != len(shape) for axes, shape in pairs):
            self.blame(_flat(dims), node, "returns another number of dimensions")
            return self.substitute(node, args, predicted)
        if wrong := self.wrong(pairs):
            size = next(n for axes, shape in pairs for a, n in zip(axes, shape, strict=True) if a is wrong[0])
            self.blame(wrong, node, f"size {size} is fixed by the code")
            return self.substitute(node, args, predicted)
        return out

    def wrong(self, pairs: list[tuple[Any, Any]], only_old: bool = False) -> list[Axis]:
        """Axes with another size than predicted: those that have the size before the surgery, or else all of them."""
        found = [
            (axis, n)
            for axes, shape in pairs
            if len(axes) == len(shape)
            for axis, n in zip(axes, shape, strict=True)
            if n != self.sizes(axis)
        ]
        old = [axis for axis, n in found if n == axis.size]
        return old if old or only_old else [axis for axis, _ in found]

    def tensors_differ(self, node: fx.Node, args: tuple[Any, ...]) -> bool:
        """Whether an operation reads a constant with other values; the groups that it concerns are blamed.

        Raises:
            _LeftPath: it reads other results than when it was traced.
        """
        for now, then in zip(_tensors(args), _tensors(node.args), strict=False):
            source = _source(then)
            constant = self.program.constants.get(source) if isinstance(source, str) else None
            if constant is None:
                if self.sources.get(id(now)) != source:
                    raise _LeftPath(f"{node.target} reads something else than when it was traced")
                continue
            real = self.reals.get(id(now))
            if real is None or constant.is_meta:  # its values cannot be seen without data
                differs = node.target.overloadpacket is not torch.ops.aten.index  # type: ignore[union-attr]
            else:
                differs = real.shape != constant.shape or not torch.equal(real, constant)
            if differs:
                touched = _touched(node, *node.all_input_nodes)
                self.blame(touched, node, "a tensor that the code makes may follow a size")
                return True
        return False

    def arguments_differ(self, node: fx.Node, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        """Whether an argument is another than it should be at these sizes; the groups that it concerns are blamed."""
        expected: dict[str, Axis] = node.meta.get("expected", {})
        sized = SIZED.get(node.target.overloadpacket, frozenset())  # type: ignore[union-attr]
        values = [(a.name, now, then) for a, now, then in zip(func._schema.arguments, args, node.args, strict=False)]
        for name, now, then in values + [(name, now, node.kwargs.get(name)) for name, now in kwargs.items()]:
            if isinstance(now, Tensor) or now is None:
                continue
            if name in expected:
                if name == "start" and isinstance(now, int):  # as slicing reads it
                    length = args[0].shape[Op(node, None)["dim"]]
                    now = min(max(now + length if now < 0 else now, 0), length)
                if isinstance(now, int) and now != self.sizes(expected[name]):
                    self.blame([expected[name]], node, f"{name}={now} is fixed by the code")
                    return True
            elif name not in sized and now != then and _is_number(now):
                self.blame(_touched(*node.all_input_nodes), node, f"the code computes {name}={then} from a size")
                return True
        return False

    def substitute(self, node: fx.Node, args: tuple[Any, ...], predicted: list[tuple[int, ...] | None]) -> Any:
        """Go on with tensors of the predicted sizes, to find all obstacles in one run."""
        given = next((value.dtype for value in pytree.tree_leaves(args) if isinstance(value, Tensor)), torch.float32)
        dtype = node.meta.get("dtype", given)
        out = [None if shape is None else torch.empty(shape, dtype=dtype, device="meta") for shape in predicted]
        return out if isinstance(node.meta["shape"], list) else out[0]


def _is_part(node: fx.Node) -> bool:
    return node.target is operator.getitem


def _source(node: fx.Node) -> Any:
    """What a recorded node stands for: a name, a result, or one of several results."""
    if node.op == "get_attr":
        return node.target
    return (node.args[0], node.args[1]) if _is_part(node) else node


def _tensors(value: Any) -> Iterator[Any]:
    """Tensors, or nodes in their place, among arguments."""
    for item in value:
        if isinstance(item, Tensor | fx.Node):
            yield item
        elif isinstance(item, list | tuple):
            yield from _tensors(item)


def _within(module: str, path: str) -> bool:
    return not path or module == path or module.startswith(f"{path}.")


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) or (
        isinstance(value, list) and all(isinstance(item, int | float) for item in value)
    )


def _touched(*nodes: fx.Node) -> list[Axis]:
    return [axis for node in nodes for axis in _flat(node.meta["dims"])]


def _flat(dims: Any) -> list[Axis]:
    if isinstance(dims, Axis):
        return [dims]
    return [axis for item in dims or () if item is not None for axis in _flat(item)]

"""Does the model's own code follow the new sizes? Run it without data and compare every operation with the prediction.

Code may hard-code a size (``view(b, 2, 58, h, w)``, ``x[:, :32]``), or compute a number from one
(``x / x.shape[1]``). Such an operation is found here, before anything is changed, and its groups are frozen.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from netsurgery.attributes import follow
from netsurgery.axes import Axis, leaves
from netsurgery.copying import named_modules
from netsurgery.costs import Sizes
from netsurgery.errors import RewriteError, TraceError
from netsurgery.network import Network
from netsurgery.rules import SIZED, Op
from netsurgery.shapes import infer
from netsurgery.tracing import Program, Watcher, run_guarded, skeleton

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
        bare, _ = skeleton(model, program.mode, shapes)
        follow(bare, network, sizes)
        kinds = {path: type(module) for path, module in named_modules(model).items()}
        checker = _Checker(program, network, kinds, sizes, changed)
        inputs = pytree.tree_map_only(Tensor, lambda t: torch.empty_like(t, device="meta"), network.inputs)
        try:
            run_guarded(bare, checker, inputs)
        except TraceError as error:
            if not checker.blamed:  # what follows from a size already found wrong says nothing new
                checker.blame_module(f"the code refuses other sizes ({str(error.__cause__ or error).splitlines()[0]})")
        found.update({name: why for name, why in checker.blamed.items() if name not in found})
    return found


class _Checker(Watcher):
    def __init__(
        self, program: Program, network: Network, kinds: Mapping[str, type], sizes: Sizes, changed: Mapping[Axis, str]
    ):
        super().__init__()
        self.nodes = iter(
            [n for n in program.graph.nodes if n.op == "call_function" and n.target.__name__ != "getitem"]
        )
        self.network, self.kinds = network, kinds
        self.sizes, self.changed = sizes, changed
        self.blamed: dict[str, str] = {}
        self.innermost: list[str] = []  # module paths around the last operation

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

    def see(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        self.innermost = list(self.modules)
        node = next(self.nodes, None)
        if node is None or node.target is not func:
            raise _LeftPath(f"{func} runs where {node.target if node else 'nothing'} ran when it was traced")
        dims = node.meta["dims"] if isinstance(node.meta["shape"], list) else [node.meta["dims"]]
        predicted = [None if axes is None else tuple(map(self.sizes, axes)) for axes in dims]
        if self.arguments_differ(node, func, args, kwargs):
            return self.substitute(node, args, predicted)
        try:
            out = infer(func, args, kwargs)
        except (RuntimeError, ValueError, IndexError) as error:
            asked = next((v for v in args if isinstance(v, list | tuple) and _is_number(list(v))), ())
            wrong = [
                (axis, n)
                for axes in dims[:1]
                if axes is not None and len(asked) == len(axes) and isinstance(node.meta["shape"], torch.Size)
                for axis, n in zip(axes, asked, strict=True)
                if n == axis.size != self.sizes(axis)
            ]
            touched = [axis for source in [node, *node.all_input_nodes] for axis in _flat(source.meta["dims"])]
            self.blame(
                [axis for axis, _ in wrong] or touched, node, f"fails at other sizes ({str(error).splitlines()[0]})"
            )
            return self.substitute(node, args, predicted)
        actual = [t.shape if isinstance(t, Tensor) else None for t in (out if isinstance(out, list | tuple) else [out])]
        if len(actual) != len(predicted):
            self.blame([axis for axes in dims for axis in axes or ()], node, "returns another number of parts")
            return self.substitute(node, args, predicted)
        wrong = [
            (axis, got)
            for axes, shape, want in zip(dims, actual, predicted, strict=True)
            if axes is not None and shape is not None and tuple(shape) != want
            for axis, got in zip(axes, shape, strict=True)
            if self.sizes(axis) != got
        ]
        if wrong:
            wrong = [(axis, got) for axis, got in wrong if got == axis.size] or wrong  # the size before the surgery
            self.blame([axis for axis, _ in wrong], node, f"size {wrong[0][1]} is fixed by the code")
            return self.substitute(node, args, predicted)
        return out

    def arguments_differ(self, node: fx.Node, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        """Whether an argument is another than it should be at these sizes; the groups that it concerns are blamed."""
        expected: dict[str, Axis] = node.meta.get("expected", {})
        sized = SIZED.get(node.target.overloadpacket, frozenset())  # type: ignore[union-attr]
        values = [(a.name, now, then) for a, now, then in zip(func._schema.arguments, args, node.args, strict=False)]
        for name, now, then in values + [(name, now, node.kwargs.get(name)) for name, now in kwargs.items()]:
            if isinstance(now, Tensor) or now is None:
                continue
            if name in expected:
                if isinstance(now, int) and now >= 0 and now != self.sizes(expected[name]):
                    self.blame([expected[name]], node, f"{name}={now} is fixed by the code")
                    return True
            elif name not in sized and now != then and _is_number(now):
                touched = [axis for source in node.all_input_nodes for axis in _flat(source.meta["dims"])]
                self.blame(touched, node, f"the code computes {name}={then} from a size")
                return True
        return False

    def substitute(self, node: fx.Node, args: tuple[Any, ...], predicted: list[tuple[int, ...] | None]) -> Any:
        """Go on with tensors of the predicted sizes, to find all obstacles in one run."""
        dtype = next((value.dtype for value in pytree.tree_leaves(args) if isinstance(value, Tensor)), torch.float32)
        out = [None if shape is None else torch.empty(shape, dtype=dtype, device="meta") for shape in predicted]
        return out if isinstance(node.meta["shape"], list) else out[0]


def _within(module: str, path: str) -> bool:
    return not path or module == path or module.startswith(f"{path}.")


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) or (
        isinstance(value, list) and all(isinstance(item, int | float) for item in value)
    )


def _flat(dims: Any) -> list[Axis]:
    if isinstance(dims, Axis):
        return [dims]
    return [axis for item in dims if item is not None for axis in _flat(item)]

"""Does the model's own code follow the new sizes? Run it without data and compare every operation with the prediction.

Code may hard-code a size (``view(b, 2, 58, h, w)``, ``x[:, :32]``), or compute a number from one
(``x / x.shape[1]``). Such an operation is found here, before anything is changed, and the groups it concerns are frozen.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from netsurgery.attributes import follow
from netsurgery.axes import Axis, leaves
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
        bare, names = skeleton(model, program.mode, shapes)
        follow(bare, network, sizes)
        checker = _Checker(program, sizes, changed)
        inputs = pytree.tree_map_only(Tensor, lambda t: torch.empty_like(t, device="meta"), network.inputs)
        try:
            run_guarded(bare, checker, inputs)
        except TraceError as error:
            checker.blame_module(network, str(error))
        found.update({name: why for name, why in checker.blamed.items() if name not in found})
    return found


class _Checker(Watcher):
    def __init__(self, program: Program, sizes: Sizes, changed: Mapping[Axis, str]):
        super().__init__()
        self.nodes = iter([n for n in program.graph.nodes if n.op == "call_function" and n.target.__name__ != "getitem"])
        self.sizes, self.changed = sizes, changed
        self.blamed: dict[str, str] = {}
        self.module_paths: list[str] = []

    def blame(self, axes: Iterable[Axis], node: fx.Node, why: str) -> None:
        names = [self.changed[leaf] for axis in axes for leaf in leaves(axis) if leaf in self.changed]
        reason = Op(node, None).reason(why)
        if not names:
            raise RewriteError(f"the model's code does not follow the new sizes, {reason}; exclude the groups around it")
        self.blamed.update(dict.fromkeys(names, reason))

    def blame_module(self, network: Network, error: str) -> None:
        """The code itself raised: blame the groups of the innermost module that holds a changed one."""
        if self.blamed:
            return  # what follows from a size already found wrong says nothing new
        for path in reversed(self.module_paths):
            prefix = f"{path}." if path else ""
            members = ((g, m) for g in network.groups if g.channel in self.changed for m in g.members)
            names = [g.name for g, m in members if m.parameter.startswith(prefix)]
            if names:
                self.blamed.update(dict.fromkeys(names, f"the code of {path or 'the model'} refuses other sizes: {error}"))
                return
        raise RewriteError(f"the model's code does not follow the new sizes: {error}")

    def see(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        self.module_paths = list(self.modules)
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
            touched = [axis for source in [node, *node.all_input_nodes] for axis in _flat(source.meta["dims"])]
            self.blame(touched, node, f"fails at other sizes ({str(error).splitlines()[0]})")
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
        names = [argument.name for argument in func._schema.arguments]
        now = {**dict(zip(names, args, strict=False)), **kwargs}
        then = Op(node, None).arguments
        expected: dict[str, Axis] = node.meta.get("expected", {})
        sized = SIZED.get(node.target.overloadpacket, frozenset()) | expected.keys()  # type: ignore[union-attr]
        for name, value in now.items():
            if name in expected:
                axis = expected[name]
                if isinstance(value, int) and value >= 0 and value != self.sizes(axis):
                    self.blame([axis], node, f"{name}={value} is fixed by the code")
                    return True
            elif name not in sized and _is_number(value) and value != then[name]:
                touched = [axis for source in node.all_input_nodes for axis in _flat(source.meta["dims"])]
                self.blame(touched, node, f"the code computes {name}={then[name]} from a size")
                return True
        return False

    def substitute(self, node: fx.Node, args: tuple[Any, ...], predicted: list[tuple[int, ...] | None]) -> Any:
        """Go on with tensors of the predicted sizes, to find all obstacles in one run."""
        dtype = next((value.dtype for value in pytree.tree_leaves(args) if isinstance(value, Tensor)), torch.float32)
        out = [None if shape is None else torch.empty(shape, dtype=dtype, device="meta") for shape in predicted]
        return out if isinstance(node.meta["shape"], list) else out[0]


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) or (isinstance(value, list) and all(isinstance(item, int | float) for item in value))


def _flat(dims: Any) -> list[Axis]:
    if isinstance(dims, Axis):
        return [dims]
    return [axis for item in dims if item is not None for axis in _flat(item)]

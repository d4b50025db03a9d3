"""Compare the gradients of a rewritten ``forward``, and its dtypes under autocast, with those of the original code.

Both run on tensors without data that require gradients. Autograd must record the same operations for both, in the same
order, down to the same tensors; under autocast, its casts are among them.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping

import torch
from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils import _pytree as pytree

from netsurgery.capture.caches import caches_kept
from netsurgery.capture.copies import copy_with, named_tensors
from netsurgery.capture.inputs import Tree, tensors_in
from netsurgery.capture.meta_run import RAISED_BY_MODELS, without_fast_path
from netsurgery.capture.program import Call, Named
from netsurgery.capture.randomness import seeded

__all__ = ["difference"]


def difference(
    module: nn.Module, forward: Callable[..., Tree], call: Call, tensors: Mapping[str, Tensor], training: bool
) -> str | None:
    """A difference between a ``forward`` and that of a module, for a recorded call; None if there is none.

    Both run under autocast, whose casts are compared, too, or without it where the module's own code does not run
    under it. Where the module's code runs in neither way, no difference is found.

    Args:
        tensors: the model's, by name.
        training: the mode of the module.
    """
    for half in (True, False):
        with contextlib.suppress(_DoesNotRun):
            return _unlike(*_both(module, forward, call, tensors, training, half))
    return None


class _DoesNotRun(Exception):
    """The code of a module does not run without data, or under autocast."""


def _both(
    module: nn.Module,
    forward: Callable[..., Tree],
    call: Call,
    tensors: Mapping[str, Tensor],
    training: bool,
    half: bool,
) -> tuple[list[Tensor] | str, list[Tensor]]:
    """The results of a ``forward``, or the error that it raises, and the results of the module's own.

    Raises:
        _DoesNotRun: the module's own raises an error.
    """
    device = next((t.device for t in tensors.values() if not t.is_meta), torch.device("cpu"))
    with FakeTensorMode(allow_non_fake_inputs=True), _differentiated(module, device, half):
        own = {id(tensor): _without_data(tensor, device) for _, tensor in named_tensors(module)}
        meta = copy_with(module, own)
        meta.eval()  # some return nothing
        meta.training = training
        given = [v for v in pytree.tree_leaves((call.args, call.kwargs)) if isinstance(v, fx.Node | Named)]
        leaves: Leaves = {value: _Given(value, tensors, device) for value in given}
        try:
            wanted = _run(type(meta).forward, meta, call, leaves)
        except RAISED_BY_MODELS as error:
            raise _DoesNotRun from error
        try:
            return _run(forward, meta, call, leaves), wanted
        except RAISED_BY_MODELS as error:
            return (str(error).splitlines() or [type(error).__name__])[0], wanted


@contextlib.contextmanager
def _differentiated(module: nn.Module, device: torch.device, half: bool) -> Iterator[None]:
    """Record gradients, whatever context is around; switch autocast on if ``half``, else off."""
    kind = device.type if torch.amp.is_autocast_available(device.type) else "cpu"
    with (
        torch.inference_mode(False),
        torch.enable_grad(),
        torch.autocast(kind, torch.get_autocast_dtype(kind), enabled=half),
        # Scripted functions are one operation each once they are optimised.
        torch.jit.optimized_execution(False),  # type: ignore[attr-defined]
        seeded(0, device),
        caches_kept(module),
        without_fast_path(),
    ):
        yield


def _without_data(tensor: Tensor, device: torch.device) -> Tensor:
    """A tensor of a module without data; all parameters require gradients, also those that are not trained."""
    empty = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=device)
    if isinstance(tensor, nn.Parameter):
        return nn.Parameter(empty, requires_grad=_differs(tensor.dtype))
    return empty.requires_grad_(tensor.requires_grad)


def _differs(dtype: torch.dtype) -> bool:
    return dtype.is_floating_point or dtype.is_complex


class _Given:
    """Makes a stand-in for one input of a module: not a leaf of autograd, so that the code may write to it."""

    def __init__(self, value: fx.Node | Named, tensors: Mapping[str, Tensor], device: torch.device):
        if isinstance(value, Named):
            self.layout, dtype = (tensors[value].shape, tensors[value].stride()), tensors[value].dtype
        else:
            self.layout, dtype = value.meta["layout"], value.meta["dtype"]
        length = 1 + sum((n - 1) * stride for n, stride in zip(*self.layout, strict=True))
        self.leaf = torch.empty(length, dtype=dtype, device=device, requires_grad=_differs(dtype))

    def __call__(self) -> Tensor:
        return self.leaf.clone().as_strided(*self.layout)


Leaves = Mapping[fx.Node | Named, _Given]


def _run(forward: Callable[..., Tree], meta: nn.Module, call: Call, leaves: Leaves) -> list[Tensor]:
    """The results of a ``forward``, and its inputs after the run."""
    given = {value: leaf() for value, leaf in leaves.items()}

    def stand_in(value: object) -> object:
        return given[value] if isinstance(value, fx.Node | Named) else value

    args, kwargs = pytree.tree_map(stand_in, (call.args, call.kwargs))
    torch.clear_autocast_cache()
    out = forward(meta, *args, **kwargs)
    return [*tensors_in(out), *given.values()]


def _unlike(found: list[Tensor] | str, wanted: list[Tensor]) -> str | None:
    """A difference between results, or between the operations that made them."""
    if isinstance(found, str):
        return f"fails ({found})"
    if len(found) != len(wanted):
        return f"returns {len(found)} tensors for {len(wanted)}"
    for one, other in zip(found, wanted, strict=True):
        if one.shape != other.shape or one.dtype != other.dtype:
            return f"returns {list(one.shape)} of {one.dtype} for {list(other.shape)} of {other.dtype}"
    return _backward_unlike([(one.grad_fn, other.grad_fn) for one, other in zip(found, wanted, strict=True)])


GradFn = torch.autograd.graph.Node | None


def _backward_unlike(pairs: list[tuple[GradFn, GradFn]]) -> str | None:
    """The first difference between two records of autograd, on the way from results to the tensors they end in."""
    twins: dict[GradFn, GradFn] = {}
    while pairs:
        one, other = pairs.pop()
        if twins.setdefault(one, other) is not other or _kind(one) != _kind(other):
            return f"goes through {_name(one)} where the code goes through {_name(other)}"
        if one is not None and other is not None:
            nexts = one.next_functions, other.next_functions
            if [result for _, result in nexts[0]] != [result for _, result in nexts[1]]:
                return f"reads other results in {_name(one)}"
            pairs += [(a, b) for (a, _), (b, _) in zip(*nexts, strict=True) if a not in twins]
    return None


def _kind(node: GradFn) -> tuple[str, int]:
    """The name of an operation of the backward run, and the identity of the tensor that it ends in, if it does."""
    return (_name(node), id(getattr(node, "variable", None)))


def _name(node: GradFn) -> str:
    return "nothing" if node is None else str(node.name())

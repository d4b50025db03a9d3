"""The sources of a model's weights: a file, its maker, or the random generator."""

from __future__ import annotations

import pickle
import struct
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeGuard

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from netsurgery.errors import InputError
from netsurgery.model_lookup import build
from netsurgery.tables import first_of

__all__ = ["Draws", "fill", "prepared", "read_weights"]

State = Mapping[str, Tensor]

#: The errors that reading a file can raise that is no state dict, or a broken one.
UNREADABLE = (
    *(pickle.UnpicklingError, EOFError, OSError, RuntimeError, ValueError, LookupError),
    *(TypeError, AttributeError, AssertionError, struct.error),
)
FILLED = ("zeros", "ones", "full", "new_zeros", "new_ones", "new_full", "scalar_tensor", "arange", "linspace", "eye")
UNFILLED = ("empty", "new_empty")
OVERWRITTEN = ("copy", "fill", "zero", "set")


class Draws(TorchDispatchMode):
    """Tracks tensors that hold random numbers or uninitialised memory, or were computed from such.

    A tensor is free of them again once all of it is written over, as ``load_state_dict`` does. Constants count as
    neither: a batch norm starts from ones.

    Example:
        >>> import torch
        >>> from netsurgery.weight_sources import Draws
        >>> with Draws() as draws:
        ...     layer = torch.nn.Linear(2, 3)
        ...     _ = layer.load_state_dict({"weight": torch.eye(3)[:, :2], "bias": layer.bias})
        >>> draws.random(layer)
        ['bias']
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._drawn: dict[int, torch.UntypedStorage] = {}  # holding them keeps their keys from being used again

    def __torch_dispatch__(
        self, func: Any, types: object, args: Sequence[object] = (), kwargs: dict[str, object] | None = None
    ) -> object:
        result = func(*args, **(kwargs or {}))
        name = func._schema.name.removeprefix("aten::")
        writes = func._schema.is_mutable
        overwrites = writes and name.rstrip("_") in OVERWRITTEN
        sources = () if name.startswith(FILLED) else pytree.tree_leaves((args, kwargs))[1 if overwrites else 0 :]
        drawn = torch.Tag.nondeterministic_seeded in func.tags or (
            name.startswith(UNFILLED) or any(self._holds(one) for one in sources)
        )
        for one in pytree.tree_leaves((result, args[:1] if writes else ())):
            if isinstance(one, Tensor) and drawn:
                self._note(one)
            elif overwrites and self._holds(one) and _is_whole(one):
                del self._drawn[_key(one)]
        return result

    def random(self, model: nn.Module) -> list[str]:
        """The names of a model's parameters that hold such numbers."""
        return [name for name, one in model.named_parameters() if self._holds(one)]

    def _holds(self, value: object) -> bool:
        return isinstance(value, Tensor) and _key(value) in self._drawn

    def _note(self, tensor: Tensor) -> None:
        if tensor.numel() and (key := _key(tensor)):
            self._drawn[key] = tensor.untyped_storage()


def _key(tensor: Tensor) -> int:
    """The storage of a tensor; 0 where it has none, as sparse ones and wrappers of other tensors."""
    try:
        return int(tensor.untyped_storage()._cdata)
    except NotImplementedError:
        return 0


def _is_whole(tensor: Tensor) -> bool:
    """True if a tensor is all of its storage, not a slice."""
    return tensor.numel() * tensor.element_size() >= tensor.untyped_storage().nbytes()


def read_weights(path: Path) -> tuple[State, str]:
    """Read the state dict in a file; with it, in words, where it was found.

    Args:
        path: safetensors, or what ``torch.save`` wrote: a state dict, or a dictionary that holds one, as checkpoints
            of training loops do. No code in it is run.

    Raises:
        InputError: there is no such file, or it holds no state dict, several, or more than tensors and plain values.
    """
    if not path.is_file():
        raise InputError(f"{path}: there is no such file")
    try:
        found = _read(path)
    except UNREADABLE as error:
        hint = "it holds Python objects, whose code is not run" if "Unsupported" in str(error) else _first_line(error)
        raise InputError(
            f"{path} cannot be read ({hint}): pass a safetensors file, or one that torch.save(model.state_dict(), "
            "file) wrote"
        ) from error
    return _state_in(found, path)


def _read(path: Path) -> object:
    with path.open("rb") as file:
        start = file.read(9)
    if start[8:] != b"{":  # safetensors: the length of its header, and the header, which is JSON
        with warnings.catch_warnings():
            warnings.filterwarnings(
                "ignore", "Detected pickle protocol", UserWarning
            )  # it is an error, or does no harm
            return torch.load(path, map_location="cpu", weights_only=True)
    from safetensors import SafetensorError, safe_open

    from netsurgery.training import checkpoints  # stands above this module, and is heavy

    try:
        with safe_open(path, "pt") as opened:
            if "state" in (opened.metadata() or {}):
                return checkpoints.read(path)
            return {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118  # no dictionary
    except SafetensorError as error:
        raise ValueError(str(error)) from error


def _first_line(error: BaseException) -> str:
    return str(error).strip().partition("\n")[0][:150] or type(error).__name__


def _state_in(found: object, path: Path) -> tuple[State, str]:
    if _is_state(found):
        return found, str(path)
    states = {key: value for key, value in found.items() if _is_state(value)} if isinstance(found, Mapping) else {}
    if len(states) != 1:
        held = f"several state dicts ({', '.join(map(str, states))})" if states else "no state dict"
        raise InputError(
            f"{path} holds {held}: save the one that is meant alone, by torch.save(model.state_dict(), file)"
        )
    [(key, state)] = states.items()
    return state, f"'{key}' in {path}"


def _is_state(value: object) -> TypeGuard[State]:
    """True for a state dict: names and tensors, and entries that modules keep beside their tensors."""
    return (
        isinstance(value, Mapping)
        and any(isinstance(one, Tensor) for one in value.values())
        and all(
            isinstance(key, str) and (isinstance(one, Tensor) or key.endswith("_extra_state"))
            for key, one in value.items()
        )
    )


def fill(model: nn.Module, state: State, source: str) -> None:
    """Load a state dict into a model of the same names and shapes; a prefix of all names, as wrappers add, is dropped.

    Raises:
        InputError: a tensor is missing, has no place, or has another shape; nothing is loaded then.
    """
    wanted = model.state_dict()
    state = _without_prefix(state, wanted)
    shapes = [
        f"{name} is {_shape(value)} there and {_shape(wanted[name])} here"
        for name, value in state.items()
        if isinstance(value, Tensor) and name in wanted and value.shape != wanted[name].shape
    ]
    given = {_place(value) for name, value in wanted.items() if name in state}  # of tied tensors one is enough
    missing = [
        f"{name} is missing"
        for name, value in wanted.items()
        if not (
            name in state or name.endswith("num_batches_tracked") or _place(value) in given
        )  # older files have none
    ]
    extra = [f"{name} has no place" for name in state if name not in wanted]
    if wrong := [*shapes, *missing, *extra]:
        raise InputError(f"{source} is for another model than this {type(model).__name__}: {first_of(wrong)}")
    model.load_state_dict(state, strict=False)


def _place(tensor: Tensor) -> object:
    """A key that tied tensors share, and no others."""
    return (tensor.data_ptr(), tensor.shape, tensor.stride()) if tensor.numel() and not tensor.is_meta else object()


def _shape(tensor: Tensor) -> str:
    return "x".join(map(str, tensor.shape)) or "a single number"


def _without_prefix(state: State, wanted: State) -> State:
    """The state dict without a prefix of all names, such as ``module.`` of DistributedDataParallel."""
    first = next(iter(wanted), "")
    prefix = next((name.removesuffix(first) for name in state if name.endswith(f".{first}")), "")
    if first in state or not all(name.startswith(prefix) for name in state):
        return state
    return {name.removeprefix(prefix): value for name, value in state.items()}


def prepared(name: str, file: Path | None = None, random: bool = False) -> tuple[nn.Module, str]:
    """Build a model by its name; with it, in words, the source of its weights.

    Args:
        name: as for ``netsurgery.model_lookup.build``.
        file: a file to load into it, as for ``read_weights``.
        random: whether its weights may be random.

    Raises:
        InputError: as those do; weights are named in two ways; or most of them are random and that was not asked for.
    """
    by_name = "@" in name
    if sum((by_name, file is not None, random)) > 1:
        raise InputError("name the weights in one way: MODEL@WEIGHTS, --weights FILE or --random-weights")
    if file is not None:
        state, source = read_weights(file)  # before what takes longer
    with Draws() as draws:
        model = build(name)
        if file is not None:
            fill(model, state, source)
    sizes = {key: one.numel() for key, one in model.named_parameters()}
    drawn = draws.random(model)
    if 2 * sum(sizes[key] for key in drawn) > sum(sizes.values()):
        if random:
            return model, "random, as asked for"
        published = {"torchvision": f"{name}@DEFAULT, ", "timm": f"{name}@pretrained, "}.get(name.partition(":")[0], "")
        raise InputError(
            f"{name} has random weights: pass {'' if by_name else published}--weights FILE, or --random-weights if "
            "these are meant"
        )
    said = source if file is not None else f"published, {name}" if by_name else f"as {name} returns them"
    return model, said + (f"; random: {first_of(drawn)}" if drawn else "")

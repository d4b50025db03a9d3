"""Tensors without data that pass for tensors of the model's device.

Code asks where a tensor is (``torch.zeros(n, device=x.device)``, ``if x.is_cuda``), reads it into Python, and makes
tensors of numbers beside it. torch answers such calls without asking a dispatch mode, so they are answered here. So are
functions of torch that read the lengths of sequences from memory.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import _disable_current_modes

from netsurgery.capture.inputs import Args, Kwargs, Tree

__all__ = ["FakeDevice"]


class FakeDevice(TorchFunctionMode):
    """Lets tensors without data pass for tensors of the model's device, whose values Python can read.

    Args:
        read: the value of a tensor.
        alias: called for ``tensor.data``, which no operation makes, with the tensor and the one that shares its memory.
        assign: called before ``tensor.data = value``, with the tensor and the value.
    """

    def __init__(
        self,
        read: Callable[[Tensor], Tensor],
        device: torch.device,
        alias: Callable[[Tensor, Tensor], Tensor] | None = None,
        assign: Callable[[Tensor, Tensor], Tensor] | None = None,
    ):
        super().__init__()
        self.read, self.alias, self.assign = read, alias, assign
        kind = device.type
        self.answers = {
            torch.Tensor.device.__get__: device,
            torch.Tensor.is_meta.__get__: kind == "meta",  # type: ignore[attr-defined]
            torch.Tensor.is_cpu.__get__: kind == "cpu",  # type: ignore[attr-defined]
            torch.Tensor.is_cuda.__get__: kind == "cuda",  # type: ignore[attr-defined]
        }

    def __torch_function__(
        self, func: Callable[..., Tree], types: object, args: Args = (), kwargs: Kwargs | None = None
    ) -> Tree:
        kwargs = kwargs or {}
        if func not in self.answers and func not in _HANDLED:
            return func(*args, **kwargs)
        meta = bool(args) and isinstance(args[0], Tensor) and args[0].is_meta
        if meta and func in self.answers:
            return self.answers[func]
        if meta and func in _MOVES:
            return args[0]
        if meta and func is torch.Tensor.to:
            return func(*map(_to_meta, args), **{k: _to_meta(v) for k, v in kwargs.items()})
        if meta and func == _GET_DATA and self.alias is not None:
            return self.alias(args[0], func(*args))
        if meta and func == _SET_DATA and self.assign is not None:
            return func(args[0], self.assign(*args))
        if func in _READS:
            args = (self.read(args[0]), *args[1:])
            with _disable_current_modes():
                return func(*args, **kwargs)
        if func in _INDEXES:
            where = args[1] if isinstance(args[1], tuple) else (args[1],)
            args = (args[0], tuple(map(self.as_index, where)), *args[2:])
        elif func is torch.Tensor.new_tensor and not any(isinstance(value, Tensor) for value in args[1:]):
            kwargs = {"dtype": args[0].dtype, **kwargs}
            func, args = torch.tensor, args[1:]
        elif func in _LENGTHS:
            return self.with_lengths(func, args, kwargs)
        if func in (torch.tensor, torch.as_tensor) and not (args and isinstance(args[0], Tensor)):
            args = self.as_numbers(args)
            kwargs = {key: value for key, value in kwargs.items() if key != "device"}
        return func(*args, **kwargs)

    def with_lengths(self, func: Callable[..., Tree], args: Args, kwargs: Kwargs) -> Tree:
        """The result of a function that reads lengths from memory: it gets lengths that have data."""
        if func in (torch.tensor_split, torch.Tensor.tensor_split):
            where = next((value for value in (*args[1:], *kwargs.values()) if isinstance(value, Tensor)), None)
            read: Tree = self.as_numbers([where])[0] if where is not None else None
            named = {key: read if value is where else value for key, value in kwargs.items()}
            return func(*[read if value is where and read is not None else value for value in args], **named)
        if func in _RECURRENT and not (len(args) > 3 and isinstance(args[3], list | tuple)):
            return func(*args, **kwargs)  # no packed sequence
        if not isinstance(args[1], Tensor):
            return func(*args, **kwargs)
        lengths = self.read(args[1]) if args[1].is_meta else args[1]
        if func is _UNPACK:
            return _padded(args[0], self.as_numbers([lengths])[0], *args[2:], **kwargs)
        return func(args[0], lengths, *args[2:], **kwargs)

    def as_numbers(self, value: Tree) -> Tree:
        """The same value with numbers in place of tensors."""
        read = pytree.tree_map_only(Tensor, self.read, value)
        with _disable_current_modes():
            return pytree.tree_map_only(Tensor, Tensor.tolist, read)

    def as_index(self, index: object) -> object:
        """An index that lists positions, as a tensor that has data."""
        if not isinstance(index, list | range) or any(isinstance(i, slice | None | list) for i in index):
            return index
        found = torch.tensor(self.as_numbers(list(index)))
        return found if found.numel() else found.long()


def _padded(
    data: Tensor, batch_sizes: list[int], batch_first: bool, padding_value: float, total_length: int
) -> tuple[Tensor, Tensor]:
    """The result of ``_pad_packed_sequence``, whose own implementation writes the lengths into memory."""
    steps, rows = max(total_length, len(batch_sizes)), batch_sizes[0]
    places = torch.tensor([step * rows + row for step, n in enumerate(batch_sizes) for row in range(n)])
    flat = data.new_full((steps * rows, *data.shape[1:]), padding_value).index_copy(0, places, data)
    out = flat.view(steps, rows, *data.shape[1:])
    lengths = torch.tensor([sum(n > row for n in batch_sizes) for row in range(rows)])
    return (out.transpose(0, 1) if batch_first else out), lengths


_PACK, _UNPACK = torch._VF._pack_padded_sequence, torch._VF._pad_packed_sequence
_RECURRENT = {torch._VF.lstm, torch._VF.gru, torch._VF.rnn_tanh, torch._VF.rnn_relu}
_LENGTHS = {_PACK, _UNPACK, torch.tensor_split, torch.Tensor.tensor_split, *_RECURRENT}
_INDEXES = {torch.Tensor.__getitem__, torch.Tensor.__setitem__}
_READS = {torch.Tensor.numpy, torch.Tensor.tolist, torch.Tensor.__array__}
_MOVES = {torch.Tensor.cpu, torch.Tensor.cuda}
_GET_DATA, _SET_DATA = torch.Tensor.data.__get__, torch.Tensor.data.__set__  # type: ignore[attr-defined]
_HANDLED = {
    _GET_DATA,
    _SET_DATA,
    *_READS,
    *_MOVES,
    *_INDEXES,
    *_LENGTHS,
    torch.Tensor.to,
    torch.Tensor.new_tensor,
    torch.tensor,
    torch.as_tensor,
}


def _to_meta(value: Tree) -> Tree:
    """An argument in which each device is the meta device."""
    return torch.device("meta") if isinstance(value, str | torch.device) else value

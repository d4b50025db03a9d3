"""Entries of buffers that stay as they are, whatever a forward pass writes into them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from netsurgery.capture.copies import named_modules, named_tensors

__all__ = ["HeldBuffers"]


class HeldBuffers:
    """The old entries of all buffers of a model, such as running statistics, which are held.

    Args:
        model: its buffers keep their present values.
        new: by name of a tensor which of its entries are free: bool.
    """

    def __init__(self, model: nn.Module, new: Mapping[str, Tensor]):
        names = {id(tensor): name for name, tensor in named_tensors(model)}
        self._owners: dict[str, _Owner] = {}
        for path, module in named_modules(model).items():
            own = {key: one for key, one in module._buffers.items() if one is not None}
            if own:
                free = {key: new[names[id(one)]] for key, one in own.items() if names[id(one)] in new}
                self._owners[path] = _Owner(module, free)

    def watch(self, model: nn.Module, *, normalise: bool) -> None:
        """Put the held entries back after each forward pass of a module that owns some, and of the model.

        Args:
            normalise: whether batch norms take running statistics for old units in training mode, too.
        """
        modules = named_modules(model)
        for path, owner in self._owners.items():
            modules[path].register_forward_hook(owner.put_back, always_call=True)
            modules[path].register_load_state_dict_post_hook(owner.take)
            if normalise and isinstance(modules[path], nn.modules.batchnorm._BatchNorm):
                modules[path].register_forward_hook(owner.normalise, with_kwargs=True)  # after they have been put back
        model.register_forward_hook(self.put_back, always_call=True)  # its code may hand buffers to functions

    def put_back(self, model: nn.Module, *_: object) -> None:
        """Put the held entries back now, in the model or in a copy of it."""
        modules = named_modules(model)
        for path, owner in self._owners.items():
            owner.put_back(modules[path])

    @staticmethod
    def forget(model: nn.Module) -> None:
        """Stop to hold the buffers of a model, or of a copy of it."""
        for module in model.modules():
            for hooks in (module._forward_hooks, module._load_state_dict_post_hooks):
                for key, hook in list(hooks.items()):
                    if isinstance(getattr(hook, "__self__", None), HeldBuffers | _Owner):
                        del hooks[key]
                        module._forward_hooks_always_called.pop(key, None)
                        module._forward_hooks_with_kwargs.pop(key, None)


class _Owner:
    """The buffers of one module."""

    def __init__(self, module: nn.Module, free: dict[str, Tensor]):
        self._free = free
        self._kept: dict[str, Tensor] = {}
        self.take(module)

    def take(self, module: nn.Module, *_: object) -> None:
        """Hold the present values, such as those after ``load_state_dict``."""
        self._kept = {key: one.detach().clone() for key, one in module._buffers.items() if one is not None}

    def put_back(self, module: nn.Module, *_: object) -> None:
        """Put the held entries back, through ``.data``: tensors that autograd has saved do not count as changed."""
        for key, kept in self._kept.items():
            buffer = module._buffers.get(key)
            if buffer is None:
                continue
            if (kept.device, kept.dtype) != (buffer.device, buffer.dtype):
                self._kept[key] = kept = kept.to(buffer)
            if (free := self._free.get(key)) is not None:
                if free.device != buffer.device:
                    self._free[key] = free = free.to(buffer.device)
                kept = torch.where(free, buffer.detach(), kept)
            buffer.data.copy_(kept)

    def normalise(
        self, module: nn.Module, args: Sequence[object], kwargs: Mapping[str, object], output: Tensor
    ) -> Tensor | None:
        """The output of a norm in training mode, with old units normalised by the statistics that are held."""
        if not module.training or "running_mean" not in self._kept:
            return None
        module.training = False  # its own mode alone, not that of modules inside
        try:
            held: Tensor = module.forward(*args, **kwargs)
        finally:
            module.training = True
        free = self._free.get("running_mean")
        return held if free is None else torch.where(free.view(-1, *[1] * (held.dim() - 2)), output, held)

"""Refuse models that surgery is impossible on, each in one sentence that says what to pass instead."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from netsurgery.capture.copies import named_modules, named_tensors
from netsurgery.errors import TraceError

__all__ = ["refuse_unsupported"]

_WRAPPERS = ("DataParallel", "DistributedDataParallel")
_QUANTISED = (
    "torch.ao.nn.quantized",
    "torch.ao.nn.intrinsic.quantized",
    "torch.ao.nn.sparse.quantized",
    "bitsandbytes.",
)
_PREPARED = ("torch.ao.nn.qat", "torch.ao.nn.intrinsic.qat", "torch.ao.quantization.", "torchao.quantization.pt2e.")


def refuse_unsupported(model: nn.Module) -> None:
    """Make sure that a model holds plain modules and plain tensors.

    Raises:
        TraceError: it is wrapped, sharded, scripted, quantised or not initialised; the message says what to pass.
    """
    for path, module in named_modules(model).items():
        if why := _of_module(module):
            raise TraceError(f"module '{path}' {why}" if path else f"the model {why}")
    for name, tensor in named_tensors(model):
        if why := _of_tensor(tensor):
            raise TraceError(f"'{name}' {why}")


def _of_module(module: nn.Module) -> str:
    """Why a module is refused, if so."""
    kind = type(module)
    if refused := getattr(kind, "surgery_refused", ""):  # a class says so itself, in the words that follow its path
        return str(refused)
    if kind.__name__ in _WRAPPERS and kind.__module__.startswith("torch."):
        return f"is wrapped in {kind.__name__}: pass the module inside (model.module), and wrap the smaller model anew"
    if "_orig_mod" in module._modules:
        return (
            "is wrapped by torch.compile: pass the module inside (model._orig_mod), and compile the smaller one; "
            "module.compile() wraps nothing"
        )
    if kind.__name__ == "FullyShardedDataParallel":
        return f"is sharded: pass the model as it was before {kind.__name__}, and shard the smaller one"
    if isinstance(module, torch.jit.ScriptModule):
        return "is scripted or traced, which cannot be rewritten: pass the original model, and script the smaller one"
    if kind.__module__.startswith(_QUANTISED):
        return f"is quantised ({kind.__name__}): pass the model in floating point, and quantise the smaller one"
    if kind.__module__.startswith(_PREPARED):
        return (
            f"is prepared for quantisation ({kind.__name__}): "
            "pass the model as it was before, and prepare the smaller one"
        )
    return ""


def _of_tensor(tensor: Tensor) -> str:
    """Why a tensor is refused, if so."""
    kind = type(tensor)
    if isinstance(tensor, nn.parameter.UninitializedParameter | nn.parameter.UninitializedBuffer):
        return "is not initialised (lazy): run the model once before surgery"
    if getattr(tensor, "placements", None) is not None:
        return "is sharded: pass the model before fully_shard or parallelize_module, and shard the smaller one"
    if tensor.is_quantized or kind.__torch_dispatch__ is not Tensor.__torch_dispatch__:
        return (
            f"is a {kind.__name__}, whose operations are its own (quantised, say): "
            "pass the model with plain tensors, and convert the smaller one"
        )
    if tensor.layout is not torch.strided:
        return f"is sparse ({tensor.layout}): make it dense (to_dense) before surgery"
    return ""

"""Modules whose weights torch reads in eval mode without running them: its fused encoder layer."""

from __future__ import annotations

from torch import nn

from netsurgery.capture.copies import named_modules

__all__ = ["fused"]

_PARTS = ("self_attn", "linear1", "linear2", "norm1", "norm2")


def fused(model: nn.Module) -> dict[str, str]:
    """The paths of modules that a fused encoder layer does not run, and why they cannot be modules of other classes.

    Example:
        >>> import torch
        >>> from netsurgery.capture.fast_path import fused
        >>> sorted(fused(torch.nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)))
        ['linear1', 'linear2', 'norm1', 'norm2', 'self_attn']
        >>> fused(torch.nn.TransformerEncoderLayer(8, 2, 16))
        {}
    """
    first = {id(module): path for path, module in named_modules(model).items()}
    found: dict[str, str] = {}
    for path, layer in named_modules(model).items():
        if isinstance(layer, nn.TransformerEncoderLayer) and _is_fused(layer):
            place = f"'{path}'" if path else "the model"
            for part in (getattr(layer, name, None) for name in (*_PARTS, "activation")):
                if isinstance(part, nn.Module):
                    name = first[id(part)]
                    found[name] = (
                        f"in eval mode torch's fast path of {place}, a {type(layer).__name__}, reads '{name}' without "
                        "running it"
                    )
    return found


def _is_fused(layer: nn.TransformerEncoderLayer) -> bool:
    """True if some input takes the fast path."""
    attention = layer.self_attn
    return (
        type(layer).forward is nn.TransformerEncoderLayer.forward
        and bool(layer.activation_relu_or_gelu)
        and bool(getattr(attention, "batch_first", False))
        and getattr(attention, "num_heads", 1) % 2 == 0
    )

"""Random weights that leave every part of any network alive: nothing zero, nothing constant, nothing without bounds.

Fresh networks hide errors of surgery on them: heads, layer scales and position embeddings that start at zero, norms
with mean 0, variance 1, weight 1 and bias 0.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

NOT_FINITE = "an output is not finite"
_LAYERS = (nn.modules.conv._ConvNd, nn.Linear)
_LARGE = 3.0  # root mean square of a layer's outputs: sigmoids of a few times this are still numbers between 0 and 1


@torch.no_grad()
def randomise(model: nn.Module, run: Callable[[nn.Module], Any], seed: int = 0) -> None:
    """Redraw every parameter of a model in eval mode, and the statistics of its norms, in place.

    Args:
        model: its parameters and statistics are changed.
        run: calls the model on inputs that the statistics of its batch norms are taken from.
        seed: of every random number drawn.
    """
    generator = torch.Generator().manual_seed(seed)
    done: set[int] = set()
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            if id(parameter) not in done:  # tied weights
                _redraw(module, name, parameter, generator)
                done.add(id(parameter))
    _fit(model, run, generator)


def _redraw(module: nn.Module, name: str, parameter: Tensor, generator: torch.Generator) -> None:
    if not parameter.is_floating_point():
        return
    if isinstance(module, _LAYERS) and name == "weight":
        fan_in = parameter[0].numel()
        gain = 6.0 if isinstance(module, nn.modules.conv._ConvNd) else 3.0  # variance through a ReLU, or as it is
        bound = (gain / fan_in) ** 0.5
        parameter.uniform_(-bound, bound, generator=generator)
    elif name.endswith("bias"):
        parameter.normal_(0.0, 0.2, generator=generator)
    elif parameter.numel() > 1 and float(parameter.std()) > 0 and float(parameter.abs().max()) > 1e-3:
        scale = float(parameter.std())  # as its author drew it, and a little else
        noise = torch.empty_like(parameter).normal_(0.0, 0.2 * scale, generator=generator)
        factor = torch.empty_like(parameter).uniform_(0.75, 1.25, generator=generator)
        parameter.mul_(factor).add_(noise)
    elif float(parameter.abs().max()) == 0 and parameter.dim() > 1:  # tokens, position embeddings, heads
        parameter.normal_(0.0, 0.3, generator=generator)
    else:  # the weights of norms, layer scales, gates
        parameter.uniform_(0.25, 1.0, generator=generator)


def _fit(model: nn.Module, run: Callable[[nn.Module], Any], generator: torch.Generator) -> None:
    """In one run: norms that keep statistics get random ones of the scale of their own input, roughly, and layers
    whose outputs grow large get smaller weights: nothing saturates.
    """

    def statistics(norm: Any, arguments: tuple[Tensor]) -> None:
        # Means near 0 and variances near the mean square: to subtract the true mean, layer after layer, costs digits.
        square = arguments[0].square().transpose(0, 1).flatten(1).mean(1)
        square = (square + square.mean()) / 2  # few samples: no channel's own estimate is trusted alone
        square = square.clamp_min(1e-3)
        norm.running_mean.copy_(0.3 * square.sqrt() * torch.randn(len(square), generator=generator))
        norm.running_var.copy_(square * (0.5 + torch.rand(len(square), generator=generator)))

    def weights(layer: Any, arguments: tuple[Tensor], out: Tensor) -> Tensor:
        scale = min(1.0, _LARGE / (float(out.square().mean().sqrt()) + 1e-9))
        for parameter in layer.parameters(recurse=False):
            parameter.mul_(scale)
        return out * scale

    hooks = []
    for module in model.modules():
        if isinstance(getattr(module, "running_mean", None), Tensor) and isinstance(module.running_var, Tensor):
            module.running_mean.normal_(0.0, 0.3, generator=generator)  # kept by parts that do not run here
            module.running_var.uniform_(0.5, 1.5, generator=generator)
            hooks.append(module.register_forward_pre_hook(statistics))
        elif isinstance(module, _LAYERS):
            hooks.append(module.register_forward_hook(weights))
    run(model)
    for hook in hooks:
        hook.remove()


def what_is_dead(outputs: Any) -> str | None:
    """Why a model's outputs prove nothing: not finite, or the same everywhere; None where they are alive."""
    tensors = [t for t in pytree.tree_leaves(outputs) if isinstance(t, Tensor) and t.is_floating_point()]
    tensors = [t for t in tensors if t.numel()]
    if not tensors:
        return "no output has numbers"
    if not all(bool(torch.isfinite(t).all()) for t in tensors):
        return NOT_FINITE
    if any(t.numel() > 1 and bool((t == t.flatten()[0]).all()) for t in tensors):
        return "an output is the same everywhere"
    return None

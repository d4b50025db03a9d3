"""The convolutional classifiers of torchvision, built with random weights that leave every layer alive."""

import functools

import torch
import torchvision
from torch import nn

TRANSFORMERS = ("maxvit", "swin", "vit")

#: Small images each family accepts; the deep efficientnets lose too many digits where a map is one pixel wide.
IMAGE_SIZES = {"alexnet": 63, "efficientnet": 64, "inception": 299}  # with its auxiliary head

#: One or two of every family, small enough for the default run; all others carry the mark ``slow``.
REPRESENTATIVES = (
    "alexnet",
    "convnext_tiny",
    "densenet121",
    "efficientnet_b0",
    "googlenet",
    "inception_v3",
    "mnasnet0_5",
    "mobilenet_v2",
    "mobilenet_v3_small",
    "regnet_x_400mf",
    "regnet_y_400mf",
    "resnet18",
    "resnet50",
    "resnext50_32x4d",
    "shufflenet_v2_x0_5",
    "shufflenet_v2_x1_0",
    "squeezenet1_1",
    "vgg11_bn",
)


@functools.cache
def names() -> tuple[str, ...]:
    """Every convolutional classifier of the installed torchvision."""
    listed = torchvision.models.list_models(module=torchvision.models)
    return tuple(name for name in listed if not name.startswith(TRANSFORMERS))


def slow_names() -> tuple[str, ...]:
    """The names behind the mark ``slow``."""
    return tuple(name for name in names() if name not in REPRESENTATIVES)


def image_size(name: str) -> int:
    """The side of a small image the model accepts."""
    return next((size for family, size in IMAGE_SIZES.items() if name.startswith(family)), 32)


def images(name: str, count: int = 2) -> torch.Tensor:
    """The first of eight random images, ``(count, 3, size, size)``; ``build`` looks at all eight."""
    size = image_size(name)
    return torch.randn(8, 3, size, size, generator=torch.Generator().manual_seed(0))[:count]


def build(name: str, seed: int = 0) -> nn.Module:
    """The model in eval mode, with random weights, biases, norms and statistics.

    Args:
        name: one of ``names()``.
        seed: of every random number drawn.

    Returns:
        The model. Each batch norm fits the scale of its own input, roughly: no layer is dead and no output explodes.
    """
    torch.manual_seed(seed)  # torchvision draws weights from the global generator
    arguments = {"init_weights": False} if name.startswith(("googlenet", "inception", "vgg")) else {}
    model: nn.Module = torchvision.models.get_model(name, weights=None, **arguments).eval()
    randomise(model, images(name, count=8), seed)
    return model


@torch.no_grad()
def randomise(model: nn.Module, inputs: torch.Tensor, seed: int = 0) -> None:
    """Redraw every parameter of a model in eval mode; give each batch norm random statistics of the scale of its input.

    A network whose norms still have mean 0 and variance 1 hides most errors of surgery on them.

    Args:
        model: its layers are changed in place.
        inputs: a batch to take the scale from.
        seed: of every random number drawn.
    """
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if parameter.dim() > 1 and not name.endswith("layer_scale"):
            bound = (6.0 / parameter[0].numel()) ** 0.5  # keeps the variance through a ReLU
            parameter.uniform_(-bound, bound, generator=generator)
        elif name.endswith("bias"):
            parameter.normal_(0.0, 0.2, generator=generator)
        else:  # the weights of norms, and layer scales
            parameter.uniform_(0.25, 1.0, generator=generator)

    def scale_statistics(norm: nn.Module, arguments: tuple[torch.Tensor]) -> None:
        # Means near 0 and variances near the mean square: to subtract the true mean, layer after layer, costs digits.
        square = arguments[0].square().transpose(0, 1).flatten(1).mean(1)
        square = (square + square.mean()) / 2  # few samples: no channel's own estimate is trusted alone
        norm.running_mean.copy_(0.3 * square.sqrt() * torch.randn(len(square), generator=generator))
        norm.running_var.copy_(square * (0.5 + torch.rand(len(square), generator=generator)))

    hooks = []
    for norm in model.modules():
        if isinstance(norm, nn.modules.batchnorm._BatchNorm):
            norm.running_mean.normal_(0.0, 0.3, generator=generator)  # kept by auxiliary heads, which do not run here
            norm.running_var.uniform_(0.5, 1.5, generator=generator)
            hooks.append(norm.register_forward_pre_hook(scale_statistics))
    model(inputs)
    for hook in hooks:
        hook.remove()

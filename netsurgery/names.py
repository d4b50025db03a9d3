"""Models by name: `torchvision:resnet18`, `timm:resnet18`, `package.module:callable`."""

import importlib
import inspect
import os
import sys
import warnings
from collections.abc import Callable, Iterable
from difflib import get_close_matches
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from netsurgery.errors import InputError

__all__ = ["build", "example"]

Finder = Callable[[str, dict[str, Any]], nn.Module]


def build(name: str, **arguments: Any) -> nn.Module:
    """The model of that name, with fresh weights: nothing is downloaded.

    Args:
        name: `torchvision:NAME`, `timm:NAME`, or `package.module:callable`, which is looked up from the current
            directory too; the callable returns the model.
        arguments: what the model is called with, such as `num_classes`.

    Raises:
        InputError: no such model; near matches are named. Or it does not take these arguments.
    """
    source, _, rest = name.partition(":")
    if not rest or not all(part.isidentifier() for part in source.split(".")):
        raise InputError(f"{name!r} names no model; write torchvision:NAME, timm:NAME or package.module:callable")
    finders: dict[str, Finder] = {"torchvision": _torchvision, "timm": _timm}
    try:
        return finders.get(source, partial(_user, source))(rest, arguments)
    except TypeError as error:
        if arguments and "argument" in str(error):
            raise InputError(f"{name} with the arguments {', '.join(arguments)}: {error}") from error
        raise


def example(shape: str, seed: int = 0) -> tuple[Tensor]:
    """Standard normal example input of a shape written like `1x3x224x224`.

    Raises:
        InputError: the text is no shape.
    """
    sizes = shape.lower().split("x")
    if not all(size.isdecimal() and int(size) > 0 for size in sizes):
        raise InputError(f"{shape!r} is no shape; write positive sizes joined by x, such as 1x3x224x224")
    return (torch.randn([int(size) for size in sizes], generator=torch.Generator().manual_seed(seed)),)


def _torchvision(name: str, arguments: dict[str, Any]) -> nn.Module:
    from torchvision import models

    if name not in models.list_models():
        raise InputError(f"torchvision has no model {name!r}{_near(name, models.list_models())}")
    builder = models.get_model_builder(name)
    # Detection and segmentation models download their backbone unless told otherwise.
    backbone = {"weights_backbone": None} if "weights_backbone" in inspect.signature(builder).parameters else {}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The default weight initialization", FutureWarning)
        return _module(f"torchvision:{name}", builder(weights=None, **backbone, **arguments))


def _timm(name: str, arguments: dict[str, Any]) -> nn.Module:
    try:
        import timm
    except ModuleNotFoundError as error:
        raise InputError(f"timm:{name} needs timm, which is not installed: python -m pip install timm") from error
    if not timm.is_model(name):
        raise InputError(f"timm has no model {name!r}{_near(name, timm.list_models())}")
    return _module(f"timm:{name}", timm.create_model(name, pretrained=False, **arguments))


def _user(path: str, attribute: str, arguments: dict[str, Any]) -> nn.Module:
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())  # a console script's path starts at its own folder
    try:
        found: Any = importlib.import_module(path)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{path}.".startswith(f"{error.name}."):
            raise InputError(f"{path} cannot be imported: it needs {error.name}, which is not installed") from error
        hint = _near(path, ["torchvision", "timm"], ":")
        raise InputError(f"no module {error.name!r} here or among the installed packages{hint}") from error
    for part in attribute.split("."):
        if not hasattr(found, part):
            raise InputError(f"{path} has no {attribute!r}{_near(part, dir(found))}")
        found = getattr(found, part)
    name = f"{path}:{attribute}"
    if not callable(found):
        raise InputError(f"{name} is of type {type(found).__name__}, not a callable that returns a torch.nn.Module")
    return found if isinstance(found, nn.Module) else _module(name, _call(name, found, arguments))


def _call(name: str, function: Callable[..., object], arguments: dict[str, Any]) -> object:
    missing = [
        p.name
        for p in inspect.signature(function).parameters.values()
        if p.default is p.empty and p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD) and p.name not in arguments
    ]
    if missing:
        raise InputError(f"{name} needs arguments ({', '.join(missing)}); name a function without any that calls it")
    return function(**arguments)


def _module(name: str, made: object) -> nn.Module:
    if not isinstance(made, nn.Module):
        raise InputError(f"{name} returned a value of type {type(made).__name__}, not a torch.nn.Module")
    return made


def _near(name: str, names: Iterable[str], suffix: str = "") -> str:
    near = [f"{match}{suffix}" for match in get_close_matches(name, list(names), n=3)]
    return f"; did you mean {' or '.join(near)}?" if near else ""

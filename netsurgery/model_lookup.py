"""Models by name: `torchvision:resnet18@DEFAULT`, `timm:resnet18@pretrained`, `package.module:callable`."""

import importlib
import inspect
import os
import sys
import warnings
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from netsurgery.arguments import near_names
from netsurgery.errors import InputError

__all__ = ["build", "example"]

Arguments = Mapping[str, Any]  # of a model, by name
Finder = Callable[[str, str, Arguments], nn.Module]


def build(name: str, **arguments: object) -> nn.Module:
    """Build a model by its name. Without `@WEIGHTS` its own constructor draws the weights: nothing is downloaded.

    Args:
        name: `torchvision:NAME`, `timm:NAME`, or `package.module:callable`, which is looked up from the current
            directory too; the callable returns the model. The first two may end in the name of published weights, which
            are fetched where they are missing: `torchvision:resnet18@DEFAULT`, `timm:resnet18@pretrained`.
        arguments: arguments of the constructor, such as `num_classes`.

    Raises:
        InputError: no such model or weights; near matches are named. Or it does not take these arguments, or the
            weights cannot be fetched.
    """
    source, _, rest = name.partition(":")
    rest, at, weights = rest.partition("@")
    if not rest or (at and not weights) or not all(part.isidentifier() for part in source.split(".")):
        raise InputError(
            f"{name!r} names no model; write torchvision:NAME, timm:NAME, either with @WEIGHTS, or "
            "package.module:callable"
        )
    finders: dict[str, Finder] = {"torchvision": _torchvision, "timm": _timm}
    try:
        return finders.get(source, partial(_user, source))(rest, weights, arguments)
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


def _torchvision(name: str, weights: str, arguments: Arguments) -> nn.Module:
    from torchvision import models

    if name not in models.list_models():
        raise InputError(f"torchvision has no model {name!r}{near_names(name, models.list_models())}")
    builder = models.get_model_builder(name)
    # Detection and segmentation models download their backbone unless told otherwise.
    backbone = {"weights_backbone": None} if "weights_backbone" in inspect.signature(builder).parameters else {}
    chosen = _published(name, weights) if weights else None
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The default weight initialization", FutureWarning)
        try:
            return _module(f"torchvision:{name}", builder(weights=chosen, **backbone, **arguments))
        except ValueError as error:
            if chosen is None:
                raise
            raise InputError(
                f"torchvision:{name}@{weights}: {error}"
            ) from error  # other classes than it was trained on


def _published(name: str, weights: str) -> object:
    """An entry of torchvision's list of weights; its file is downloaded where it is missing."""
    from torchvision import models

    there = models.get_model_weights(name).__members__
    if weights not in there:
        raise InputError(_no_weights("torchvision", weights, name, there))
    try:
        there[weights].get_state_dict(progress=False, check_hash=True)
    except (OSError, RuntimeError) as error:
        raise InputError(f"torchvision:{name}@{weights}: {_unfetched(error)}") from error
    return there[weights]


def _no_weights(source: str, weights: str, name: str, there: Iterable[str]) -> str:
    hint = near_names(weights, there) or f"; there are {', '.join(there) or 'none'}"
    return f"{source} has no weights {weights!r} of {name}{hint}"


def _unfetched(error: Exception) -> str:
    reason = " ".join(str(error).split())[:200]
    return f"the weights cannot be fetched ({reason}): fetch them elsewhere and pass the file by --weights"


def _timm(name: str, weights: str, arguments: Arguments) -> nn.Module:
    try:
        import timm
    except ModuleNotFoundError as error:
        raise InputError(f"timm:{name} needs timm, which is not installed: python -m pip install timm") from error
    if not timm.is_model(name):
        raise InputError(f"timm has no model {name!r}{near_names(name, timm.list_models())}")
    if not weights:
        return _module(f"timm:{name}", timm.create_model(name, pretrained=False, **arguments))
    plain, _, tag = name.partition(".")
    tag = tag if weights == "pretrained" else weights
    there = [one.removeprefix(f"{plain}.") for one in timm.list_pretrained(f"{plain}.*")]
    if not there or (tag and tag not in there):
        raise InputError(_no_weights("timm", tag or weights, plain, ["pretrained", *there] if there else []))
    try:
        made = timm.create_model(f"{plain}.{tag}" if tag else plain, pretrained=True, **arguments)
    except OSError as error:
        raise InputError(f"timm:{name}@{weights}: {_unfetched(error)}") from error
    return _module(f"timm:{name}", made)


def _user(path: str, attribute: str, weights: str, arguments: Arguments) -> nn.Module:
    if weights:
        raise InputError(
            f"{path}:{attribute}@{weights}: only torchvision: and timm: have weights by name; let the callable load "
            "them, or pass the file by --weights"
        )
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())  # a console script's path starts at its own folder
    try:
        found: object = importlib.import_module(path)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{path}.".startswith(f"{error.name}."):
            raise InputError(f"{path} cannot be imported: it needs {error.name}, which is not installed") from error
        hint = near_names(path, ["torchvision", "timm"], ":")
        raise InputError(f"no module {error.name!r} here or among the installed packages{hint}") from error
    for part in attribute.split("."):
        if not hasattr(found, part):
            raise InputError(f"{path} has no {attribute!r}{near_names(part, dir(found))}")
        found = getattr(found, part)
    name = f"{path}:{attribute}"
    if not callable(found):
        raise InputError(f"{name} is of type {type(found).__name__}, not a callable that returns a torch.nn.Module")
    return found if isinstance(found, nn.Module) else _module(name, _call(name, found, arguments))


def _call(name: str, function: Callable[..., object], arguments: Arguments) -> object:
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

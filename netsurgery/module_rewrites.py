"""Modules of a model are replaced or wrapped, by path: values that say how, and the one place that does it."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from netsurgery.analysis.network import Network
from netsurgery.analysis.tracing import network_of
from netsurgery.arguments import near_names
from netsurgery.capture.copies import copy_with, like, named_modules, named_tensors
from netsurgery.capture.fast_path import fused
from netsurgery.capture.meta_run import RAISED_BY_MODELS
from netsurgery.capture.paths import is_within
from netsurgery.capture.recorder import record
from netsurgery.errors import InputError, NetsurgeryError, RewriteError

__all__ = ["ModuleRewrite", "Rewritten", "built", "checked", "put", "read", "register_rewrite", "rewritten", "written"]


class ModuleRewrite:
    """The change of one module: a value whose fields are its arguments. Derive a frozen dataclass.

    ``Edit(network, {}, modules={"path": rewrite})`` carries it out: on a copy, to look at the network that is left, and
    then on the model. So ``build`` must give the same again, whatever it draws by a seed of its own.

    Attributes:
        exact: whether no output changes in eval mode; ``netsurgery.verify`` holds the edit to it.
        averages: whether an average of the weights, rewritten in the same way, can go on averaging.

    Example:
        >>> import dataclasses, torch, netsurgery
        >>> @dataclasses.dataclass(frozen=True)
        ... class Hard(netsurgery.ModuleRewrite):
        ...     exact = False
        ...
        ...     def build(self, module):
        ...         return torch.nn.Hardswish()
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.SiLU(), torch.nn.Linear(8, 2))
        >>> edit = netsurgery.Edit(netsurgery.trace(model), {}, modules={"1": Hard()})
        >>> netsurgery.rewrite(model, edit)[1]
        Hardswish()
    """

    exact: bool = True
    averages: bool = True

    @property
    def reads(self) -> tuple[str, ...]:
        """Paths of other modules that ``build`` gets behind the one that it replaces."""
        return ()

    def build(self, *args: Any, **kwargs: Any) -> nn.Module:
        """Make the new module of the old one, and of those that ``reads`` names.

        The old ones stay as they are; the new one may hold the old one or its parameters. Where it does not hold it, it
        gets its hooks. New parameters get the device and dtype of the old ones, and are trained where one of these is.
        """
        raise NotImplementedError(f"{type(self).__name__} has no build(self, module)")


Kind = TypeVar("Kind", bound=type[ModuleRewrite])
_KINDS: dict[str, type[ModuleRewrite]] = {}


def register_rewrite(kind: Kind) -> Kind:
    """Let edits with rewrites of a class be kept as JSON, by its name and fields: a decorator.

    Raises:
        InputError: another class of the name is registered, or it is no dataclass.

    Example:
        >>> import dataclasses, torch, netsurgery
        >>> from netsurgery.module_rewrites import register_rewrite
        >>> @register_rewrite
        ... @dataclasses.dataclass(frozen=True)
        ... class Leaky(netsurgery.ModuleRewrite):
        ...     slope: float
        ...     exact = False
        ...
        ...     def build(self, module):
        ...         return torch.nn.LeakyReLU(self.slope)
        >>> edit = netsurgery.Edit(netsurgery.trace(torch.nn.ReLU(), torch.ones(1, 2)), {})
        >>> Leaky(0.1)
        Leaky(slope=0.1)
    """
    if not (isinstance(kind, type) and issubclass(kind, ModuleRewrite) and dataclasses.is_dataclass(kind)):
        raise InputError(f"register_rewrite takes a frozen dataclass that derives ModuleRewrite, got {kind!r}")
    known = _KINDS.setdefault(kind.__name__, kind)
    if (known.__module__, known.__qualname__) != (kind.__module__, kind.__qualname__):
        raise InputError(f"register_rewrite: {known.__module__} has another '{kind.__name__}': choose another name")
    _KINDS[kind.__name__] = kind  # defined anew, in a notebook
    return kind


def written(rewrite: ModuleRewrite) -> dict[str, Any]:
    """A rewrite for JSON.

    Raises:
        InputError: its class is not registered, or a field is neither a number, a text, nor a list of these.
    """
    kind = type(rewrite)
    if _KINDS.get(kind.__name__) is not kind:
        raise InputError(
            f"an edit with {rewrite!r} cannot be kept as JSON: put @register_rewrite (of netsurgery.module_rewrites) "
            f"before the class {kind.__name__}"
        )
    fields = {field.name: getattr(rewrite, field.name) for field in dataclasses.fields(rewrite)}  # type: ignore[arg-type]  # a dataclass, since it is registered
    for name, value in fields.items():
        if not _is_plain(value):
            raise InputError(
                f"an edit with {rewrite!r} cannot be kept as JSON: its field '{name}' is a {type(value).__name__}, "
                "neither a number, a text nor a list of these"
            )
    return {"kind": kind.__name__, "fields": fields}


def read(value: Mapping[str, Any]) -> ModuleRewrite:
    """A rewrite from JSON.

    Raises:
        InputError: no class of this name is registered, or it has other fields.
    """
    kind = _KINDS.get(value["kind"])
    if kind is None:
        raise InputError(
            f"the edit rewrites modules by '{value['kind']}', which is not registered here"
            f"{near_names(str(value['kind']), _KINDS)}: import netsurgery.passes, or what registers it"
        )
    fields = {name: tuple(one) if isinstance(one, list) else one for name, one in value["fields"].items()}
    try:
        return kind(**fields)
    except TypeError as error:
        raise InputError(f"the edit is of another version of '{value['kind']}': {error}") from error


def _is_plain(value: Any) -> bool:
    if isinstance(value, list | tuple):
        return all(map(_is_plain, value))
    return value is None or isinstance(value, int | float | str)


def checked(model: nn.Module, model_name: str, given: Mapping[str, ModuleRewrite]) -> dict[str, ModuleRewrite]:
    """Rewrites by the path that each module has first, in the order of the modules.

    Raises:
        InputError: no mapping of rewrites; a path of no module, or of the model itself; or of modules that are one, or
            of which one is in the other.
    """
    first = {id(module): path for path, module in named_modules(model).items()}
    places = {path: first[id(module)] for path, module in model.named_modules(remove_duplicate=False)}
    found: dict[str, ModuleRewrite] = {}
    for path, rewrite in given.items():
        if path is None:  # of a Match
            raise InputError(
                f"Edit(modules={{None: {rewrite!r}}}): the operation runs in the forward of a module that does more "
                "(match.forwards names it), not in a module of its own: leave that match out"
            )
        if not isinstance(rewrite, ModuleRewrite):
            raise InputError(f"Edit(modules=...): '{path}' has {rewrite!r}, which is no netsurgery.ModuleRewrite")
        for one in (path, *rewrite.reads):
            if one not in places:
                near = near_names(str(one), places)
                raise InputError(f"'{one}' is no module of {model_name}{near or '; model.named_modules() lists them'}")
        if not path:
            raise InputError(f"{rewrite!r}: {model_name} itself cannot be replaced, only modules in it")
        if places[path] in found:
            raise InputError(f"'{path}' and '{places[path]}' are one module of {model_name}: name it once")
        found[places[path]] = rewrite
    for path in found:
        if around := next((one for one in found if one != path and is_within(path, one)), None):
            raise InputError(f"'{path}' is in '{around}', which is rewritten, too: carry one out after the other")
    return {path: found[path] for path in first.values() if path in found}


@dataclass(frozen=True)
class Rewritten:
    """The result of rewrites of modules.

    Attributes:
        of: the network that they are for, and the rewrites.
        network: the one that they lead to; its model shares tensors with the first one's.
        names: the new names of the tensors that stay.
    """

    of: tuple[Network, Mapping[str, ModuleRewrite]]
    network: Network
    names: Mapping[str, str]


def rewritten(network: Network, modules: Mapping[str, ModuleRewrite]) -> Rewritten:
    """The network that rewrites lead to: a copy of the model is rewritten and recorded.

    Raises:
        RewriteError: a module cannot be built anew, or the model's code does not work with the new ones.
    """
    touched = (*modules, *(path for rewrite in modules.values() for path in rewrite.reads))
    own = {
        name: like(tensor, tensor.detach().clone()) if any(is_within(name, path) for path in touched) else tensor
        for name, tensor in named_tensors(network.model)
    }  # copies, where code of users gets the tensors
    model = copy_with(network.model, {id(tensor): own[name] for name, tensor in named_tensors(network.model)})
    new = built(model, modules)
    _check_fused(model, network.model_name, new)
    put(model, new)
    try:
        found = network_of(model, network.inputs[0] or network.inputs[1])
        if len(found.programs) < len(network.programs):  # it runs as in eval mode now, or raises an error
            record(model, network.inputs, "train")
    except NetsurgeryError as error:
        listed = ", ".join(list(modules)[:3])
        raise RewriteError(f"{network.model_name} does not run once {listed} is another module: {error}") from error
    _check_calls(network, found, modules)
    after = {id(tensor): name for name, tensor in found.tensors.items()}
    names = {name: after[id(tensor)] for name, tensor in own.items() if id(tensor) in after}
    return Rewritten((network, modules), found, names)


def _check_fused(model: nn.Module, model_name: str, new: Mapping[str, nn.Module]) -> None:
    """Raise RewriteError for modules of another class that torch would not run in eval mode."""
    known, why = named_modules(model), fused(model)
    if refused := next((path for path, one in new.items() if path in why and type(one) is not type(known[path])), None):
        raise RewriteError(
            f"'{refused}' of {model_name} cannot become a {type(new[refused]).__name__}: {why[refused]}; leave it out"
        )


def _check_calls(before: Network, after: Network, paths: Mapping[str, ModuleRewrite]) -> None:
    """Raise RewriteError where the code goes on running an old module, which it holds elsewhere."""
    ran, runs = ({call.path for program in one.programs for call in program.calls} for one in (before, after))
    if missed := next((path for path in paths if path in ran and path not in runs), None):
        raise RewriteError(
            f"the code of {before.model_name} goes on running the old module of '{missed}': it does not call it by "
            "that name (a list or a function holds it), so that it cannot be replaced"
        )


def built(model: nn.Module, modules: Mapping[str, ModuleRewrite]) -> dict[str, nn.Module]:
    """The new modules of a model by path; the model stays as it is.

    Raises:
        RewriteError: a rewrite fails, or gives no module.
    """
    known, tensors = named_modules(model), {id(tensor) for _, tensor in named_tensors(model)}
    found: dict[str, nn.Module] = {}
    for path, rewrite in modules.items():
        old = known[path]
        try:
            new = rewrite.build(old, *(known[one] for one in rewrite.reads))
        except RAISED_BY_MODELS as error:
            why = str(error).strip().partition("\n")[0] or type(error).__name__
            raise RewriteError(f"{rewrite!r} cannot rebuild '{path}', a {type(old).__name__}: {why}") from error
        if not isinstance(new, nn.Module):
            raise RewriteError(f"{rewrite!r}.build gave a {type(new).__name__} for '{path}', not a torch.nn.Module")
        old_ones = {id(module) for module in known.values()}
        _settle(old, [module for module in new.modules() if id(module) not in old_ones], tensors, model)
        if not any(module is old for module in new.modules()):
            _take_hooks(old, new)
        found[path] = new
    return found


def _settle(old: nn.Module, new: list[nn.Module], known: set[int], model: nn.Module) -> None:
    """Give new modules the mode of the old one, and their tensors its device, dtype, and whether they are trained."""
    like_that = next(filter(Tensor.is_floating_point, _tensors(old)), None)
    if like_that is None:
        like_that = next(filter(Tensor.is_floating_point, _tensors(model)), torch.empty(()))
    trained = [parameter.requires_grad for parameter in old.parameters()]
    done: dict[int, Tensor] = {}
    for module in new:
        module.training = old.training
        stores: tuple[dict[str, Any], ...] = (module._parameters, module._buffers)
        for store in stores:
            for key, tensor in store.items():
                if tensor is None or id(tensor) in known:
                    continue
                if id(tensor) not in done:
                    real = tensor.is_floating_point()
                    moved = tensor.detach().to(like_that.device, like_that.dtype if real else tensor.dtype)
                    done[id(tensor)] = like(tensor, moved)
                    if trained and not any(trained):
                        done[id(tensor)].requires_grad_(False)
                store[key] = done[id(tensor)]


def _tensors(module: nn.Module) -> Iterator[Tensor]:
    return (tensor for _, tensor in named_tensors(module))


_HOOKS = (
    "_forward_hooks", "_forward_hooks_with_kwargs", "_forward_hooks_always_called", "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs", "_backward_hooks", "_backward_pre_hooks", "_is_full_backward_hook",
)  # fmt: skip


def _take_hooks(old: nn.Module, new: nn.Module) -> None:
    """Let a module have the hooks of the one that it stands for; their handles go on removing them."""
    for key in _HOOKS:
        if old.__dict__.get(key) and not new.__dict__.get(key):
            new.__dict__[key] = old.__dict__[key]


def put(model: nn.Module, new: Mapping[str, nn.Module]) -> None:
    """Let new modules stand wherever the old ones do."""
    known = named_modules(model)
    stands = {id(known[path]): module for path, module in new.items()}
    places = [
        (around, name, stands[id(child)])
        for around in known.values()
        for name, child in around._modules.items()
        if child is not None and id(child) in stands
    ]
    for around, name, module in places:
        around._modules[name] = module


def rewrite_lines(modules: Mapping[str, ModuleRewrite], before: Network, after: Rewritten) -> list[str]:
    """The changes of modules and tensors: those that go, that have another name, and that are new."""

    def shape(tensor: Tensor) -> str:
        return "x".join(map(str, tensor.shape)) or "scalar"

    lines = [f"{path} becomes {rewrite!r}" for path, rewrite in modules.items()]
    tensors, stay = after.network.tensors, set(after.names.values())
    for name, tensor in before.tensors.items():
        new = after.names.get(name)
        if new is not None:
            lines.extend([f"{name} is {new}"] if new != name else [])
        elif name not in tensors or name in stay:
            lines.append(f"{name} {shape(tensor)} goes")
        else:
            sizes = shape(tensor), shape(tensors[name])
            lines.append(f"{name} {' -> '.join(dict.fromkeys(sizes))} has new values")
            stay.add(name)
    fresh = [(name, tensor) for name, tensor in tensors.items() if name not in stay]
    return lines + [f"{name} {shape(tensor)} is new" for name, tensor in fresh]

"""Modules of a network, named by patterns, by classes, or given themselves."""

from __future__ import annotations

import fnmatch
from collections.abc import Iterable, Sequence

from torch import nn

from netsurgery.analysis.network import Network
from netsurgery.capture.copies import named_modules, named_tensors
from netsurgery.errors import InputError

__all__ = ["Chosen", "Modules", "Pattern", "as_patterns"]

Pattern = str | type[nn.Module] | nn.Module
Modules = Pattern | Sequence[Pattern]


def as_patterns(given: Modules) -> tuple[Pattern, ...]:
    """One pattern or several, as a tuple.

    Raises:
        InputError: one is neither a name pattern, nor a class of modules, nor a module.
    """
    if isinstance(given, str | type | nn.Module) or not isinstance(given, Iterable):
        given = (given,)
    patterns = tuple(given)
    for one in patterns:
        if not (isinstance(one, str | nn.Module) or (isinstance(one, type) and issubclass(one, nn.Module))):
            raise InputError(
                f"{one!r} says no modules: pass name patterns ('layer3.*'), classes (nn.Conv2d), or modules (model.fc)"
            )
    return patterns


class Chosen:
    """The modules of a network that patterns match, with all modules inside them and the tensors that they share.

    Args:
        network: the network whose modules are meant.
        patterns: as ``as_patterns`` gives them.
        empty: whether a name may be one of modules without parameters.

    Raises:
        InputError: a pattern matches nothing.
    """

    def __init__(self, network: Network, patterns: Iterable[Pattern], empty: bool = False):
        model = network.model if network.original is None else network.original
        self.given = {} if network.given is None else {id(m): path for path, m in named_modules(network.given).items()}
        self.first = {id(module): path for path, module in named_modules(model).items()}
        self.places = list(model.named_modules(remove_duplicate=False))
        found = [module for one in patterns for module in self.matched(network.model_name, one, empty)]
        self.paths = {self.first[id(module)] for module in found}
        names = {id(tensor): name for name, tensor in named_tensors(model)}
        held = [t for module in found for t in (*module.parameters(), *module.buffers())]
        self.tensors = {names[id(tensor)] for tensor in held if id(tensor) in names}

    def matched(self, model_name: str, pattern: Pattern, empty: bool) -> list[nn.Module]:
        """The modules that one pattern matches, by any of their names."""
        if isinstance(pattern, str):
            named = [module for path, module in self.places if path and fnmatch.fnmatchcase(path, pattern)]
            if found := [module for module in named if empty or any(True for _ in module.parameters())]:
                return found
            raise InputError(
                f"pattern '{pattern}' matches no module{'' if empty else ' with parameters'} in {model_name}"
            )
        kind = pattern if isinstance(pattern, type) else None
        if kind is None and id(pattern) in self.given:
            return [dict(self.places)[self.given[id(pattern)]]]
        fits = [m for _, m in self.places if (m is pattern if kind is None else isinstance(m, kind))]
        if not fits:
            what = f"the {type(pattern).__name__} that is given is" if kind is None else f"{kind.__name__} matches"
            raise InputError(f"{what} no module in {model_name}")
        return fits

    def __contains__(self, module: str) -> bool:
        parts = module.split(".") if module else []
        return any(".".join(parts[:i]) in self.paths for i in range(len(parts) + 1))

    def holds(self, parameter: str) -> bool:
        """True if a tensor of the model, by its name, is in one of these modules."""
        return parameter in self.tensors or parameter.rpartition(".")[0] in self

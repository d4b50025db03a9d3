"""Packages in the repository's root that are imported under another package's name; their ``__init__.py`` calls this.

With the root on ``sys.path``, ``import kernels`` finds the folder of ``netsurgery.kernels``. Whoever does so means
another package of that name; importing ``netsurgery`` to tell it so would load torch.
"""

from __future__ import annotations

import sys
from importlib.machinery import PathFinder
from importlib.util import module_from_spec
from pathlib import Path

__all__ = ["give_way"]


def give_way(module: dict[str, object]) -> None:
    """Put another package of the same name in a module's place, or empty the module.

    Args:
        module: the variables of a package in the repository's root, while it is imported.
    """
    name, root = str(module["__name__"]), Path(__file__).resolve().parent.parent
    spec = PathFinder.find_spec(name, [path for path in sys.path if Path(path).resolve() != root])
    if spec is not None and spec.loader is not None:
        sys.modules[name] = module_from_spec(spec)  # an import returns what stands here in the end
        spec.loader.exec_module(sys.modules[name])
        return

    def missing(_: str) -> object:
        raise AttributeError(f"no package '{name}' is installed; netsurgery's is netsurgery.{name}")

    # As empty as any folder of this name: nothing to find in it, and no file.
    module.update(__path__=[], __getattr__=missing)
    del module["__file__"]

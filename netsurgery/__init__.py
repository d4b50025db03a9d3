"""netsurgery: structural surgery on PyTorch networks, as compiler passes over an exact dependency graph."""

from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

from netsurgery.analysis.costs import Cost as Cost
from netsurgery.analysis.custom_rules import rule as rule
from netsurgery.analysis.graph_patterns import Pattern as Pattern
from netsurgery.analysis.groups import Group as Group
from netsurgery.analysis.groups import Member as Member
from netsurgery.analysis.network import Network as Network
from netsurgery.edit import Edit as Edit
from netsurgery.errors import NetsurgeryError as NetsurgeryError
from netsurgery.module_rewrites import ModuleRewrite as ModuleRewrite
from netsurgery.persistence import load as load
from netsurgery.persistence import save as save
from netsurgery.pipeline import Pass as Pass
from netsurgery.pipeline import apply as apply
from netsurgery.pipeline import cost as cost
from netsurgery.pipeline import plan as plan
from netsurgery.pipeline import trace as trace
from netsurgery.rewriting.surgery import rewrite as rewrite
from netsurgery.units import Copy as Copy
from netsurgery.units import New as New
from netsurgery.verification.oracles import verify as verify

if TYPE_CHECKING:
    from netsurgery.search.growing import grow as grow


def __getattr__(name: str) -> Any:
    """``grow`` on first use: it trains, and loads all passes."""
    if name == "grow":
        from netsurgery.search.growing import grow

        return grow
    raise AttributeError(f"module 'netsurgery' has no attribute {name!r}")


try:
    __version__ = version("netsurgery")
except PackageNotFoundError:  # used from a folder, not installed
    __version__ = "unknown"

"""A layer more, and the same outputs: an identity, a shortcut with a branch that adds nothing yet, or new channels."""

from __future__ import annotations

import dataclasses
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, fx, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from netsurgery.analysis.graph_patterns import Pattern
from netsurgery.analysis.growth import obstacles
from netsurgery.analysis.network import Network
from netsurgery.arguments import is_count, near_names
from netsurgery.axes import find
from netsurgery.edit import Edit
from netsurgery.errors import InputError
from netsurgery.module_rewrites import ModuleRewrite, register_rewrite
from netsurgery.notation import Operation
from netsurgery.outcome import Outcome
from netsurgery.passes.bundles import call_of
from netsurgery.passes.whole_layers import Layer, Layers, shell
from netsurgery.pipeline import Pass
from netsurgery.rewriting.stages import left
from netsurgery.units import New

__all__ = ["Dense", "DenselyInserted", "InsertLayer", "Inserted", "Shortcut"]

_KINDS = ("identity", "shortcut", "dense")
_NORMED = Pattern("convolution|linear -> batch_norm")
_CONVOLUTIONS: dict[int, Any] = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
_NORMS: dict[int, Any] = {1: nn.BatchNorm1d, 2: nn.BatchNorm2d, 3: nn.BatchNorm3d}


class Shortcut(nn.Module):
    """The input and what a branch makes of it, added.

    Args:
        branch: gives what it is given in shape.
    """

    def __init__(self, branch: nn.Module):
        super().__init__()
        self.branch = branch

    def forward(self, x: Tensor) -> Tensor:
        """Add the branch."""
        out: Tensor = x + self.branch(x)
        return out


class Dense(nn.Module):
    """The output of a layer, and behind it new channels that a second layer makes of it.

    Args:
        layer: the first.
        new: the second.
        dim: the dimension of the channels, counted from the last one.
    """

    def __init__(self, layer: nn.Module, new: nn.Module, dim: int):
        super().__init__()
        self.layer, self.new, self.dim = layer, new, dim

    def forward(self, x: Tensor) -> Tensor:
        """Put them one behind the other."""
        y = self.layer(x)
        return torch.cat([y, self.new(y)], self.dim)


@register_rewrite
@dataclass(frozen=True)
class Inserted(ModuleRewrite):
    """A module, and a layer behind it that passes on what it gives.

    Args:
        kind: "identity" or "shortcut".
        layer: the path of the layer that the new one resembles, where the module is the batch norm behind it.
        clamp: the limits of an activation beside an identity: where what is passed on is, or will be, within these.
        first: whether that activation comes before the new layer, else after it.
        seed: fixes the weights of a branch.
    """

    kind: str
    layer: str | None = None
    clamp: tuple[float, float | None] | None = None
    first: bool = True
    seed: int = 0

    @property
    def reads(self) -> tuple[str, ...]:
        """The layer."""
        return () if self.layer is None else (self.layer,)

    def build(self, module: nn.Module, layer: Layer | None = None) -> nn.Module:
        """A series that begins with the module."""
        like: Any = module if layer is None else layer
        norm = None if layer is None else module
        if self.kind == "shortcut":
            draw = torch.Generator().manual_seed(self.seed)
            branch = [*_begun(like, norm, draw), nn.ReLU(), _new(like, zero=True)]
            return nn.Sequential(module, Shortcut(nn.Sequential(*branch)))
        new = list(_begun(like, norm, None))
        if self.clamp is not None:
            new.insert(0 if self.first else len(new), _activation(*self.clamp))
        return nn.Sequential(module, *new)


@register_rewrite
@dataclass(frozen=True)
class DenselyInserted(ModuleRewrite):
    """A layer whose last filters make way for those of a second layer, which reads what the others give.

    Args:
        channels: how many.
        seed: fixes the weights of the second layer.
    """

    channels: int
    seed: int = 0

    def build(self, module: Layer) -> nn.Module:
        """Both, concatenated."""
        dim = 1 if isinstance(module, _ConvTransposeNd) else 0
        stay = module.weight.shape[dim] - self.channels
        first = shell(module)
        first._parameters = {
            key: None if one is None else nn.Parameter(one.detach().narrow(axis, 0, stay).clone(), one.requires_grad)
            for (key, one), axis in zip(module._parameters.items(), (dim, 0), strict=True)
        }
        setattr(first, "out_features" if isinstance(first, nn.Linear) else "out_channels", stay)
        new = _new(first, draw=torch.Generator().manual_seed(self.seed), out=self.channels)
        return Dense(first, new, -1 if isinstance(module, nn.Linear) else 1 - module.weight.dim())


def _begun(like: Layer, norm: Any, draw: torch.Generator | None) -> Iterator[nn.Module]:
    """A layer, and a batch norm that changes nothing in eval mode where there is one."""
    yield _new(like, draw)
    if norm is not None:
        dims = 1 if isinstance(like, nn.Linear) else like.weight.dim() - 2
        new = _NORMS[dims](_width(like), norm.eps, norm.momentum, dtype=like.weight.dtype)
        nn.init.constant_(new.weight, (1 + norm.eps) ** 0.5)  # its variance is 1 and its mean 0
        yield new


def _new(like: Layer, draw: torch.Generator | None = None, zero: bool = False, out: int | None = None) -> nn.Module:
    """A layer with the width of another's output on both sides: random, zero, or an identity."""
    width = _width(like)
    new: Any
    if isinstance(like, nn.Linear):
        new = nn.Linear(width, out or width, like.bias is not None, dtype=like.weight.dtype)
    else:
        sizes = tuple(3 if size > 2 else 1 for size in like.kernel_size)
        new = _CONVOLUTIONS[len(sizes)](
            width,
            out or width,
            sizes,
            padding=tuple(size // 2 for size in sizes),
            groups=1 if out else like.groups,
            bias=like.bias is not None,
            dtype=like.weight.dtype,
        )
    if new.bias is not None:
        nn.init.zeros_(new.bias)
    if zero:
        nn.init.zeros_(new.weight)
    elif draw is not None:
        nn.init.kaiming_normal_(new.weight, nonlinearity="relu", generator=draw)
    elif isinstance(new, nn.Linear):
        nn.init.eye_(new.weight)
    else:
        nn.init.dirac_(new.weight, new.groups)
    return new  # type: ignore[no-any-return]


def _width(layer: Layer) -> int:
    return layer.out_features if isinstance(layer, nn.Linear) else layer.out_channels


def _activation(low: float, high: float | None) -> nn.Module:
    return nn.ReLU() if high is None else nn.ReLU6() if (low, high) == (0, 6) else nn.Hardtanh(low, high)


@dataclass(frozen=True)
class InsertLayer(Pass):
    """Insert a layer behind a convolution or a linear layer, so that no output changes in eval mode.

    The new layer stands behind the batch norm, where one alone reads the layer, and then has one, too. It is as wide as
    what it reads, with a kernel of at most 3 and as many groups. What stood there and the new modules become an
    ``nn.Sequential``: the keys ``bn1.weight`` become ``bn1.0.weight``, and new ones ``bn1.1.weight`` and so on.

    - ``"identity"``: its kernel is that of the identity, and its batch norm undoes itself: mean 0, variance 1, and the
      scale ``sqrt(1 + eps)``. Where a ReLU or ReLU6 alone reads what is passed on, or made it, so that one more changes
      nothing, an activation makes the layer one of its own; elsewhere there is none.
    - ``"shortcut"``: ``x + f(x)``, of which ``f`` is such a layer, a ReLU, and a second layer that is zero
      (``netsurgery.passes.Shortcut``).
    - ``"dense"``: new channels behind those of the layer, made of these by a new layer (``netsurgery.passes.Dense``).
      Whatever reads the layer reads them by zeros, as of ``PlantChannels``, and whatever is added to it gets as many.

    Args:
        path: of the layer.
        kind: one of these.
        channels: of ``"dense"``: how many are new; by default a quarter of those that the layer has.
        seed: fixes the random weights.

    Raises:
        InputError: no such layer, another kind, or channels that cannot be added without a change of outputs.

    Example:
        >>> import torch, netsurgery
        >>> from netsurgery.passes import InsertLayer
        >>> model = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 1), torch.nn.ReLU(), torch.nn.Conv2d(4, 2, 3))
        >>> deeper = netsurgery.apply(model, [InsertLayer("0", kind="identity")], torch.zeros(1, 3, 8, 8), verify=True)
        >>> [type(module).__name__ for module in deeper[0]]
        ['Conv2d', 'ReLU', 'Conv2d']

    Source: the mutations of EENA, Zhu et al., arXiv 1905.07320; identities go back to Net2DeeperNet, arXiv 1511.05641.
    The place in front of the activation, the kernel, and the second layer of the branch are our choices.
    """

    path: str
    kind: str = "identity"
    channels: int | None = dataclasses.field(default=None, kw_only=True)
    seed: int = dataclasses.field(default=0, kw_only=True)

    gives: ClassVar[frozenset[str]] = frozenset({"edit"})

    def __repr__(self) -> str:
        return call_of(self)

    def __post_init__(self) -> None:
        if self.kind not in _KINDS:
            raise InputError(f"InsertLayer(kind={self.kind!r}): one of {', '.join(map(repr, _KINDS))}")
        if self.channels is not None and (self.kind != "dense" or not is_count(self.channels, 1)):
            raise InputError(f"InsertLayer(channels={self.channels!r}): of kind 'dense', a whole number of at least 1")

    def run(self, network: Network) -> Edit:
        """Find the place, and what an activation there would change."""
        layers = Layers(network)
        module = layers.modules.get(self.path)
        if not isinstance(module, _ConvNd | nn.Linear) or not layers.ran(self.path):
            names = [path for path, one in layers.modules.items() if isinstance(one, _ConvNd | nn.Linear)]
            found = f"is a {type(module).__name__}" if module is not None else f"is none of {network.model_name}"
            found = "does not run" if isinstance(module, _ConvNd | nn.Linear) else found
            raise InputError(
                f"InsertLayer({self.path!r}) takes the path of a convolution or a linear layer that runs; this one "
                f"{found}{near_names(str(self.path), names)}"
            )
        seed = zlib.crc32(f"{self.seed} {self.path}".encode())  # else equal layers get equal weights
        notes: dict[str, str] = {}
        if self.kind == "dense":
            edit = self._dense(network, module, seed)
        else:
            place, rewrite = _placed(network, layers, self.path, self.kind, seed)
            edit = Edit(network, {}, modules={place: rewrite})
            if self.kind == "identity" and rewrite.clamp is None:
                notes[self.path] = "no activation is beside the new layer, since it would change outputs"
        added = edit.after.params - edit.before.params
        asked, got = f"a layer behind '{self.path}' ({self.kind})", f"{added:,} parameters"
        outcome = Outcome(asked, got, does="insert", notes=notes)
        return dataclasses.replace(edit, outcomes=(outcome,))

    def _dense(self, network: Network, module: Layer, seed: int) -> Edit:
        """Plant units first, and let a second layer make them."""
        axis = network.axes.get(f"{self.path}.weight", (None, None))[1 if isinstance(module, _ConvTransposeNd) else 0]
        group = None if axis is None else network.by_channel.get(find(axis))
        if (why := Layers(network).obstacle(self.path)) is not None:
            raise InputError(f"InsertLayer({self.path!r}, 'dense'): {why}")
        if isinstance(module, _ConvNd) and module.groups > 1:
            raise InputError(f"InsertLayer({self.path!r}, 'dense'): a grouped convolution keeps its groups")
        if group is None or len(network.equal_to(group.name)) > 1:
            raise InputError(f"InsertLayer({self.path!r}, 'dense'): its channels are in groups, or grow with others")
        if group.locked is not None:
            raise InputError(f"InsertLayer({self.path!r}, 'dense'): its channels are locked: {group.locked}")
        count = self.channels or max(1, group.size // 4)
        keep = {group.name: (*range(group.size), *[New(seed=self.seed)] * count)}
        if why := obstacles(network, keep).get(group.name):
            raise InputError(f"InsertLayer({self.path!r}, 'dense'): new channels would change outputs: {why}")
        planted = Edit(network, keep)
        return planted.then(Edit(left(planted), {}, modules={self.path: DenselyInserted(count, seed)}))


def _placed(network: Network, layers: Layers, path: str, kind: str, seed: int) -> tuple[str, Inserted]:
    """Where a layer is inserted, and how."""
    match = next((one for one in _NORMED.find(network) if one.forwards[0] == path), None)
    place, layer = path, None
    if match is not None and layers.ran(path) == 1:
        norm = match.forwards[1]
        if norm and isinstance(layers.modules[norm], _BatchNorm) and layers.ran(norm) == 1:
            place, layer = norm, path
    if kind == "shortcut":
        return place, Inserted(kind, layer, seed=seed)
    runs = [[call.out for call in program.calls if call.path == place] for program in network.programs]
    clamps = {_clamp(outs) for outs in runs if outs}  # in eval mode and in training
    clamp, first = clamps.pop() if len(clamps) == 1 else (None, True)
    return place, Inserted(kind, layer, clamp, first)


def _clamp(outs: Sequence[Any]) -> tuple[tuple[float, float | None] | None, bool]:
    """The limits of what a module gives in a run, or of what alone reads it; and whether it is the latter."""
    out = outs[0] if len(outs) == 1 else None
    if (made := _limits(out)) is not None:
        return made, False
    readers = list(out.users) if isinstance(out, fx.Node) else []
    return (_limits(readers[0]) if len(readers) == 1 else None), True


def _limits(node: Any) -> tuple[float, float | None] | None:
    """The limits between which a ReLU, or the like, leaves numbers as they are; None of other results."""
    name = str(node.target) if isinstance(node, fx.Node) and node.op == "call_function" else ""
    if name in ("aten.relu.default", "aten.relu_.default"):
        return 0.0, None
    if name in ("aten.hardtanh.default", "aten.hardtanh_.default"):
        given = Operation(node).arguments
        return float(given["min_val"]), float(given["max_val"])
    return None

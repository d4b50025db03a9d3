"""Batch norms become part of the layers in front of them."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor, fx, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from netsurgery.analysis.graph_patterns import Match, Pattern
from netsurgery.analysis.network import Network
from netsurgery.capture.copies import named_modules
from netsurgery.capture.program import Call, Program, names_used
from netsurgery.edit import Edit
from netsurgery.errors import InputError
from netsurgery.module_rewrites import ModuleRewrite, register_rewrite
from netsurgery.outcome import Outcome
from netsurgery.passes.bundles import call_of
from netsurgery.passes.patterns import Chosen, Modules, as_patterns
from netsurgery.passes.whole_layers import Layer, Layers, has_hooks, shell
from netsurgery.pipeline import Pass

__all__ = ["FoldBatchNorm", "Folded", "WithoutNorm"]

_NORMED = Pattern("convolution|addmm|mm|linear -> batch_norm")
_NORM = Pattern("batch_norm")


@register_rewrite
@dataclass(frozen=True)
class Folded(ModuleRewrite):
    """A convolution or linear layer that does what it and the batch norm behind it did in eval mode.

    Args:
        norm: the path of the batch norm.
    """

    norm: str

    @property
    def reads(self) -> tuple[str, ...]:
        """The batch norm."""
        return (self.norm,)

    def build(self, module: Layer, norm: _BatchNorm) -> nn.Module:
        """A copy of the layer with other weights, and a bias."""
        assert norm.running_mean is not None and norm.running_var is not None
        scale = (norm.running_var.double() + norm.eps).rsqrt()
        scale = scale if norm.weight is None else scale * norm.weight.detach().double()
        bias = -norm.running_mean.double() if module.bias is None else module.bias.detach() - norm.running_mean.double()
        bias = bias * scale if norm.bias is None else bias * scale + norm.bias.detach().double()
        new = shell(module)
        weight = _scaled(module, scale).to(module.weight.dtype)
        new._parameters["weight"] = nn.Parameter(weight, module.weight.requires_grad)
        trained = any(one is not None and one.requires_grad for one in (module.bias, norm.bias))
        new._parameters["bias"] = nn.Parameter(bias.to(module.weight.dtype), trained)
        return new


def _scaled(module: Layer, scale: Tensor) -> Tensor:
    """The weight with each filter multiplied by a number."""
    weight = module.weight.detach().double()
    if isinstance(module, _ConvTransposeNd):  # (in, out within its group, *kernel)
        groups = module.groups
        parts = weight.unflatten(0, (groups, -1))  # (groups, in within, out within, *kernel)
        scaled: Tensor = parts * scale.reshape(groups, 1, -1, *[1] * (weight.dim() - 2))
        return scaled.flatten(0, 1)
    return weight * scale.reshape(-1, *[1] * (weight.dim() - 1))


@register_rewrite
@dataclass(frozen=True)
class WithoutNorm(ModuleRewrite):
    """Nothing, or the modules that ran in a batch norm behind its normalisation.

    Args:
        keep: their names, in order.
    """

    keep: tuple[str, ...] = ()

    def build(self, module: nn.Module) -> nn.Module:
        """An identity, or a series of modules under their names."""
        if not self.keep:
            return nn.Identity()
        series = nn.Sequential()
        for name in self.keep:
            series.add_module(name, module.get_submodule(name))
        return series


@dataclass(frozen=True)
class FoldBatchNorm(Pass):
    """Fold each batch norm into the convolution or linear layer in front of it, where it alone reads that.

    ``y = gamma (W x + b - mean) / sqrt(var + eps) + beta`` is a layer with weights ``gamma / sqrt(var + eps) W`` and a
    bias. Outputs in eval mode stay the same; the layer keeps its class and the name of its weight, and gets a bias.
    The norm becomes an ``nn.Identity``, and its keys go; what a class of its own runs behind the normalisation, such as
    an activation, stays in its place. Pairs are found on the recorded graph, not by names. Those that cannot be folded
    are left, and ``edit.summary()`` names them: a layer that runs several times, shares its weight, computes it from
    others or has hooks, and a norm that takes the statistics of each batch.

    Args:
        include: only layers, or norms, that these match, as for ``PruneChannels``.
        exclude: none that these match.

    Raises:
        InputError: a batch norm in training mode, a pattern that matches nothing, or no batch norm that can be folded.

    Example:
        >>> import torch, netsurgery
        >>> from netsurgery.passes import FoldBatchNorm
        >>> model = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 1, bias=False), torch.nn.BatchNorm2d(4)).eval()
        >>> netsurgery.apply(model, [FoldBatchNorm()], torch.zeros(1, 3, 2, 2), verify=True)
        Sequential(
          (0): Conv2d(3, 4, kernel_size=(1, 1), stride=(1, 1))
          (1): Identity()
        )

    Source: Jacob et al., "Quantization and Training of Neural Networks for Efficient Integer-Arithmetic-Only
    Inference", arXiv 1712.05877, section 3.2.
    """

    include: Modules = ()
    exclude: Modules = ()

    gives: ClassVar[frozenset[str]] = frozenset({"edit"})

    def __repr__(self) -> str:
        return call_of(self)

    def __post_init__(self) -> None:
        for name in ("include", "exclude"):
            object.__setattr__(self, name, as_patterns(getattr(self, name)))

    def run(self, network: Network) -> Edit:
        """Find the pairs, and what stands in the way of each."""
        network.require_weights(self)
        norms = [norm for norm in _Pairs(network).norms if self._meant(network, norm)]
        if training := next((norm.path for norm in norms if norm.module.training), None):
            raise InputError(
                f"FoldBatchNorm: '{training}' of {network.model_name} is in training mode, in which a batch norm takes "
                "the statistics of each batch: call model.eval() first"
            )
        short = {norm.path: norm.why for norm in norms if norm.why is not None}
        modules: dict[str, ModuleRewrite] = {}
        for norm in norms:
            if norm.why is None:
                modules |= {norm.layer: Folded(norm.path), norm.path: WithoutNorm(norm.keep)}
        edit = Edit(network, {}, modules=modules)
        for layer in _without_bias(edit):  # own code of its class does not add one
            path = modules.pop(layer).reads[0]
            del modules[path]
            short[path] = f"the code of '{layer}', a {type(named_modules(network.model)[layer]).__name__}, adds no bias"
        if not modules:
            reasons = "; ".join(f"{path}: {why}" for path, why in list(short.items())[:5]) or "there is none"
            raise InputError(f"FoldBatchNorm: {network.model_name} has no batch norm that can be folded: {reasons}")
        outcome = Outcome(f"{len(norms)} batch norms", f"{len(modules) // 2}", short, does="fold")
        if len(modules) < len(edit.modules):
            edit = Edit(network, {}, modules=modules)
        return dataclasses.replace(edit, outcomes=(outcome,))

    def _meant(self, network: Network, norm: _Norm) -> bool:
        include, exclude = (as_patterns(given) for given in (self.include, self.exclude))
        included, excluded = (Chosen(network, given) for given in (include, exclude))
        paths = [path for path in (norm.path, norm.layer) if path]
        return (not include or any(path in included for path in paths)) and not any(path in excluded for path in paths)


def _without_bias(edit: Edit) -> list[str]:
    """The layers whose new bias is not used."""
    if edit.rewritten is None:
        return []
    used = names_used(edit.rewritten.network.programs)
    return [path for path, one in edit.modules.items() if isinstance(one, Folded) and f"{path}.bias" not in used]


@dataclass(frozen=True)
class _Norm:
    """A batch norm of a network.

    Attributes:
        path: of the norm.
        layer: the path of the layer in front of it; empty where there is none.
        why: what stands in the way of folding it, or None.
        keep: the modules in it that run behind the normalisation.
    """

    path: str
    module: _BatchNorm
    layer: str
    why: str | None
    keep: tuple[str, ...] = ()


class _Pairs:
    """The batch norms of a network with the layers in front of them."""

    def __init__(self, network: Network):
        self.network, self.layers = network, Layers(network)
        self.modules = self.layers.modules
        self.found = [{m.forwards[1]: m for m in _NORMED.find_in(program)} for program in network.programs]

    @property
    def norms(self) -> Iterator[_Norm]:
        """All batch norms that run, in order."""
        for path in dict.fromkeys(m.forwards[0] for p in self.network.programs for m in _NORM.find_in(p)):
            if isinstance(norm := self.modules.get(path or ""), _BatchNorm) and path:
                match = self.found[0].get(path)
                layer = str(match.forwards[0]) if match is not None else ""
                keep = self._kept(path)
                yield _Norm(path, norm, layer, self._obstacle(path, norm, match, keep), keep or ())

    def _obstacle(self, path: str, norm: _BatchNorm, match: Match | None, keep: tuple[str, ...] | None) -> str | None:
        """The reason why a norm cannot be folded, if there is one."""
        if match is None:
            return "it does not read a convolution or linear layer that nothing else reads"
        name = str(match.forwards[0])
        layer = self.modules[name]
        if not isinstance(layer, _ConvNd | nn.Linear):
            return f"'{name}', which runs the layer in front of it, is a {type(layer).__name__}"
        runs = zip(self.found, self.layers.counts, strict=True)
        if any(path not in found or found[path].forwards != match.forwards for found, count in runs if path in count):
            return "in training mode it does not read this layer alone"
        if max(self.layers.ran(name), self.layers.ran(path)) > 1:
            return f"'{name}' or the norm runs several times"
        if isinstance(layer, nn.Linear) and len(_input(match).meta["shape"]) != 2:
            return f"it does not normalise the features of '{name}'"
        if norm.running_mean is None or norm.running_var is None:
            return "it takes the statistics of each batch"
        if has_hooks(norm):
            return f"'{path}' has hooks, which would see something else"
        if (why := self.layers.obstacle(name)) is not None:
            return why
        return None if keep is not None else f"its class {type(norm).__name__} does something else than to normalise"

    def _kept(self, path: str) -> tuple[str, ...] | None:
        """The modules that run in a norm behind the normalisation, one after the other; None where that is not all."""
        names: list[tuple[str, ...]] = []
        for program in self.network.programs:
            calls = [call for call in program.calls if call.path == path]
            if calls:
                kept = _series(program, calls[0])
                if kept is None:
                    return None
                names.append(kept)
        return names[0] if names and all(one == names[0] for one in names) else None


def _series(program: Program, call: Call) -> tuple[str, ...] | None:
    """The direct parts of a module that run one after the other on what its batch norm gives."""
    parts = [one for one in program.calls if one.path.rpartition(".")[0] == call.path]
    parts = [one for one in parts if call.begin <= one.begin and one.end <= call.end]
    taken = {place for part in parts for place in range(part.begin, part.end)}
    left = [program.operations[place] for place in range(call.begin, call.end) if place not in taken]
    norms = [node for node in left if "batch_norm" in str(node.target)]
    if len(norms) != 1 or any(node.users for node in left if node not in norms):
        return None
    given: Any = next((user for user in norms[0].users), None)
    for part in parts:
        if list(part.args) != [given] or part.kwargs:
            return None
        given = part.out
    return tuple(part.path.rpartition(".")[2] for part in parts) if call.out is given else None


def _input(match: Match) -> fx.Node:
    """The tensor that a norm normalises."""
    assert match.nodes[1] is not None
    return match.nodes[1].all_input_nodes[0]

"""Scores from the gradients that a training loop has left in the parameters."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from netsurgery.analysis.groups import Group, Role
from netsurgery.analysis.network import Network
from netsurgery.analysis.proportional import proportional_to
from netsurgery.analysis.weights import Use, Weight, uses
from netsurgery.axes import Axis, leaves
from netsurgery.capture.source_locations import format_where
from netsurgery.errors import InputError
from netsurgery.passes.entries import ROLES, accumulated, as_roles, in_roles, listed, summed, unit_sums
from netsurgery.pipeline import Pass

__all__ = ["GradientScore"]

_log = logging.getLogger("netsurgery")


@dataclass(frozen=True)
class GradientScore(Pass):
    """Gradient times weight over the entries of each unit, from what is in ``.grad`` now: no data, no run.

    Call it where a step of training has its gradients: after ``backward`` (of one batch or several, under AMP after
    ``scaler.unscale_``), before ``zero_grad``. A factor that all gradients share does not matter. Where the loss is
    at a minimum in the weights, their gradients over all of the data vanish, and so does this score: use some batches,
    not all, or ``TaylorScore``, which takes the absolute value sample by sample. In ``.grad`` the slopes of samples
    were summed before the absolute value is taken: they cancel, as they do in ``LossIncreaseScore(by="rise")``.

    Args:
        kind: "taylor", ``|sum w g|``: the change of the loss on removal, to first order; "squares", ``sum (w g)²``, of
            which entries with opposite signs do not cancel.
        roles: which entries count, as for ``netsurgery.passes.unit_scores``. By default the weights that layers read a
            unit with: ``sum w g`` over these is the derivative of the loss by a gate on the unit at these layers, as in
            ``TaylorScore`` (whose gate is in front of a layer or group norm, this one behind). A unit that no layer
            reads is scored by all that it has: a dimension of queries and keys by the weights of both, so twice its
            derivative. ``("produces", "carries")``, the weights and biases that make a unit, have the same sum as its
            readers where neither a norm nor anything but ReLU comes between; in front of a batch norm in training mode
            the sum over a filter is zero.

    A parameter that layers share has one gradient, which counts as a whole. One without a gradient counts as zero, and
    the logger ``netsurgery`` says so. Where a weight is computed from parameters, ``sum w g`` is that of a parameter
    that it is proportional to, entry by entry: a masked weight, the length of a weight norm for the filters that it
    makes; else it is refused.

    Raises:
        InputError: no parameter has a gradient, or all are zero; none of those that a group is scored by has one; or a
            computed weight, the gradient of which those of its parameters do not tell.

    Source: Molchanov et al., "Importance Estimation for Neural Network Pruning", arXiv 1906.10771: the contribution of
    a group of parameters is ``(sum w g)²``, of which this is the square root, or ``sum (w g)²``. It averages the
    squares over batches, where ``.grad`` holds a sum; its weights are those of filters, or gates behind batch norms.
    Our choice: the weights that read a unit, which are exact behind norms; several readers of coupled units together.

    Example:
        >>> import torch, netsurgery
        >>> from netsurgery.passes import GradientScore, PruneChannels
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 3))
        >>> model(torch.randn(16, 4)).square().mean().backward()
        >>> netsurgery.apply(model, [GradientScore(), PruneChannels(0.5)])[0]
        Linear(in_features=4, out_features=4, bias=True)
    """

    kind: Literal["taylor", "squares"] = "taylor"
    roles: tuple[Role, ...] = ("consumes",)

    gives: ClassVar[frozenset[str]] = frozenset({"scores"})

    def __post_init__(self) -> None:
        if self.kind not in ("taylor", "squares"):
            raise InputError(f"GradientScore(kind={self.kind!r}): 'taylor' or 'squares'")
        object.__setattr__(self, "roles", as_roles("GradientScore", self.roles))

    def run(self, network: Network) -> Network:
        """Lay the scores on the network."""
        if not network.prunable:
            return network
        network.require_weights(self)
        gradients = _gradients(network)
        found = uses(network)
        wanted = {g.name: self._parameters(network, g, found[g.name], gradients) for g in network.prunable}
        chosen = {name: [one for one in some if one.weight.names[0] in gradients] for name, some in wanted.items()}
        _report_missing(wanted, chosen)

        def along(weight: Weight, axes: list[int]) -> Tensor:
            products = accumulated(weight.value) * accumulated(gradients[weight.names[0]]).to(weight.value.device)
            return summed(products if self.kind == "taylor" else products.square(), axes)

        sums = unit_sums(network, chosen, along)
        return network.with_scores({name: values.abs() for name, values in sums.items()}, comparable=True)

    def _parameters(
        self, network: Network, group: Group, found: list[Use], gradients: Mapping[str, Tensor]
    ) -> list[Use]:
        """The parameters that a group is scored by, each axis once."""
        numbers = [use for use in found if use.weight.value.is_floating_point()]
        direct: dict[tuple[str, int], Use] = {}
        for use in in_roles(numbers, self.roles, ROLES):
            plain = use if use.weight.node is None else _proportional(network, group, use, gradients, self.kind)
            direct.setdefault((plain.weight.names[0], plain.axis), plain)
        return list(direct.values())


def _gradients(network: Network) -> dict[str, Tensor]:
    """The gradients that there are, dense, by name."""
    leaf = {name: tensor for name, tensor in network.tensors.items() if tensor.is_leaf}  # others warn
    found = {name: tensor.grad for name, tensor in leaf.items() if tensor.grad is not None}
    if not found:
        raise InputError(
            f"GradientScore: no parameter of {network.model_name} has a gradient: call loss.backward() on this very "
            "model first, and score before optimizer.zero_grad()"
        )
    dense = {name: one.to_dense() if one.layout is not torch.strided else one for name, one in found.items()}
    if not any(bool(gradient.any()) for gradient in dense.values()):
        raise InputError(
            f"GradientScore: all gradients of {network.model_name} are zero: score after loss.backward(), before "
            "optimizer.zero_grad()"
        )
    return dense


def _report_missing(wanted: Mapping[str, list[Use]], chosen: Mapping[str, list[Use]]) -> None:
    """Say which parameters have no gradient.

    Raises:
        InputError: of those that a group is scored by, none has.
    """
    for name, found in chosen.items():
        if not found:
            names = listed(use.weight.names[0] for use in wanted[name])
            raise InputError(
                f"GradientScore: group '{name}' is scored by {names}, without a gradient: let requires_grad be True "
                "there and run backward again, or choose other roles, such as roles=('produces', 'carries')"
            )
    had = {use.weight.names[0] for found in chosen.values() for use in found}
    missing = {
        use.weight.names[0]: None for found in wanted.values() for use in found if use.weight.names[0] not in had
    }
    if missing:
        _log.warning("GradientScore: %s without a gradient count as zero", listed(missing))


def _proportional(network: Network, group: Group, use: Use, gradients: Mapping[str, Tensor], kind: str) -> Use:
    """A parameter that a computed weight is proportional to, if possible one that has a gradient.

    Squares are of single entries: there it has as many as the weight.

    Raises:
        InputError: there is none that has the group's units as the weight has them.
    """
    weight, node = use.weight, use.weight.node
    own = _times(group.channel, weight.axes)
    names = proportional_to(node) if node is not None and not weight.parts else []
    for name in sorted(names, key=lambda name: name not in gradients):
        axes = network.axes.get(name, ())
        times = _times(group.channel, axes)
        alike = kind == "taylor" or network.tensors[name].shape == weight.value.shape
        if alike and len(own) == len(times) == 1 and sum(times.values()) >= sum(own.values()):
            return Use(Weight((name,), axes, network.tensors[name], {}), next(iter(times)), use.role)
    where = format_where(node.meta["where"]) if node is not None else ""
    raise InputError(
        f"GradientScore: group '{group.name}' is scored by a weight that is computed from {listed(weight.names)} "
        f"{where}, the gradient of which those of its parameters do not tell: let the layer hold the result "
        "(parametrize.remove_parametrizations, merge_and_unload) and run backward again, or use TaylorScore(data)"
    )


def _times(channel: Axis, axes: tuple[Axis, ...]) -> dict[int, int]:
    """For each axis that a channel occurs in, the number of times."""
    counts = {at: sum(leaf is channel for leaf in leaves(axis)) for at, axis in enumerate(axes)}
    return {at: count for at, count in counts.items() if count}

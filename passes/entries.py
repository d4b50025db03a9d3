"""Sums of numbers at the entries of weights over the entries of each unit."""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection, Hashable, Iterable, Mapping, Sequence
from typing import TypeVar, get_args

import torch
from torch import Tensor, nn

from netsurgery.analysis.groups import Group, Member, Role
from netsurgery.analysis.network import Network
from netsurgery.analysis.weights import Use, Weight
from netsurgery.arguments import expect
from netsurgery.axes import Axis
from netsurgery.errors import InputError
from netsurgery.kernels.criteria import accumulator
from netsurgery.positions import units_at
from netsurgery.tables import first_of

__all__ = ["ROLES", "accumulated", "as_roles", "in_roles", "listed", "per_unit", "summed", "unit_scores", "unit_sums"]

ROLES: tuple[Role, ...] = get_args(Role)
HasRole = TypeVar("HasRole", Use, Member)


def unit_scores(
    network: Network, tensors: Mapping[str, Tensor], roles: Role | Collection[Role] = ROLES
) -> dict[str, Tensor]:
    """Sum the importance of single entries of parameters over the units of each group: any score of weights.

    A unit's entries are all that its removal takes away, behind flattening, concatenation, channel shuffles, groups
    and heads, too: each once, be it on two axes as in a recurrent weight.

    Args:
        network: as ``netsurgery.trace`` returns it.
        tensors: by name of a parameter (or buffer) a tensor of its shape, such as ``|w|``, ``w²`` or ``(w g)²``; on any
            device, of any real dtype; they are summed in float32, or in float64 where given so. Tensors that are not
            given count as zeros. A tensor that modules share is given once, under any of its names.
        roles: which of a unit's entries count: those that it is made by ("produces"), that layers read it with
            ("consumes"), and that it is given on its way ("carries": biases, norms). A group that has none in these
            roles is scored by all that it has, as is a unit that no layer reads when ``roles`` is "consumes".

    Returns:
        For each group that may be pruned the scores of its units, ``(units,)``, on the device of the first tensor.
        For means, divide by the sums of tensors of ones.

    A weight that is computed from parameters (weight norm, masks, low-rank updates) is none of these tensors: what is
    summed are entries of the parameters, of which only the caller knows what they are worth. ``MagnitudeScore`` and
    its like score such weights as layers use them.

    Raises:
        InputError: a group of which nothing is given, a name that is none of the model's, a tensor of another shape,
            without data, complex or sharded, or an unknown role.

    Example:
        >>> import torch, netsurgery
        >>> from netsurgery.passes import unit_scores
        >>> model = torch.nn.Sequential(torch.nn.Conv2d(1, 2, 1, bias=False), torch.nn.Flatten(), torch.nn.Linear(8, 1))
        >>> network = netsurgery.trace(model, torch.zeros(1, 1, 2, 2))
        >>> unit_scores(network, {"2.weight": torch.arange(8.0).view(1, 8)})["0"]  # of 2 channels times 4 places
        tensor([ 6., 22.])
        >>> squares = {name: parameter.square() for name, parameter in model.named_parameters()}
        >>> network = network.with_scores(unit_scores(network, squares))  # as a pass of your own returns it
    """
    kinds = (network, Network), (tensors, Mapping)
    expect("unit_scores(network, tensors)", "what trace returns, and tensors by parameter name", *kinds)
    wanted = as_roles("unit_scores", roles)
    weights = {name: Weight((name,), network.axes[name], one, {}) for name, one in _named(network, tensors).items()}
    chosen: dict[str, list[Use]] = {}
    for group in network.prunable:
        members = in_roles(group.members, wanted, ROLES)
        mine = [Use(weights[m.parameter], m.axis, m.role) for m in members if m.parameter in weights]
        if not mine:
            raise InputError(
                f"unit_scores: nothing is given that group '{group.name}' could be scored by: "
                f"{listed(m.parameter for m in members)}"
            )
        chosen[group.name] = mine
    return unit_sums(network, chosen, lambda weight, axes: summed(accumulated(weight.value), axes))


def unit_sums(
    network: Network, chosen: Mapping[str, Sequence[Use]], along: Callable[[Weight, list[int]], Tensor]
) -> dict[str, Tensor]:
    """For each group the sums over the entries of each unit in some uses, each entry once: ``(units,)``.

    Args:
        chosen: by group; one that has no uses has no sums.
        along: the sums over some axes of a weight (it may be none of them) of what its entries are worth.
    """
    held: dict[Hashable, tuple[Weight, dict[str, set[int]]]] = {}  # one tensor may be the value of two weights
    for name, found in chosen.items():
        for use in found:
            key = use.weight.names, id(use.weight.value)
            held.setdefault(key, (use.weight, {}))[1].setdefault(name, set()).add(use.axis)
    sums: dict[str, Tensor] = {}
    places = functools.cache(units_at)
    for weight, groups in held.values():
        left: dict[tuple[int, ...], Tensor] = {}
        for name, axes in groups.items():
            kept = tuple(sorted(axes))
            if kept not in left:
                left[kept] = along(weight, [axis for axis in range(weight.value.dim()) if axis not in kept])
            found_at = [places(weight.axes[axis]) for axis in kept]
            term = _at_units(left[kept], found_at, network[name])
            sums[name] = sums[name] + term.to(sums[name].device) if name in sums else term
    return sums


def summed(values: Tensor, axes: list[int]) -> Tensor:
    """The sums over some axes; over none these are the values."""
    return values.sum(axes) if axes else values


def _at_units(values: Tensor, places: list[list[tuple[Axis, Tensor]]], group: Group) -> Tensor:
    """The sums of values over the units of a group that stand along their axes.

    Args:
        places: for each axis, as ``units_at`` gives them.
    """
    sums = values.new_zeros(group.size)
    before: list[Tensor] = []
    for axis, found in enumerate(places):
        for units in (units for channel, units in found if channel is group.channel):
            laid = units.to(values.device).reshape([-1 if dim == axis else 1 for dim in range(values.dim())])
            fresh = laid >= 0
            for other in before:  # a unit's row and its column meet in an entry
                fresh = fresh & (laid != other)
            fresh = fresh.expand_as(values)
            sums.index_add_(0, laid.expand_as(values)[fresh], values[fresh])
            before.append(laid)
    return sums


def per_unit(axis: Axis, values: Tensor) -> dict[Axis, Tensor]:
    """Sum values given along an axis over the positions of each unit of each channel in it.

    Args:
        values: shape ``(axis.size,)``.
    """
    found: dict[Axis, Tensor] = {}
    for channel, units in units_at(axis):
        units = units.to(values.device)
        sums = found.setdefault(channel, values.new_zeros(channel.size))
        sums.index_add_(0, units[units >= 0], values[units >= 0])
    return found


def in_roles(found: Iterable[HasRole], *order: Collection[Role]) -> list[HasRole]:
    """The members or uses in the first set of roles that has any."""
    known = list(found)
    return next((some for roles in order if (some := [one for one in known if one.role in roles])), [])


def as_roles(who: str, roles: Role | Collection[Role]) -> tuple[Role, ...]:
    """One role or several, as a tuple.

    Raises:
        InputError: there are none, or no such; the message names ``who`` was asked for them.
    """
    given = (roles,) if isinstance(roles, str) else tuple(roles)
    if not given or not set(given) <= set(ROLES):
        raise InputError(f"{who}(roles={roles!r}): one or several of {', '.join(map(repr, ROLES))}")
    return tuple(role for role in ROLES if role in given)


def accumulated(weight: Tensor) -> Tensor:
    """A tensor without gradients, in the type that sums are taken in."""
    return weight.detach().to(accumulator(weight))


def listed(names: Iterable[str], most: int = 3) -> str:
    """The first few names, each once, for a message."""
    return first_of((f"'{name}'" for name in dict.fromkeys(names)), most)


# What is given -------------------------------------------------------------------------------------------------------


def _named(network: Network, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors that are given, dense, by the names of the network."""
    names = _names(network)
    found: dict[str, tuple[str, Tensor]] = {}
    for alias, tensor in tensors.items():
        if alias not in names:
            raise InputError(
                f"unit_scores: '{alias}' is no tensor of {network.model_name}; names are those of "
                f"model.named_parameters(), such as {listed(network.tensors, 1)}"
            )
        name = names[alias]
        dense = _checked(alias, tensor, network.tensors[name])
        other, known = found.setdefault(name, (alias, dense))
        if known is not dense and not torch.equal(known, dense.to(known)):
            raise InputError(f"unit_scores: '{other}' and '{alias}' are one parameter, but are given different tensors")
    return {name: tensor for name, (_, tensor) in found.items()}


def _names(network: Network) -> dict[str, str]:
    """The network's name for each name of a tensor of the model; a shared tensor has several."""
    first = {id(tensor): name for name, tensor in network.tensors.items()}
    every = [*network.tensors.items(), *_aliases(network.model)]
    return {name: first[id(tensor)] for name, tensor in every if id(tensor) in first}


def _aliases(model: nn.Module) -> Iterable[tuple[str, Tensor]]:
    return [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]


def _checked(name: str, tensor: Tensor, parameter: Tensor) -> Tensor:
    if not isinstance(tensor, Tensor):
        raise InputError(
            f"unit_scores: '{name}' is given {type(tensor).__name__}, not a tensor; leave out what has none"
        )
    if tensor.shape != parameter.shape:
        raise InputError(
            f"unit_scores: '{name}' is given a tensor of shape {tuple(tensor.shape)}, but has {tuple(parameter.shape)}"
        )
    if getattr(tensor, "placements", None) is not None:
        raise InputError(f"unit_scores: what is given for '{name}' is sharded: give the whole, tensor.full_tensor()")
    if tensor.is_meta or tensor.is_complex():
        what = "is on the meta device" if tensor.is_meta else "is complex"
        raise InputError(f"unit_scores: what is given for '{name}' {what}: give real numbers")
    return tensor.to_dense() if tensor.layout is not torch.strided else tensor

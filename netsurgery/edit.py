"""An Edit: which units of each group stay. A value: comparable, serialisable, priced before it is carried out."""

from __future__ import annotations

import functools
import json
import operator
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from netsurgery.adaptation.forwards import Adaptation
from netsurgery.analysis.computed_weights import scaled
from netsurgery.analysis.costs import Cost
from netsurgery.analysis.network import Group, Network
from netsurgery.arguments import expect
from netsurgery.capture.saved_inputs import described, made
from netsurgery.compensated import Compensation
from netsurgery.errors import InputError
from netsurgery.fidelity import Measured
from netsurgery.positions import Positions
from netsurgery.report import edit_html, edit_line, share

__all__ = ["Edit", "Outcome", "counterparts"]


@dataclass(frozen=True)
class Outcome:
    """The removal that a pass was asked for, and the one that it made.

    Attributes:
        asked: such as ``50.0% of the channels of each layer``.
        got: likewise.
        short: groups that lose less than asked, or nothing because they are locked, and why.
        few: groups that keep few units after all units were ranked together, and how many: a tenth or less, or as few
            as ``max_ratio`` allows.
    """

    asked: str
    got: str
    short: Mapping[str, str] = field(default_factory=dict)
    few: Mapping[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        line = f"asked to remove {self.asked}, removed {self.got}"
        return line + _named("short", self.short) + _named("few units stay", self.few)


_LISTED = 3  # groups in one line


def _named(what: str, groups: Mapping[str, str]) -> str:
    """The first of some groups, and how many more there are."""
    if not groups:
        return ""
    first = [f"{name}: {why}" for name, why in list(groups.items())[:_LISTED]]
    more = len(groups) - len(first)
    return f"; {what}: {'; '.join(first)}" + (f"; and {more} more groups" if more else "")


@dataclass(frozen=True)
class Edit:
    """Units that stay, by group name, in ascending order; groups not named stay whole.

    Args:
        network: the network the edit is for.
        keep: for each changed group the indices that stay.
        values: new values of tensors of the model by name, at full size; these are cut in place of the old ones. They
            compensate for a removal. They fit the weights of this model only, and are no part of the JSON.
        uncompensated: weights (or groups) that could not be compensated, and why.
        compensations: for each compensated removal, how far outputs are from the original's before and after.
        outcomes: what each pass was asked to remove, and what it has removed.
        measured: how far the smaller network is from the original on samples, where passes of ``plan`` hold data.

    Raises:
        InputError: a name that is no group, a locked group, indices out of range, repeated or out of order, a
            group left without units, groups of equal sizes left with different numbers of units, or values of another
            shape.

    Example:
        >>> import torch, netsurgery
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
        >>> network = netsurgery.trace(model, (torch.randn(1, 4),))
        >>> netsurgery.Edit(network, {"0": (0, 2, 5)}).after.params
        23
    """

    network: Network = field(repr=False, compare=False)
    keep: Mapping[str, tuple[int, ...]]
    adaptation: Adaptation | None = field(default=None, repr=False, compare=False)  # once the code is known to follow

    values: Mapping[str, Tensor] = field(default_factory=dict, repr=False, compare=False)
    uncompensated: Mapping[str, str] = field(default_factory=dict, repr=False, compare=False)
    outcomes: tuple[Outcome, ...] = field(default=(), repr=False, compare=False)
    compensations: tuple[Compensation, ...] = field(default=(), repr=False, compare=False)
    measured: Measured | None = field(default=None, repr=False, compare=False)

    def __post_init__(self) -> None:
        kinds = (self.network, Network), (self.keep, Mapping)
        expect("Edit(network, keep)", "a Network and a dictionary of the units that stay by group", *kinds)
        for name, value in self.values.items():
            shape = tuple(axis.size for axis in self.network.axes.get(name, ()))
            if name not in self.network.axes or shape != tuple(value.shape):
                found = f"the tensor has {shape}" if name in self.network.axes else "the model has no such tensor"
                raise InputError(f"the new value of '{name}' has shape {tuple(value.shape)}, but {found}")
        order = {group.name: index for index, group in enumerate(self.network.groups)}
        kept: dict[str, list[int]] = {}
        for name, given in self.keep.items():
            group, units = self.network[name], _integers(name, given)
            kept[name] = units
            if units == list(range(group.size)):
                continue
            if group.locked is not None:
                raise InputError(f"group '{name}' is locked: {group.locked}")
            if not units:
                raise InputError(f"group '{name}' would lose all of its {group.size} units; at least one must stay")
            if units != sorted(set(units)) or units[0] < 0 or units[-1] >= group.size:
                raise InputError(
                    f"group '{name}': units must be ascending, distinct and in 0..{group.size - 1}, got {_start(units)}"
                )
        ordered = {name: tuple(kept[name]) for name in sorted(kept, key=order.__getitem__)}
        object.__setattr__(
            self, "keep", {n: units for n, units in ordered.items() if len(units) < self.network[n].size}
        )
        for names in self.network.equal_sizes:
            counts = {name: len(self.keep.get(name, range(self.network[name].size))) for name in names}
            if len(set(counts.values())) > 1:
                raise InputError(
                    f"groups that the code splits into equal parts must keep equally many units, got {counts}"
                )

    @property
    def counts(self) -> dict[str, int]:
        """Number of units that stay in each changed group."""
        return {name: len(units) for name, units in self.keep.items()}

    @property
    def replaced(self) -> dict[str, str]:
        """Modules whose code hard-codes a size and is replaced by its rewritten graph, each with the reason.

        Known once ``plan`` has tried the model's code; an edit made by hand is tried by ``rewrite``.
        """
        return dict(self.adaptation.reasons) if self.adaptation else {}

    def adaptation_for(self, model: nn.Module) -> Adaptation | None:
        """The changes that the code of this very model needs, if it has been tried at the sizes of this edit."""
        known = self.adaptation
        return known if known is not None and known.model is not None and known.model() is model else None

    @functools.cached_property
    def positions(self) -> Positions:
        """Which positions of tensors stay."""
        return Positions({self.network[name].channel: units for name, units in self.keep.items()})

    @property
    def before(self) -> Cost:
        """Cost of the network as it is."""
        return self.network.cost()

    @property
    def after(self) -> Cost:
        """Cost of the network after the edit."""
        return self.network.cost(self.counts)

    def diff(self) -> str:
        """Every tensor whose shape or values change, every module whose code must, and the cost before and after."""
        sizes = self.network.sizes(self.counts)
        lines = []
        for name, axes in self.network.axes.items():
            old, new = tuple(axis.size for axis in axes), tuple(map(sizes, axes))
            if old != new:
                lines.append(f"{name} {'x'.join(map(str, old))} -> {'x'.join(map(str, new))}")
        lines.extend(f"{path}.forward rewritten".lstrip(".") for path in self.replaced)
        valued = {*self.values, *self._scaled}
        lines.extend(f"{name} has new values" for name in self.network.tensors if name in valued)
        lines.extend(f"{name} not compensated: {why}" for name, why in self.uncompensated.items())
        before, after = self.before, self.after
        lines.append(f"parameters {before.params:,} -> {after.params:,} ({share(after.params, before.params)})")
        lines.append(f"MACs {before.macs:,} -> {after.macs:,} ({share(after.macs, before.macs)})")
        return "\n".join(lines)

    def __repr__(self) -> str:
        return f"Edit({edit_line(self)})"

    def _repr_html_(self) -> str:
        return edit_html(self)

    @property
    def _scaled(self) -> list[str]:
        """The parameters that ``rewrite`` scales, so that the rest of each computed weight keeps its values."""
        channels = {self.network[name].channel for name in self.keep}
        return [node.meta["scaled_by"] for program in self.network.programs for node in scaled(program, channels)]

    def summary(self) -> str:
        """Say what was asked and what was removed, which groups fell short and why, and which keep few units.

        The first line has loss and agreement before and after, where they are measured. A line for each of these groups
        follows, and one for each compensation (``print(edit.compensations[0].table())`` shows its layers). The last
        line names integers on modules (``block.width=16``) that no forward needs and whose meaning is not clear: they
        stay as they are, though dimensions of that size change.
        """
        outcomes = self.outcomes or (f"removed {self._removed()}",)
        lines = ["; ".join(map(str, (*outcomes, *filter(None, [self.measured]))))]
        for outcome in self.outcomes:
            lines.extend(f"  {name}: {why}" for name, why in outcome.short.items())
            lines.extend(f"  {name}: few units stay, {count}" for name, count in outcome.few.items())
        lines.extend(f"  {one}" for one in self.compensations)
        if stays := dict(self.adaptation.stays) if self.adaptation else {}:
            first, more = list(stays.items())[:_LISTED], len(stays) - _LISTED
            listed = "; ".join(f"{name} ({why})" for name, why in first) + (f"; and {more} more" if more > 0 else "")
            lines.append(f"  numbers that stay, though sizes like them change: {listed}")
        return "\n".join(lines)

    def _removed(self) -> str:
        gone = {name: self.network[name].size - count for name, count in self.counts.items()}
        return f"{sum(gone.values())} units of {len(gone)} groups" if gone else "nothing"

    def then(self, later: Edit) -> Edit:
        """This edit followed by one made for the network it leads to.

        Raises:
            InputError: the later edit names a group or units that this edit does not leave.
        """
        expect("edit.then(later)", "an Edit", (later, Edit))
        keep = dict(self.keep)
        names = self.names_in(later.network)
        for name, units in later.keep.items():
            if name not in names:
                raise InputError(f"the later edit names group '{name}', which this edit does not leave")
            left = keep.get(names[name], tuple(range(self.network[names[name]].size)))
            keep[names[name]] = tuple(left[unit] for unit in units)
        values, positions = dict(self.values), self.positions
        for name, value in later.values.items():
            full = values.get(name, self.network.tensors[name])
            values[name] = positions.put(full, self.network.axes[name], value)
        uncompensated = {**self.uncompensated, **later.uncompensated}
        outcomes = (*self.outcomes, *later.outcomes)
        gains = (*self.compensations, *later.compensations)
        return Edit(
            self.network, keep, values=values, uncompensated=uncompensated, outcomes=outcomes, compensations=gains
        )

    def names_in(self, later: Network) -> dict[str, str]:
        """The names here of the groups of the smaller network: they occur in the same places."""
        left = {group.name: self.counts.get(group.name, group.size) for group in self.network.groups}
        found = counterparts(self.network, later, [name for name, count in left.items() if count > 1])
        return {new: old for new, old in found.items() if later[new].size == left[old]}

    def to_json(self) -> str:
        """The edit as JSON: group sizes and the units that stay, and the inputs the network was traced with."""
        groups = {n: {"size": self.network[n].size, "keep": list(units)} for n, units in self.keep.items()}
        inputs = described(self.network.inputs)
        return json.dumps({"format": FORMAT, "model": self.network.model_name, "inputs": inputs, "groups": groups})

    @classmethod
    def from_json(cls, text: str, network: Network) -> Edit:
        """Read an edit back for the same model.

        Raises:
            InputError: it was made for a model with other groups; or the text holds no edit, or one of a newer version.
        """
        kinds = (text, str), (network, Network)
        expect("Edit.from_json(text, network)", "the JSON of an edit and the Network of its model", *kinds)
        groups = _read(text)["groups"]
        for name, entry in groups.items():
            if name not in network.by_name or network[name].size != entry["size"]:
                found = network[name].size if name in network.by_name else "no such group"
                raise InputError(
                    f"the edit is for another model: group '{name}' has {entry['size']} units there, {found} here"
                )
        return cls(network, {name: tuple(entry["keep"]) for name, entry in groups.items()})

    @staticmethod
    def inputs_in(text: str) -> Any:
        """Inputs like those that an edit was made with, from its JSON: as ``trace`` takes them, None if it has none.

        Raises:
            InputError: the text holds no edit, or one of a newer version.
        """
        inputs = _read(text)["inputs"]
        try:
            if isinstance(inputs, list):  # shapes and types alone, as they were written at first
                return tuple(torch.zeros(shape, dtype=getattr(torch, kind)) for shape, kind in inputs)
            return made(inputs)
        except (LookupError, TypeError, ValueError, AttributeError, RuntimeError) as error:
            raise InputError(f"the inputs of the edit cannot be read ({error}): pass example_inputs") from error


FORMAT = 2  # of the JSON; the first had no number, and inputs of positional tensors only


def _read(text: str) -> dict[str, Any]:
    """Read the JSON of an edit and make sure that nothing is missing."""
    try:
        found = json.loads(text)
    except ValueError as error:
        raise InputError(f"the text is no edit: {error}; pass what edit.to_json() gave") from error
    if isinstance(found, dict) and isinstance(number := found.get("format", 1), int) and number > FORMAT:
        raise InputError(
            f"the edit was written by a newer netsurgery (format {number}; this one reads up to {FORMAT}): "
            "update netsurgery"
        )
    groups = found.get("groups") if isinstance(found, dict) and "inputs" in found else None
    if not isinstance(groups, dict) or not all(map(_is_entry, groups.values())):
        raise InputError(
            "the text is no edit: it has no groups with units, or no inputs; pass what edit.to_json() gave"
        )
    return dict(found)


def _is_entry(entry: Any) -> bool:
    return isinstance(entry, dict) and "size" in entry and isinstance(entry.get("keep"), list)


def _integers(name: str, units: Any) -> list[int]:
    """Indices of units as plain integers."""
    try:
        return [operator.index(unit) for unit in units]
    except TypeError:
        raise InputError(
            f"group '{name}': the units that stay must be a list of whole numbers, got {units!r}"
        ) from None


def _start(units: list[int], most: int = 10) -> str:
    return str(units) if len(units) <= most else f"[{', '.join(map(str, units[:most]))}, ... {len(units)} in all]"


def counterparts(original: Network, later: Network, among: Iterable[str] | None = None) -> dict[str, str]:
    """The names in an original network of the groups of a later one: they occur in the same places.

    Args:
        among: names of the original's groups that may be meant; by default of all.
    """
    there = [original[name] for name in (original.by_name if among is None else among)]
    mine, theirs = ([g for g in groups if g.unit in ("head", "head_dim")] for groups in (there, later.groups))
    # A single head that is left is no group: the dimensions within it stand alone in its places.
    apart = _matched(mine, theirs, lambda group: (_occurrences(group), group.unit))
    return {**apart, **_matched(there, later.groups, _occurrences)}


def _matched(there: Sequence[Group], here: Sequence[Group], key: Callable[[Group], Any]) -> dict[str, str]:
    """Pairs of groups with the same key, by name here: in order, where both sides have equally many."""
    found: list[dict[Any, list[str]]] = []
    for groups in (there, here):
        names: dict[Any, list[str]] = {}
        for group in groups:
            if group.size > 1:
                names.setdefault(key(group), []).append(group.name)
        found.append(names)
    pairs = [(names, found[0].get(key, [])) for key, names in found[1].items()]
    return {new: old for one, other in pairs if len(one) == len(other) for new, old in zip(one, other, strict=True)}


def _occurrences(group: Group) -> tuple[tuple[str, int], ...]:
    return tuple((member.parameter, member.axis) for member in group.members)

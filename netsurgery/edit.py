"""An Edit: what the units of each group will be. A value: comparable, serialisable, priced before it is carried out."""

from __future__ import annotations

import functools
import json
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn

from netsurgery.adaptation.forwards import Adaptation
from netsurgery.analysis.computed_weights import scaled
from netsurgery.analysis.costs import Cost
from netsurgery.analysis.counterparts import counterparts
from netsurgery.analysis.groups import Group, places_of
from netsurgery.analysis.growth import obstacles
from netsurgery.analysis.inner_products import hiding
from netsurgery.analysis.network import Network
from netsurgery.arguments import expect
from netsurgery.axes import Axis
from netsurgery.capture.copies import named_modules
from netsurgery.capture.paths import is_within, renumbered, renumbered_lists
from netsurgery.capture.saved_inputs import described, made
from netsurgery.compensated import Compensation
from netsurgery.errors import InputError
from netsurgery.fidelity import Measured
from netsurgery.positions import Positions
from netsurgery.tables import html, share
from netsurgery.units import Planned, listed, read, sources, then, written

__all__ = ["Edit", "Outcome"]


@dataclass(frozen=True)
class Outcome:
    """The removal or growth that a pass was asked for, and the one that it made.

    Attributes:
        asked: such as ``50.0% of the channels of each layer``.
        got: likewise.
        short: groups that change less than asked, or not at all because they are locked, and why.
        few: groups that keep few units after all units were ranked together, and how many: a tenth or less, or as few
            as ``max_ratio`` allows.
        does: "remove" or "add".
    """

    asked: str
    got: str
    short: Mapping[str, str] = field(default_factory=dict)
    few: Mapping[str, str] = field(default_factory=dict)
    does: Literal["remove", "add"] = "remove"

    def __str__(self) -> str:
        line = f"asked to {self.does} {self.asked}, {self.does.removesuffix('e')}ed {self.got}"
        return line + _named("short", self.short) + _named("few units stay", self.few)


_LISTED = 3  # groups in one line


def _named(what: str, groups: Mapping[str, str]) -> str:
    """The first of some groups, and how many more there are."""
    if not groups:
        return ""
    first = [f"{name}: {why}" for name, why in list(groups.items())[:_LISTED]]
    more = len(groups) - len(first)
    return f"; {what}: {'; '.join(first)}" + (f"; and {more} more groups" if more else "")


class _Checked(dict[str, tuple[Planned, ...]]):
    """Planned units of groups that were checked for a network: copies of an edit need no second check."""

    def __init__(self, network: Network, dropped: tuple[str, ...], keep: Mapping[str, tuple[Planned, ...]]):
        super().__init__(keep)
        self.network, self.dropped = network, dropped


@dataclass(frozen=True)
class Edit:
    """The planned units of each group, by group name and in order; groups not named stay as they are.

    Args:
        network: the network the edit is for.
        keep: for each changed group its units: the index of one that stays, a ``Copy`` of one, or a ``New`` one.
            Removing some changes nothing but what they did; copies and new ones change no output.
        dropped: paths of residual blocks that go, of ``network.blocks``; their input takes the place of their output.
        values: new values of tensors of the model by name, at full size; these are cut in place of the old ones. They
            compensate for a removal. They fit the weights of this model only, and are no part of the JSON.
        uncompensated: weights (or groups) that could not be compensated, and why.
        compensations: for each compensated removal, how far outputs are from the original's before and after.
        outcomes: what each pass was asked to remove, and what it has removed.
        measured: how far the smaller network is from the original on samples, where passes of ``plan`` hold data.

    Raises:
        InputError: a path that is no residual block, a name that is no group, a locked group, indices out of range or
            repeated, a group left without units, groups of equal sizes left with different numbers of units, units
            added where outputs would change, or values of another shape.

    Example:
        >>> import torch, netsurgery
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
        >>> network = netsurgery.trace(model, (torch.randn(1, 4),))
        >>> netsurgery.Edit(network, {"0": (0, 2, 5)}).after.params
        23
        >>> netsurgery.Edit(network, {"0": (0, 2, 5, netsurgery.Copy(5), netsurgery.New())}).after.params
        37
    """

    network: Network = field(repr=False, compare=False)
    keep: Mapping[str, tuple[Planned, ...]]
    adaptation: Adaptation | None = field(default=None, repr=False, compare=False)  # once the code is known to follow

    values: Mapping[str, Tensor] = field(default_factory=dict, repr=False, compare=False)
    uncompensated: Mapping[str, str] = field(default_factory=dict, repr=False, compare=False)
    outcomes: tuple[Outcome, ...] = field(default=(), repr=False, compare=False)
    compensations: tuple[Compensation, ...] = field(default=(), repr=False, compare=False)
    measured: Measured | None = field(default=None, repr=False, compare=False)
    dropped: tuple[str, ...] = ()
    composed: bool = field(
        default=False, repr=False, compare=False
    )  # of several, which may remove copies that one made

    def __post_init__(self) -> None:
        kinds = (self.network, Network), (self.keep, Mapping)
        expect("Edit(network, keep)", "a Network and a dictionary of the units that stay by group", *kinds)
        for name, value in self.values.items():
            shape = tuple(axis.size for axis in self.network.axes.get(name, ()))
            if name not in self.network.axes or shape != tuple(value.shape):
                found = f"the tensor has {shape}" if name in self.network.axes else "the model has no such tensor"
                raise InputError(f"the new value of '{name}' has shape {tuple(value.shape)}, but {found}")
        if isinstance(self.keep, _Checked) and self.keep.network is self.network and self.keep.dropped == self.dropped:
            return  # of another edit of this network
        order = {group.name: index for index, group in enumerate(self.network.groups)}
        kept: dict[str, tuple[Planned, ...]] = {}
        for name in sorted(self.keep, key=lambda name: order.get(name, 0)):
            group = self.network[name]
            units = listed(name, self.keep[name], group.size, not self.composed)
            if units == tuple(range(group.size)):
                continue
            if group.locked is not None:
                raise InputError(f"group '{name}' is locked: {group.locked}")
            kept[name] = units
        object.__setattr__(self, "dropped", self._blocks_dropped())
        object.__setattr__(self, "keep", _Checked(self.network, self.dropped, kept))
        for names in self.network.equal_sizes:
            stay = [name for name in names if not self._goes(self.network[name])]
            counts = {name: len(self.keep.get(name, range(self.network[name].size))) for name in stay}
            if len(set(counts.values())) > 1:
                raise InputError(
                    f"groups that the code splits into equal parts must keep equally many units, got {counts}"
                )
        for name, why in obstacles(self.network, kept).items():
            raise InputError(f"group '{name}' cannot have more units without a change of outputs: {why}")

    def _blocks_dropped(self) -> tuple[str, ...]:
        """The paths of the blocks that go, in the order in which they run."""
        given = (self.dropped,) if isinstance(self.dropped, str) else tuple(self.dropped)
        paths = [block.path for block in self.network.blocks] if given else []
        if unknown := next((path for path in given if path not in paths), None):
            has = f"those are {', '.join(paths)}" if paths else "it has none"
            raise InputError(f"'{unknown}' is no residual block of {self.network.model_name} that can go: {has}")
        return tuple(path for path in paths if path in given)

    def _goes(self, group: Group) -> bool:
        """True if every tensor that has a group's units is dropped."""
        return all(any(is_within(one.parameter, path) for path in self.dropped) for one in group.members)

    @functools.cached_property
    def grown(self) -> tuple[str, ...]:
        """The groups that get copies or new units."""
        return tuple(name for name, units in self.keep.items() if not all(isinstance(unit, int) for unit in units))

    def sources(self, name: str) -> list[int]:
        """The old units of a group that are left, each once and ascending, whatever is added."""
        return sorted({*sources(self.keep[name])} - {-1})

    @property
    def counts(self) -> dict[str, int]:
        """Number of units that each changed group will have."""
        return {name: len(units) for name, units in self.keep.items()}

    @property
    def replaced(self) -> dict[str, str]:
        """Modules whose code hard-codes a size and is replaced by its rewritten graph, each with the reason.

        Known once ``plan`` has tried the model's code; an edit made by hand is tried by ``rewrite``.
        """
        reasons = self.adaptation.reasons if self.adaptation else {}
        return {path: why for path, why in reasons.items() if not any(is_within(path, one) for one in self.dropped)}

    def adaptation_for(self, model: nn.Module) -> Adaptation | None:
        """The changes that the code of this very model needs, if it has been tried at the sizes of this edit."""
        known = self.adaptation
        return known if known is not None and known.model is not None and known.model() is model else None

    @functools.cached_property
    def positions(self) -> Positions:
        """The old position for each new one of tensors."""
        return Positions({self.network[name].channel: units for name, units in self.keep.items()})

    @functools.cached_property
    def readers(self) -> frozenset[tuple[str, int, Axis]]:
        """The places where tensors read units: parameter, dimension and channel."""
        return frozenset(places_of(self.network.groups, "consumes"))

    @functools.cached_property
    def makers(self) -> frozenset[tuple[str, int, Axis]]:
        """The places where tensors make units, likewise."""
        return frozenset(places_of(self.network.groups, "produces"))

    @functools.cached_property
    def hidden(self) -> dict[tuple[str, int], list[tuple[Axis, Tensor]]]:
        """Where parameters hide added units from products of activations: by place the channels and the positions.

        A channel's positions are of the tensor as it is: bool, ``(size,)``.
        """
        found: dict[tuple[str, int], list[tuple[Axis, Tensor]]] = {}
        for channel in (self.network[name].channel for name in self.grown):
            for place, at in (hiding(self.network, channel) or {}).items():
                found.setdefault(place, []).append((channel, at))
        return found

    @property
    def before(self) -> Cost:
        """Cost of the network as it is."""
        return self.network.cost()

    @property
    def after(self) -> Cost:
        """Cost of the network after the edit."""
        return self.network.cost(self.counts, self.dropped)

    def diff(self) -> str:
        """Every tensor whose shape or values change, every module whose code must, and the cost before and after."""
        sizes = self.network.sizes(self.counts)
        lines = []
        for name, axes in self.network.axes.items():
            if any(is_within(name, path) for path in self.dropped):
                continue
            old, new = tuple(axis.size for axis in axes), tuple(map(sizes, axes))
            if old != new:
                lines.append(f"{name} {'x'.join(map(str, old))} -> {'x'.join(map(str, new))}")
            elif self.positions.changes(axes):
                lines.append(f"{name} {'x'.join(map(str, old))} of other units")
        lines.extend(f"{path} removed" for path in self.dropped)
        lines.extend(f"{path}.forward rewritten".lstrip(".") for path in self.replaced)
        valued = {*self.values, *self._scaled}
        lines.extend(f"{name} has new values" for name in self.network.tensors if name in valued)
        lines.extend(f"{name} not compensated: {why}" for name, why in self.uncompensated.items())
        before, after = self.before, self.after
        lines.append(f"parameters {before.params:,} -> {after.params:,} ({share(after.params, before.params)})")
        lines.append(f"MACs {before.macs:,} -> {after.macs:,} ({share(after.macs, before.macs)})")
        return "\n".join(lines)

    def __repr__(self) -> str:
        return f"Edit({self._line})"

    def _repr_html_(self) -> str:
        sizes = {name: self.network[name].size for name in self.counts}
        rows = [(n, f"{sizes[n]:,}", f"{count:,}", share(count, sizes[n])) for n, count in self.counts.items()]
        return html(self._line, [("group", "units", "stay", "kept"), *rows], right=(1, 2, 3))

    @property
    def _line(self) -> str:
        before, after, network = self.before, self.after, self.network
        if not self.keep and not self.values and not self.dropped:
            return f"{network.model_name}: nothing goes"
        changed = "changed" if self.grown else "cut"
        dropped = f", {len(self.dropped)} of {len(network.blocks)} blocks removed" if self.dropped else ""
        valued = f", {len(self.values)} tensors with new values" if self.values else ""
        return (
            f"{network.model_name}: {len(self.keep)} of {len(network.groups)} groups {changed}{valued}{dropped}, "
            f"parameters {before.params:,} -> {after.params:,} ({share(after.params, before.params)}), "
            f"MACs {before.macs:,} -> {after.macs:,} ({share(after.macs, before.macs)})"
        )

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
        outcomes = self.outcomes or (self._changed(),)
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

    def _changed(self) -> str:
        gone = {n: lost for n in self.keep if (lost := self.network[n].size - len(self.sources(n)))}
        more = {n: len(self.keep[n]) - len(self.sources(n)) for n in self.grown}
        said = [
            f"{what} {sum(units.values())} units of {len(units)} groups"
            for what, units in (("removed", gone), ("added", more))
            if any(units.values())
        ]
        said += [f"removed {len(self.dropped)} of {len(self.network.blocks)} blocks"] if self.dropped else []
        return "; ".join(said) or ("put units in another order" if self.keep else "removed nothing")

    def then(self, later: Edit) -> Edit:
        """This edit followed by one made for the network it leads to. Weights of new units may be drawn anew.

        Raises:
            InputError: the later edit names a group, units or a block that this edit does not leave.
        """
        expect("edit.then(later)", "an Edit", (later, Edit))
        keep = dict(self.keep)
        names = self.names_in(later.network)
        dropped = [*self.dropped, *self._blocks_in(later)]
        tensors = {new: old for old, new in self.names_after(later.network.tensors).items()}
        for name, units in later.keep.items():
            if name not in names:
                raise InputError(f"the later edit names group '{name}', which this edit does not leave")
            keep[names[name]] = then(keep.get(names[name], range(self.network[names[name]].size)), units)
        if later.values and self.grown:
            raise InputError("the later edit has new values of weights that this edit makes: carry this one out first")
        values, positions = dict(self.values), self.positions
        for new, value in later.values.items():
            name = tensors[new]
            full = values.get(name, self.network.tensors[name])
            values[name] = positions.put(full, self.network.axes[name], value)
        uncompensated = {**self.uncompensated, **later.uncompensated}
        outcomes = (*self.outcomes, *later.outcomes)
        gains = (*self.compensations, *later.compensations)
        return Edit(
            self.network,
            keep,
            dropped=tuple(dropped),
            values=values,
            uncompensated=uncompensated,
            outcomes=outcomes,
            compensations=gains,
            composed=True,
        )

    def names_in(self, later: Network) -> dict[str, str]:
        """The names here of the groups of the smaller network: they occur in the same places."""
        left = {
            group.name: self.counts.get(group.name, group.size)
            for group in self.network.groups
            if not self._goes(group)
        }
        among = [name for name, count in left.items() if count > 1]
        found = counterparts(self.network, later, among, self.names_after(later.tensors))
        return {new: old for new, old in found.items() if later[new].size == left[old]}

    def names_after(self, left: Collection[str]) -> dict[str, str]:
        """The names of the tensors that stay in the model that this edit leads to, by their names here.

        Args:
            left: the names of that model's tensors: they tell whether lists close the gaps that blocks leave.

        Raises:
            InputError: they are names of another model.
        """
        lists = renumbered_lists(self.network.tensors, self.dropped, left)
        pairs = ((name, renumbered(name, self.dropped, lists)) for name in self.network.tensors)
        return {name: new for name, new in pairs if new is not None}

    def _blocks_in(self, later: Edit) -> list[str]:
        """The paths here of the blocks that a later edit drops."""
        lists = renumbered_lists(self.network.tensors, self.dropped, later.network.tensors)
        names = {renumbered(path, self.dropped, lists): path for path in named_modules(self.network.model)}
        return [names[path] for path in later.dropped]

    def to_json(self) -> str:
        """The edit as JSON: group sizes and what their units will be, and the inputs the network was traced with."""
        groups = {n: {"size": self.network[n].size, "keep": [*map(written, own)]} for n, own in self.keep.items()}
        inputs = described(self.network.inputs)
        found = {"model": self.network.model_name, "inputs": inputs, "groups": groups}
        if self.dropped:
            found["dropped"] = [*self.dropped]
        return json.dumps({"format": FORMAT if self.grown or self.dropped else 2, **found})

    @classmethod
    def from_json(cls, text: str, network: Network) -> Edit:
        """Read an edit back for the same model.

        Raises:
            InputError: it was made for a model with other groups; or the text holds no edit, or one of a newer version.
        """
        kinds = (text, str), (network, Network)
        expect("Edit.from_json(text, network)", "the JSON of an edit and the Network of its model", *kinds)
        found = _read(text)
        groups = found["groups"]
        for name, entry in groups.items():
            if name not in network.by_name or network[name].size != entry["size"]:
                here = network[name].size if name in network.by_name else "no such group"
                raise InputError(
                    f"the edit is for another model: group '{name}' has {entry['size']} units there, {here} here"
                )
        keep = {name: tuple(map(read, entry["keep"])) for name, entry in groups.items()}
        return cls(network, keep, dropped=tuple(found.get("dropped", ())), composed=True)

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


FORMAT = 3  # of the JSON; the first had no number, and inputs of positional tensors only; the second removes alone


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
    if not isinstance(groups, dict) or not all(map(_is_entry, groups.values())) or not _are_paths(found):
        raise InputError(
            "the text is no edit: it has no groups with units, or no inputs; pass what edit.to_json() gave"
        )
    return dict(found)


def _is_entry(entry: Any) -> bool:
    return isinstance(entry, dict) and "size" in entry and isinstance(entry.get("keep"), list)


def _are_paths(found: dict[str, Any]) -> bool:
    dropped = found.get("dropped", [])
    return isinstance(dropped, list) and all(isinstance(path, str) for path in dropped)

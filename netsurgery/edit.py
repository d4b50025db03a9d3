"""An Edit: what the units of each group will be. A value: comparable, serialisable, priced before it is carried out."""

from __future__ import annotations

import functools
import json
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor, nn

from netsurgery.adaptation.forwards import Adaptation
from netsurgery.analysis.computed_weights import scaled
from netsurgery.analysis.costs import Cost
from netsurgery.analysis.counterparts import counterparts, met
from netsurgery.analysis.groups import Group, places_of
from netsurgery.analysis.growth import obstacles
from netsurgery.analysis.inner_products import hiding
from netsurgery.analysis.network import Network
from netsurgery.arguments import expect
from netsurgery.axes import Axis
from netsurgery.capture.copies import named_modules
from netsurgery.capture.paths import is_within, renumbered, renumbered_lists
from netsurgery.capture.saved_inputs import described
from netsurgery.compensated import Compensation
from netsurgery.edit_json import FORMAT, stages_in
from netsurgery.errors import InputError
from netsurgery.fidelity import Measured
from netsurgery.module_rewrites import ModuleRewrite, Rewritten, checked, rewrite_lines, rewritten
from netsurgery.module_rewrites import read as read_rewrite
from netsurgery.module_rewrites import written as written_rewrite
from netsurgery.outcome import LISTED, Outcome
from netsurgery.positions import Positions
from netsurgery.tables import html, share
from netsurgery.units import Planned, listed, read, sources, then, written

__all__ = ["Edit"]


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
        modules: by path, how modules are replaced or wrapped. An edit does this, or changes units and blocks; ``then``
            puts one after the other.
        values: new values of tensors of the model by name, at full size; these are cut in place of the old ones. They
            compensate for a removal. They fit the weights of this model only, and are no part of the JSON.
        uncompensated: weights (or groups) that could not be compensated, and why.
        compensations: for each compensated removal, how far outputs are from the original's before and after.
        outcomes: what each pass was asked to remove, and what it has removed.
        measured: how far the smaller network is from the original on samples, where passes of ``plan`` hold data.
        first: the edit that is carried out before this one, which is for the network that the first one leaves: where
            modules are rewritten before units or after them. ``stages`` lists all; costs, ``diff`` and ``summary`` are
            of all.

    Raises:
        InputError: a path that is no residual block or no module, a name that is no group, a locked group, indices out
            of range or repeated, a group left without units, groups of equal sizes left with different numbers of
            units, units added where outputs would change, or values of another shape.
        RewriteError: a module cannot be built anew, or the model's code does not work with the new one.

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
    modules: Mapping[str, ModuleRewrite] = field(default_factory=dict)
    first: Edit | None = field(default=None, repr=False)
    rewritten: Rewritten | None = field(default=None, repr=False, compare=False)  # what the modules lead to

    def __post_init__(self) -> None:
        kinds = (self.network, Network), (self.keep, Mapping)
        expect("Edit(network, keep)", "a Network and a dictionary of the units that stay by group", *kinds)
        for name, value in self.values.items():
            shape = tuple(axis.size for axis in self.network.axes.get(name, ()))
            if name not in self.network.axes or shape != tuple(value.shape):
                found = f"the tensor has {shape}" if name in self.network.axes else "the model has no such tensor"
                raise InputError(f"the new value of '{name}' has shape {tuple(value.shape)}, but {found}")
        self._rewrite_modules()
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

    def _rewrite_modules(self) -> None:
        """Make sure that modules can be rewritten, and see what that leads to."""
        expect("Edit(modules=...)", "a dictionary of rewrites by path", (self.modules, Mapping))
        if self.modules and (self.keep or self.dropped or self.values):
            raise InputError(
                "an edit rewrites modules, or changes units and blocks: make two edits, one.then(the other), of which "
                "the later is for the network that the earlier leaves"
            )
        known = self.rewritten
        if self.modules and (known is None or known.of[0] is not self.network or known.of[1] is not self.modules):
            modules = checked(self.network.model, self.network.model_name, self.modules)
            object.__setattr__(self, "modules", modules)
            object.__setattr__(self, "rewritten", rewritten(self.network, modules))

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

    @property
    def stages(self) -> tuple[Edit, ...]:
        """The edits that are carried out one after the other, this one last."""
        if self.first is None:
            return (self,)
        return (*self.first.stages, replace(self, first=None))

    @property
    def exact(self) -> bool:
        """True if modules are rewritten so that no output changes in eval mode, as far as their classes say."""
        return all(rewrite.exact for rewrite in self.modules.values())

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
        own = {path: why for path, why in reasons.items() if not any(is_within(path, one) for one in self.dropped)}
        return own if self.first is None else {**self.first.replaced, **own}

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
        return self.network.cost() if self.first is None else self.first.before

    @property
    def after(self) -> Cost:
        """Cost of the network after the edit."""
        if self.rewritten is not None:
            return self.rewritten.network.cost()
        return self.network.cost(self.counts, self.dropped)

    def diff(self) -> str:
        """Every tensor whose shape or values change, every module whose code must, and the cost before and after."""
        return "\n".join([*(line for stage in self.stages for line in stage._changes()), *self._costs])

    @property
    def _costs(self) -> list[str]:
        pairs = ("parameters", self.before.params, self.after.params), ("MACs", self.before.macs, self.after.macs)
        return [f"{what} {old:,} -> {new:,} ({share(new, old)})" for what, old, new in pairs]

    def _changes(self) -> list[str]:
        """The lines of ``diff`` but for costs, of this stage."""
        if self.rewritten is not None:
            return rewrite_lines(self.modules, self.network, self.rewritten)
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
        return lines

    def __repr__(self) -> str:
        return f"Edit({self._line})"

    def _repr_html_(self) -> str:
        sizes = {name: self.network[name].size for name in self.counts}
        rows = [(n, f"{sizes[n]:,}", f"{count:,}", share(count, sizes[n])) for n, count in self.counts.items()]
        return html(self._line, [("group", "units", "stay", "kept"), *rows], right=(1, 2, 3))

    @property
    def _line(self) -> str:
        network, costs = self.network, ", ".join(self._costs)
        if self.modules:
            return f"{network.model_name}: {len(self.modules)} modules rewritten, {costs}"
        if not self.keep and not self.values and not self.dropped and self.first is None:
            return f"{network.model_name}: nothing goes"
        changed = "changed" if self.grown else "cut"
        dropped = f", {len(self.dropped)} of {len(network.blocks)} blocks removed" if self.dropped else ""
        valued = f", {len(self.values)} tensors with new values" if self.values else ""
        groups = f"{len(self.keep)} of {len(network.groups)} groups {changed}"
        return f"{network.model_name}: {groups}{valued}{dropped}, {costs}"

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
        heads = [head for stage in self.stages for head in (stage.outcomes or (stage._changed(),))]
        lines = ["; ".join(map(str, (*heads, *filter(None, [self.measured]))))]
        for stage in self.stages:
            lines.extend(stage._details())
        return "\n".join(lines)

    def _details(self) -> list[str]:
        """The lines of ``summary`` behind the first, of this stage."""
        lines: list[str] = []
        for outcome in self.outcomes:
            lines.extend(f"  {name}: {why}" for name, why in {**outcome.short, **outcome.notes}.items())
            lines.extend(f"  {name}: few units stay, {count}" for name, count in outcome.few.items())
        lines.extend(f"  {one}" for one in self.compensations)
        if stays := dict(self.adaptation.stays) if self.adaptation else {}:
            first, more = list(stays.items())[:LISTED], len(stays) - LISTED
            listed = "; ".join(f"{name} ({why})" for name, why in first) + (f"; and {more} more" if more > 0 else "")
            lines.append(f"  numbers that stay, though sizes like them change: {listed}")
        return lines

    def _changed(self) -> str:
        if self.modules:
            return f"rewrote {len(self.modules)} modules"
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

        Where one of both rewrites modules, they stay two stages, carried out one after the other.

        Raises:
            InputError: the later edit names a group, units or a block that this edit does not leave, or is for another
                network than the one that the rewrites of modules lead to.
        """
        expect("edit.then(later)", "an Edit", (later, Edit))
        if later.first is not None:
            begin, *more = later.stages
            return functools.reduce(Edit.then, more, self.then(begin))
        if self.modules or later.modules:
            self._check_follows(later)
            return replace(later, first=self)
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
            first=self.first,
        )

    def _check_follows(self, later: Edit) -> None:
        """Raise InputError where a later edit is for another network than the one that this one leads to."""
        found = {name: tuple(axis.size for axis in axes) for name, axes in later.network.axes.items()}
        if self.rewritten is not None:
            axes = self.rewritten.network.axes
            wanted = {name: tuple(axis.size for axis in axes[name]) for name in axes}
        else:
            sizes = self.network.sizes(self.counts)
            names = self.names_after(found)
            wanted = {new: tuple(map(sizes, self.network.axes[name])) for name, new in names.items()}
        if differs := next((name for name in {**wanted, **found} if wanted.get(name) != found.get(name)), None):
            raise InputError(
                f"the later edit is for another network than the one that this edit leads to: '{differs}' has shape "
                f"{wanted.get(differs, 'none')} after this edit, {found.get(differs, 'none')} in the later one's"
            )

    def names_in(self, later: Network) -> dict[str, str]:
        """The names here of the groups of the smaller network: they occur in the same places."""
        if self.rewritten is not None:
            return met(self.network, later, self.rewritten.names)
        left = {
            group.name: self.counts.get(group.name, group.size)
            for group in self.network.groups
            if not self._goes(group)
        }
        among = [name for name, count in left.items() if count > 1]
        found = counterparts(self.network, later, among, self.names_after(later.tensors))
        return {new: old for new, old in found.items() if later[new].size == left[old]}

    def closes_for(self, later: Edit) -> bool:
        """True if a later stage is for a network whose lists have closed the gaps that blocks leave."""
        return bool(renumbered_lists(self.network.tensors, self.dropped, later.network.tensors))

    def names_after(self, left: Collection[str]) -> dict[str, str]:
        """The names of the tensors that stay in the model that this edit leads to, by their names here.

        Args:
            left: the names of that model's tensors: they tell whether lists close the gaps that blocks leave.

        Raises:
            InputError: they are names of another model.
        """
        if self.rewritten is not None:
            return dict(self.rewritten.names)
        lists = renumbered_lists(self.network.tensors, self.dropped, left)
        pairs = ((name, renumbered(name, self.dropped, lists)) for name in self.network.tensors)
        return {name: new for name, new in pairs if new is not None}

    def _blocks_in(self, later: Edit) -> list[str]:
        """The paths here of the blocks that a later edit drops."""
        lists = renumbered_lists(self.network.tensors, self.dropped, later.network.tensors)
        names = {renumbered(path, self.dropped, lists): path for path in named_modules(self.network.model)}
        return [names[path] for path in later.dropped]

    def to_json(self) -> str:
        """The edit as JSON: group sizes and what their units will be, and the inputs the network was traced with.

        Raises:
            InputError: it rewrites modules by a class that is not registered (``netsurgery.module_rewrites``).
        """
        head, *more = self.stages
        found = {"model": head.network.model_name, "inputs": described(head.network.inputs), **head._written()}
        plain = not (more or head.grown or head.dropped or head.modules)
        if more:
            found["then"] = [stage._written() for stage in more]
            for one, stage, later in zip((found, *found["then"]), self.stages, more, strict=False):
                if stage.dropped:
                    one["closed"] = stage.closes_for(later)
        number = 2 if plain else FORMAT if more or head.modules else 3
        return json.dumps({"format": number, **found})

    def _written(self) -> dict[str, Any]:
        """This stage for JSON."""
        groups = {n: {"size": self.network[n].size, "keep": [*map(written, own)]} for n, own in self.keep.items()}
        found: dict[str, Any] = {"groups": groups}
        if self.dropped:
            found["dropped"] = [*self.dropped]
        if self.modules:
            found["modules"] = {path: written_rewrite(rewrite) for path, rewrite in self.modules.items()}
        return found

    @classmethod
    def from_json(cls, text: str, network: Network) -> Edit:
        """Read an edit back for the same model.

        Raises:
            InputError: it was made for a model with other groups; or the text holds no edit, or one of a newer version;
                or it rewrites modules after units, and so is for a network that only ``netsurgery.load`` makes.
        """
        kinds = (text, str), (network, Network)
        expect("Edit.from_json(text, network)", "the JSON of an edit and the Network of its model", *kinds)
        edit, *more = stages_in(text)
        found = cls._read_stage(edit, network)
        for stage in more:
            if found.rewritten is None:
                raise InputError(
                    "the edit rewrites modules after it changes units, and is read stage by stage: pass the text and "
                    "the network to netsurgery.rewriting.stages.read, or the folder to netsurgery.load"
                )
            found = found.then(cls._read_stage(stage, found.rewritten.network))
        return found

    @classmethod
    def _read_stage(cls, found: Mapping[str, Any], network: Network) -> Edit:
        """One stage of an edit, from its part of the JSON."""
        groups = found["groups"]
        for name, entry in groups.items():
            if name not in network.by_name or network[name].size != entry["size"]:
                here = network[name].size if name in network.by_name else "no such group"
                raise InputError(
                    f"the edit is for another model: group '{name}' has {entry['size']} units there, {here} here"
                )
        keep = {name: tuple(map(read, entry["keep"])) for name, entry in groups.items()}
        modules = {path: read_rewrite(value) for path, value in found.get("modules", {}).items()}
        return cls(network, keep, dropped=tuple(found.get("dropped", ())), composed=True, modules=modules)

"""Find the changes with which a model's own code follows new sizes, and the groups that it cannot follow.

Where no remedy helps, groups are locked: those that the failing operation concerns, or those that a bisection finds.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping

from netsurgery.adaptation.forwards import Adaptation
from netsurgery.adaptation.model_code import ModelCode
from netsurgery.adaptation.remedies import Remedies, mentioned_names
from netsurgery.adaptation.repeated_sizes import repeats, withdrawn
from netsurgery.adaptation.size_checker import Failure, is_in
from netsurgery.analysis.network import Network
from netsurgery.axes import Axis
from netsurgery.capture.paths import is_within

__all__ = ["fit_code", "runs_at", "with_repeats"]


def fit_code(code: ModelCode, network: Network, counts: Mapping[str, int]) -> tuple[Adaptation, dict[str, str]]:
    """An adaptation of the code to these numbers of units, and the groups that cannot change, each with a reason.

    Raises:
        RewriteError: the code does not follow, and no group can be named as the cause.
    """
    adaptation, lost = _tried(code, network, counts)
    found: dict[str, str] = {}
    bisected: dict[tuple[type, type], tuple[str, list[str]]] = {}  # by class: the module, and the groups found in it
    for path, failure in lost.items():
        reasons = failure.reasons
        if len(reasons) <= _MANY or (failure.suspected_in is None and len(reasons) > _FEW):
            found.update(reasons)
            continue
        around = path if failure.suspected_in is None else failure.suspected_in
        kind = code.kinds[path], code.kinds[around]
        if kind not in bisected:
            bisected[kind] = around, _bisect(code, network, counts, path, around)
        alike = _counterparts(network, bisected[kind][1], bisected[kind][0], around)
        reason = next(iter(reasons.values()))
        found.update({name: reasons.get(name, reason) for name in alike if name in counts})
    return adaptation, found or {name: why for failure in lost.values() for name, why in failure.reasons.items()}


def with_repeats(
    code: ModelCode, network: Network, counts: Mapping[str, int], adaptation: Adaptation, dropped: Collection[str] = ()
) -> Adaptation:
    """An adaptation with numbers that repeat a size (see ``repeated_sizes.py``), as far as a run confirms them."""
    needed = {(path, name) for path, values in adaptation.attributes.items() for name in values}
    found = repeats(code.model, network, network.sizes(counts), needed, dropped)
    while any(one.follows for one in found):
        remedies = Remedies(code, network, network.sizes(counts), _changed(network, counts))
        remedies.adaptation = adaptation.joined(found)
        failures = remedies.failures()
        if not failures:
            break
        for path in failures:
            found = withdrawn(found, path, mentioned_names(code.kinds[path]))
    return adaptation.joined(found)


def runs_at(code: ModelCode, network: Network, counts: Mapping[str, int]) -> bool:
    """True if the modules that changed groups come near follow these numbers of units; False may be wrong."""
    return not _tried(code, network, counts, near_only=True)[1]


_MANY = 1  # suspected groups; where a module's code is about one of more than these, a bisection finds which
_FEW = 4  # groups; an operation that is about more than these is about each of them


def _changed(network: Network, counts: Mapping[str, int]) -> dict[Axis, str]:
    """The groups whose number of units changes, by their channel."""
    return {network[name].channel: name for name, count in counts.items() if count != network[name].size}


def _tried(
    code: ModelCode, network: Network, counts: Mapping[str, int], near_only: bool = False
) -> tuple[Adaptation, dict[str, Failure]]:
    """An adaptation for these numbers of units, and by path the failures that no remedy helps.

    Args:
        near_only: pass over modules that no changed group comes near.
    """
    changed = _changed(network, counts)
    remedies = Remedies(code, network, network.sizes(counts), changed, near_only)
    while changed and (failures := remedies.failures()):
        tried = {path: remedies.remedy(path, failure) for path, failure in failures.items()}
        if lost := {path: failure for path, failure in tried.items() if failure is not None}:
            return remedies.adaptation, lost
    return remedies.adaptation, {}


def _bisect(code: ModelCode, network: Network, counts: Mapping[str, int], path: str, around: str) -> list[str]:
    """Find a changed group that makes the code of a module fail, and the groups that must keep as many units.

    Groups in the module ``around`` are tried by themselves first.
    """
    together = list(dict.fromkeys(network.equal_to(name) for name in counts))
    near = [names for names in together if any(is_in(network[name], around) for name in names)]

    def fails(tried: list[EqualSizes]) -> bool:
        some = {name: counts[name] for names in tried for name in names}
        return path in _tried(code, network, some, near_only=True)[1]

    return list(_last_needed(near, fails) or _last_needed(together, fails) or together[-1])


EqualSizes = tuple[str, ...]  # names of groups that keep equally many units


def _last_needed(suspects: list[EqualSizes], fails: Callable[[list[EqualSizes]], bool]) -> EqualSizes | None:
    """The suspect with which the code begins to fail, when they are added in turn; None where it runs with all."""
    low, high = 0, len(suspects)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if fails(suspects[:middle]) else (middle, high)
    return suspects[high - 1] if high < len(suspects) or (suspects and fails(suspects)) else None


def _counterparts(network: Network, names: Iterable[str], path: str, other: str) -> list[str]:
    """The groups of one module that stand in the places of groups ``names`` in another module of its class."""
    if path == other:
        return list(names)
    there = {place: name for name, place in _places_in(network, other).items()}
    here = _places_in(network, path)
    return [
        there[here[name]] if name in here else name for name in names if here.get(name) in there or name not in here
    ]


Place = tuple[tuple[str, int, str], ...]  # parameter within a module, dimension and role of each member of a group


def _places_in(network: Network, path: str) -> dict[str, tuple[Place, int]]:
    """The places where groups occur in a module, by name, and a number that tells groups in the same places apart."""
    seen: dict[Place, int] = {}
    found: dict[str, tuple[Place, int]] = {}
    for group in network.groups:
        own = [m for m in group.members if is_within(m.module, path)]
        if own:
            place = tuple((m.parameter.removeprefix(f"{path}."), m.axis, m.role) for m in own)
            found[group.name] = place, seen.setdefault(place, 0)
            seen[place] += 1
    return found

"""Numbers of modules that repeat a size and that no forward needs: ``self.ch``, ``groups`` of a wrapper, a config.

Code that folds branches, changes a head or prints a layer reads them. The name of such a number and the dimensions in
its module tell which size it is. The number follows if all dimensions that it may stand for get the same size; if not,
it stays and is reported.
"""

from __future__ import annotations

import copy
import dataclasses
import re
from collections.abc import Collection, Container, Iterable, Iterator
from dataclasses import dataclass
from types import SimpleNamespace

from torch import fx, nn
from torch.utils import _pytree as pytree

from netsurgery.adaptation.attributes import settled
from netsurgery.analysis.costs import Sizes
from netsurgery.analysis.network import Network
from netsurgery.arguments import is_count
from netsurgery.axes import Axis, find
from netsurgery.capture.copies import named_modules
from netsurgery.capture.inputs import Kwargs, Tree
from netsurgery.capture.paths import is_within, modules_around

__all__ = ["Repeat", "repeats", "withdrawn"]

_INPUT = {"in", "inp", "inplanes", "input", "inputs", "cin", "nin"}
_OUTPUT = {"out", "oup", "outplanes", "output", "outputs", "cout", "nout"}
_GROUPS = {"group", "groups"}

#: Words of numbers that are no width, whatever their value happens to be.
_OTHER = {
    "batch", "beams", "bins", "bits", "block", "blocks", "buffer", "capacity", "class", "classes", "crop", "depth",
    "depths", "dilation", "epoch", "epochs", "expansion", "experts", "factor", "frames", "freq", "height", "id",
    "idx", "image", "img", "index", "iter", "iters", "kernel", "label", "labels", "layer", "layers", "len", "length",
    "lengths", "limit", "max", "memory", "min", "neighbors", "padding", "patch", "patches", "period", "points", "pool",
    "position", "positions", "queries", "queue", "rank", "rate", "ratio", "reduction", "resolution", "samples", "scale",
    "seed", "seq", "stage", "stages", "step", "steps", "stride", "strides", "token", "tokens", "upscale", "version",
    "vocab", "window", "workers", "world",
}  # fmt: skip
#: Words of numbers that may be a width. A number under another name that equals a size stays, and is reported.
_WIDTH = {
    "base", "bottleneck", "c", "ch", "chan", "channel", "channels", "chans", "chs", "cmid", "d", "dim", "dims", "emb",
    "embed", "embedding", "embeddings", "expanded", "feat", "feats", "feature", "features", "ff", "ffn", "filter",
    "filters", "fmaps", "hid", "hidden", "inner", "intermediate", "latent", "mid", "mlp", "model", "n", "ndf", "neck",
    "nf", "ngf", "nhid", "plane", "planes", "proj", "projection", "shape", "size", "sizes", "squeeze", "unit", "units",
    "width", "widths", *_INPUT, *_OUTPUT, *_GROUPS,
}  # fmt: skip
_HEADS, _WITHIN = {"head", "heads", "nhead"}, {"dim", "dims", "size", "width", "channels", "features"}


New = dict[int, set[int]]  # by old size: the new sizes


@dataclass(frozen=True)
class Repeat:
    """An attribute of a module that repeats sizes of dimensions.

    Attributes:
        path: of the module.
        name: of the attribute.
        old: its value: a number, or a list, dictionary or plain object that holds some.
        new: its value at other sizes; the old one itself where it stays.
        stays: numbers in it that stay though dimensions of their size change, such as ``cfg.width=16``, and why.
    """

    path: str
    name: str
    old: object
    new: object
    stays: tuple[tuple[str, str], ...] = ()

    @property
    def follows(self) -> bool:
        """True if the attribute gets another value."""
        return self.new is not self.old

    def kept(self) -> Repeat:
        """The same attribute with its old value, because the code computes with it."""
        label = f"{self.path}.{self.name}".lstrip(".")
        shown = f"{label}={self.old}" if isinstance(self.old, int | list | tuple) else label
        return dataclasses.replace(self, new=self.old, stays=((shown, "the code computes with it"),))


def withdrawn(found: list[Repeat], path: str, read: Container[str]) -> list[Repeat]:
    """The same attributes, but those that code at a path may compute with keep their value.

    Args:
        read: names that this code mentions.
    """
    follow = [one for one in found if one.follows]
    own = [one for one in follow if one.path == path]
    around = [one for one in follow if one.path in modules_around(path)]
    suspects = [one for one in own if one.name in read] or own or around or follow
    gone = {id(one.old) if not isinstance(one.old, int) else (one.path, one.name) for one in suspects}
    return [
        one.kept() if one.follows and (id(one.old) in gone or (one.path, one.name) in gone) else one for one in found
    ]


def repeats(
    model: nn.Module, network: Network, sizes: Sizes, needed: Container[tuple[str, str]], dropped: Collection[str] = ()
) -> list[Repeat]:
    """The attributes of a model that repeat sizes that change.

    Args:
        needed: path and name of attributes that the code needs: these have their new values already.
        dropped: paths of modules that go, whose sizes say nothing of the others.
    """
    changing = {axis.size for axes in network.axes.values() for axis in axes if sizes(axis) != axis.size}
    modules = named_modules(model)
    held = [
        (path, name, value)
        for path, module in modules.items()
        if not type(module).__module__.startswith("torch.nn.")
        for name, value in module.__dict__.items()
        if name not in _INTERNAL and (path, name) not in needed and not changing.isdisjoint(_numbers(value))
    ]
    if not held:
        return []
    known = settled(model, network, sizes)
    held = [(path, name, value) for path, name, value in held if (path, name) not in known]
    holders: dict[int, list[str]] = {}
    for path, _, value in held:
        holders.setdefault(id(value), []).append(path)
    evidence = _Evidence(network, sizes, dropped)
    made: dict[tuple[int | str, str], tuple[object, tuple[tuple[str, str], ...]]] = {}
    found = []
    for path, name, value in held:
        shared = not is_count(value)
        around = _common(holders[id(value)]) if shared else path
        key: tuple[int | str, str] = (id(value), "") if shared else (path, name)
        if key not in made:
            follower = _Follower(evidence, around)
            new = follower.new(value, name, f"{around}.{name}".lstrip("."))
            made[key] = new, tuple(follower.stays)
        found.append(Repeat(path, name, value, *made[key]))
    return found


_INTERNAL = frozenset(nn.Module().__dict__)


def _fields(value: object) -> Kwargs | None:
    """The fields of a plain object, such as a dataclass."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type | nn.Module):
        return {f.name: getattr(value, f.name) for f in dataclasses.fields(value) if hasattr(value, f.name)}
    return dict(vars(value)) if type(value) is SimpleNamespace else None


def _numbers(value: Tree) -> Iterator[int]:
    """The integers in an attribute."""
    if is_count(value):
        yield int(value)
    elif type(value) is list or isinstance(value, tuple):
        for item in value:
            yield from _numbers(item)
    elif type(value) is dict or type(value).__module__ != "builtins":
        for item in (value if type(value) is dict else _fields(value) or {}).values():
            yield from _numbers(item)


class _Follower:
    """Makes the new value of an attribute of a module, or of one that all modules in it share.

    Attributes:
        stays: numbers that stay, and why.
    """

    def __init__(self, evidence: _Evidence, path: str):
        self.evidence, self.path = evidence, path
        self.stays: list[tuple[str, str]] = []

    def new(self, value: Tree, word: str, label: str) -> Tree:
        """The value with new numbers; the same object if all stay. ``word`` is the innermost name that it has."""
        if is_count(value):
            become = self.number(int(value), word, label)
            return value if become == value else type(value)(become)
        if type(value) is list or isinstance(value, tuple):
            before = len(self.stays)
            named = getattr(value, "_fields", ())  # of a namedtuple
            items = [self.new(item, named[i] if named else word, f"{label}[{i}]") for i, item in enumerate(value)]
            follows = any(new is not old for new, old in zip(items, value, strict=True))
            if not follows or len(self.stays) > before:
                return value  # all of it, or nothing
            return type(value)(*items) if named else type(value)(items)
        fields = value if type(value) is dict else _fields(value)
        if not fields:
            return value
        changed = {
            key: new
            for key, item in fields.items()
            if (new := self.new(item, key if isinstance(key, str) else word, f"{label}.{key}")) is not item
        }
        if not changed:
            return value
        other = copy.copy(value)
        for key, new in changed.items():
            if type(value) is dict:
                other[key] = new
            else:
                object.__setattr__(other, key, new)  # a dataclass may be frozen
        return other

    def number(self, value: int, word: str, label: str) -> int:
        """The new value of one number."""
        become = sorted(self.evidence.of(self.path, word, value))
        if len(become) == 1:
            return become[0] if become[0] != value else value
        if become:
            sizes = " and ".join(map(str, become))
            self.stays.append((f"{label}={value}", f"dimensions of this size become {sizes}"))
        return value


class _Evidence:
    """The new sizes of dimensions, module by module and by their old size."""

    def __init__(self, network: Network, sizes: Sizes, dropped: Collection[str]):
        self.sizes = sizes

        def stays(path: str) -> bool:
            return not any(is_within(path, one) for one in dropped)

        self.inside: dict[str, New] = {}  # by module: all dimensions of its tensors and its numbers of groups
        self.groups: dict[str, New] = {}
        self.ends: dict[tuple[str, str], New] = {}  # by module and "in" or "out": where units may stand
        for name, axes in network.axes.items():
            for axis in axes if stays(name) else ():
                self.note(self.inside, name.rpartition(".")[0], axis)
        for program in network.programs:
            for node in program.operations:
                if isinstance(axis := node.meta.get("names", {}).get("g"), Axis) and stays(node.meta["module"]):
                    self.note(self.inside, node.meta["module"], axis)
                    self.note(self.groups, node.meta["module"], axis)
            for call in filter(lambda call: stays(call.path), program.calls):
                for end, value in (("in", (call.args, call.kwargs)), ("out", call.out)):
                    for axis in _dims(value):
                        self.ends.setdefault((call.path, end), {}).setdefault(axis.size, set()).add(sizes(axis))

    def note(self, into: dict[str, New], path: str, axis: Axis) -> None:
        """Note that a module, and so all modules around it, has a dimension, with its parts and factors."""
        for part in _terms(axis):
            for around in (path, *modules_around(path)):
                into.setdefault(around, {}).setdefault(part.size, set()).add(self.sizes(part))

    def of(self, path: str, name: str, number: int) -> set[int]:
        """The new sizes of the dimensions that a number of a module may repeat; none if its name is not of a size."""
        words = {word.lower() for word in re.findall(r"[A-Z]?[a-z]+|[A-Z]+", name)}
        if number < 2 or words & _OTHER or (words & _HEADS and not words & _WITHIN):
            return set()
        if words & _GROUPS and (become := self.groups.get(path, {}).get(number)):
            return become
        for end, meant in (("in", _INPUT | _GROUPS), ("out", _OUTPUT)):  # as many groups as channels, if not by a layer
            if words & meant:
                become = self.ends.get((path, end), {}).get(number, set())
                return become - {number} or become  # a dimension of space may have this size, too, and stays
        become = self.inside.get(path, {}).get(number, set())
        return become if words & (_WIDTH | _HEADS) or not become else become | {number}


def _terms(axis: Axis) -> Iterator[Axis]:
    axis = find(axis)
    yield axis
    for term in axis.terms:
        yield from _terms(term)


def _dims(value: Tree) -> list[Axis]:
    """The dimensions of the tensors among arguments or results; those of batches and of space do not change."""
    return [
        axis for leaf in pytree.tree_leaves(value) if isinstance(leaf, fx.Node) for axis in leaf.meta.get("dims", ())
    ]


def _common(paths: Iterable[str]) -> str:
    """The path of the innermost module that holds all of these modules."""
    first, *rest = [[*modules_around(path), path] for path in paths]
    return [path for path in first if all(path in other for other in rest)][-1]

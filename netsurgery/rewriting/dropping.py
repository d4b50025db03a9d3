"""Removal of residual blocks: lists of modules close the gap where the code allows it, else the block is skipped.

Which of the two is found by trial: a copy of the model that shares its weights is recorded without data, and must run
the operations of the original but those of the blocks, on the same tensors.
"""

from __future__ import annotations

import copy
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import fx, nn
from torch.utils import _pytree as pytree

from netsurgery.analysis.blocks import Block, Place, at, constant_outputs, places, shortened
from netsurgery.analysis.decided_runs import run_with_decisions
from netsurgery.analysis.network import Network
from netsurgery.analysis.replay import units_in
from netsurgery.capture.copies import copy_with, named_modules, named_tensors
from netsurgery.capture.lockstep import Lockstep, PathDiverged, source_of
from netsurgery.capture.meta_run import RAISED_BY_MODELS
from netsurgery.capture.paths import renumbered
from netsurgery.capture.program import Program
from netsurgery.capture.recorder import record
from netsurgery.edit import Edit
from netsurgery.errors import NetsurgeryError, RewriteError

__all__ = ["Dropping", "Skipped", "depth_known", "dropping_for"]


@dataclass(frozen=True)
class _Argument:
    """The place of an argument that a block returns."""

    place: Place


class Skipped(nn.Module):
    """Replaces a residual block, and returns its input in the form of the block's output.

    It has the numbers and texts that the block had as attributes, since code around it may read them.

    Args:
        returns: a result of the block, in which an ``_Argument`` stands for an argument that is returned.
        block: the module that it stands for.
    """

    def __init__(self, returns: object, block: nn.Module):
        super().__init__()
        own = {name: value for name, value in vars(block).items() if _is_plain(name, value)}
        self.__dict__.update(own)
        self.__dict__["returns"] = returns
        self.training = block.training

    def forward(self, *args: object, **kwargs: object) -> object:
        """Pick the arguments to return."""
        return _filled(self.returns, (args, kwargs))


def _is_plain(name: str, value: object) -> bool:
    return not name.startswith("_") and name != "training" and isinstance(value, int | float | str | None)


def _filled(value: Any, given: object) -> object:
    """The result that a block returned, with the arguments of this call in it."""
    if isinstance(value, _Argument):
        return at(value.place, given)
    if isinstance(value, tuple) and hasattr(value, "_make"):
        return value._make(_filled(item, given) for item in value)
    if type(value) in (tuple, list):
        return type(value)(_filled(item, given) for item in value)
    return {key: _filled(item, given) for key, item in value.items()} if type(value) is dict else value


def _returns(block: Block) -> object:
    """A stand-in for the result of a block: its input; arguments that it passed on; None for other tensors."""
    found = places((block.call.args, block.call.kwargs))

    def stand_in(value: object) -> object:
        if isinstance(value, fx.Node):
            place = found.get(block.source if value is block.result else value)
            return None if place is None else _Argument(place)
        return value if isinstance(value, int | float | str | None) else None

    return pytree.tree_map(stand_in, block.call.out)


@dataclass(frozen=True)
class Dropping:
    """The way in which blocks leave a model.

    Attributes:
        blocks: those that go.
        lists: the paths of the lists that close the gaps; elsewhere a ``Skipped`` takes a block's place.
    """

    blocks: Sequence[Block] = ()
    lists: frozenset[str] = frozenset()

    def renamed(self, name: str) -> str | None:
        """The name of a tensor after the removal; None where it goes."""
        return renumbered(name, [block.path for block in self.blocks], self.lists)

    def carry_out(self, model: nn.Module) -> None:
        """Take the blocks out of a model."""
        modules = named_modules(model)
        for block in self.blocks:
            around, _, name = block.path.rpartition(".")
            if around not in self.lists:
                modules[around]._modules[name] = Skipped(_returns(block), modules[block.path])
        for path in self.lists:
            gone = {block.path.rpartition(".")[2] for block in self.blocks if block.path.rpartition(".")[0] == path}
            _follow(model, path, modules[path], gone)
            _close(modules[path], gone)


def _close(container: nn.Module, gone: Collection[str]) -> None:
    """Take some modules out of a list; those that stay are numbered anew where they are numbered."""
    left = {name: module for name, module in container._modules.items() if name not in gone}
    container._modules.clear()
    container._modules.update({str(i) if name.isdigit() else name: m for i, (name, m) in enumerate(left.items())})


_INDICES = ("layer_idx", "layer_index", "layer_id", "block_idx")  # a layer's index, which caches use


def _follow(model: nn.Module, path: str, container: nn.Module, gone: Collection[str]) -> None:
    """Update layers that hold their place in a list, and configurations that hold its length."""
    names = list(container._modules)
    left = [name for name in names if name not in gone]
    for part, key, new in _indices(container, gone):
        part.__dict__[key] = new
    _follow_config(model, path, names, [names.index(name) for name in left])


def _indices(container: nn.Module, gone: Collection[str]) -> Iterator[tuple[nn.Module, str, int]]:
    """The modules in a list that hold their place in it, the attribute, and the place that they get."""
    left = [(old, layer) for old, (name, layer) in enumerate(container._modules.items()) if name not in gone]
    for new, (old, layer) in enumerate(left):
        for part in layer.modules() if layer is not None else ():
            for key in _INDICES:
                if type(part.__dict__.get(key)) is int and part.__dict__[key] == old:
                    yield part, key, new


def depth_known(model: nn.Module, edit: Edit) -> str | None:
    """The number by which a model knows lists that would close the gaps of an edit: an index, or their length; or None.

    Such a model is another one where names stay and a ``Skipped`` is in the gap.
    """
    dropping, modules = dropping_for(model, edit), named_modules(model)
    for path in sorted(dropping.lists):
        names = list(modules[path]._modules)
        if _configs(modules, path, len(names)):
            return f"the config says how many layers '{path}' has"
        gone = {block.path.rpartition(".")[2] for block in dropping.blocks if block.path.rpartition(".")[0] == path}
        for part, key, new in _indices(modules[path], gone):
            if part.__dict__[key] != new:
                return f"layers of '{path}' know their places ({key})"
    return None


def _configs(modules: Mapping[str, nn.Module], path: str, length: int) -> list[Any]:
    """The configurations that say how long a list is, and speak of no other one."""
    parts = path.split(".")
    around = [modules[".".join(parts[:i])] for i in range(len(parts) + 1)]
    configs = [c for one in around if _layers(c := one.__dict__.get("config")) == length]
    return [] if not configs or _other_lists(modules, path, length, configs[-1]) else configs


def _follow_config(model: nn.Module, path: str, names: Sequence[str], left: Sequence[int]) -> None:
    """Give modules a configuration with as many layers as a list has, where it describes this list alone."""
    modules = named_modules(model)
    configs = _configs(modules, path, len(names))
    new = {id(config): _fewer(config, len(names), left) for config in configs}
    for module in modules.values():
        config = module.__dict__.get("config")
        if id(config) not in new and any(id(value) in new for value in getattr(config, "__dict__", {}).values()):
            new[id(config)] = copy.copy(config)
    for config in list(new.values()):
        config.__dict__.update({key: new[id(value)] for key, value in vars(config).items() if id(value) in new})
    for module in modules.values():
        if id(module.__dict__.get("config")) in new:
            module.__dict__["config"] = new[id(module.__dict__["config"])]


def _layers(config: object) -> object:
    return getattr(config, "num_hidden_layers", None)


def _other_lists(modules: Mapping[str, nn.Module], path: str, length: int, config: object) -> bool:
    """True if a module with the same configuration has another list of this length: a decoder beside an encoder."""
    return any(
        isinstance(child, nn.ModuleList) and len(child) == length and child is not modules[path]
        for module in modules.values()
        if module.__dict__.get("config") is config
        for child in module.children()
    )


def _fewer(config: Any, length: int, left: Sequence[int]) -> object:
    """A copy of a configuration for fewer layers: their number, and lists with an item for each."""
    new = copy.copy(config)
    for key, value in vars(config).items():
        if "layer" in key and isinstance(value, list | tuple) and len(value) == length:
            new.__dict__[key] = type(value)(value[index] for index in left)
    new.num_hidden_layers = len(left)
    return new


def dropping_for(model: nn.Module, edit: Edit, close: bool = True) -> Dropping:
    """The way in which the dropped blocks leave a model: as many lists as its code allows close the gaps.

    Args:
        close: whether lists may; else all names stay.

    Raises:
        RewriteError: the model's code does not do without the blocks.
    """
    if not edit.dropped:
        return Dropping()
    network = edit.network
    blocks = [block for block in network.blocks if block.path in edit.dropped]
    modules = named_modules(model)
    around = {block.path.rpartition(".")[0] for block in blocks}
    lists = frozenset(path for path in around if close and isinstance(modules[path], nn.ModuleList | nn.Sequential))
    trial = _Trial(model, network, edit.dropped)
    if lists and trial.fails(found := Dropping(blocks, lists)) is None:
        return found
    if (why := trial.fails(found := Dropping(blocks))) is not None:
        raise RewriteError(f"the code of {network.model_name} does not work without {', '.join(edit.dropped)}: {why}")
    for path in sorted(lists):
        more = Dropping(blocks, found.lists | {path})
        found = more if trial.fails(more) is None else found
    return found


class _Trial:
    """Tries ways to take blocks out of a model on copies that share its weights."""

    def __init__(self, model: nn.Module, network: Network, dropped: Sequence[str]):
        self.model, self.network = model, network
        self.programs = [shortened(program, dropped) for program in network.programs]

    def fails(self, dropping: Dropping) -> str | None:
        """The reason why the model does not work that way; None if it does."""
        small = copy_with(self.model, {id(tensor): tensor for _, tensor in named_tensors(self.model)})
        names = {new: name for name in self.network.tensors if (new := dropping.renamed(name)) is not None}
        try:
            dropping.carry_out(small)
            for program in self.programs:
                if program.values == "all":
                    run_with_decisions(small, program, self.network.inputs, units_in({}), {})
                else:
                    _compare(record(small, self.network.inputs, program.mode), program, names)
        except (*RAISED_BY_MODELS, NetsurgeryError) as error:
            return str(error).strip().partition("\n")[0]
        return None


def _compare(found: Program, wanted: Program, names: Mapping[str, str]) -> None:
    """Make sure that a recorded run does the operations of another, with the same tensors and numbers.

    Args:
        names: the names that tensors have in the wanted program, by those in the one that was found.

    Raises:
        PathDiverged: it does not.
    """
    lockstep = Lockstep(wanted)
    inputs = ([node for node in program.graph.nodes if node.op == "placeholder"] for program in (found, wanted))
    known: dict[fx.Node, object] = dict(zip(*inputs, strict=True))

    def source(node: fx.Node) -> object:
        of = source_of(node)
        if isinstance(of, str):
            return names.get(of, "constant")
        return (known[of[0]], of[1]) if isinstance(of, tuple) else known[of]

    def wanted_source(node: fx.Node) -> object:
        of = lockstep.origin(node)
        return "constant" if isinstance(of, str) and of in wanted.constants else of

    for node in found.operations:
        match = lockstep.expected(node.target)
        if match is None:  # a copy that only the memory's layout asks for
            known[node] = source(node.args[0])  # type: ignore[arg-type]
            continue
        known[node] = match
        given, asked = (pytree.tree_leaves((one.args, one.kwargs)) for one in (node, match))
        if node.target is match.target:
            given = [source(value) if isinstance(value, fx.Node) else value for value in given]
            asked = [wanted_source(value) if isinstance(value, fx.Node) else value for value in asked]
            if given != asked or node.meta["shape"] != match.meta["shape"]:
                raise PathDiverged(f"{node.target} in module '{node.meta['module']}' has other arguments")
    for node in wanted.operations[lockstep.position :]:
        if not lockstep.leave_out(node):
            raise PathDiverged(f"{node.target} is missing")
    outputs: list[Any] = [program.graph.output_node().args[0] for program in (found, wanted)]
    computed = [node for node, fixed in zip(outputs[0], constant_outputs(found), strict=True) if not fixed]
    if [*map(source, computed)] != [*map(wanted_source, outputs[1])]:
        raise PathDiverged("the outputs are others")

"""Change integers on modules that repeat a dimension (``in_channels``, ``num_groups``, ...) with that dimension."""

from __future__ import annotations

from collections.abc import Iterator

from torch import fx, nn
from torch.utils import _pytree as pytree

from netsurgery.analysis.costs import Sizes
from netsurgery.analysis.network import Network
from netsurgery.axes import Axis, Dims
from netsurgery.capture.copies import named_modules
from netsurgery.capture.inputs import Tree

__all__ = ["follow", "settled"]

_OF_INPUT = {"in_channels": 1, "in_features": -1, "num_features": 1, "num_channels": 1}
_OF_OUTPUT = {"out_channels": 1, "out_features": -1, "embedding_dim": -1}
_OF_OPERATION = {"groups": "g", "num_groups": "g", "normalized_shape": "*n"}


def follow(model: nn.Module, network: Network, sizes: Sizes) -> None:
    """Set the attributes of a model whose tensors have the new sizes; only those that held the old size change."""
    modules = named_modules(model)
    for path, attribute, old, new in _followers(network, modules, sizes):
        held = modules[path].__dict__[attribute]
        if old != new and isinstance(held, int | tuple) and held == old:  # arrays compare item by item
            setattr(modules[path], attribute, new)


def settled(model: nn.Module, network: Network, sizes: Sizes) -> set[tuple[str, str]]:
    """The attributes whose meaning is known, by path and name, also those whose value stays."""
    modules = named_modules(model)
    return {
        (path, attribute)
        for path, attribute, old, _ in _followers(network, modules, sizes)
        if isinstance(held := modules[path].__dict__[attribute], int | tuple) and held == old
    }


Size = int | tuple[int, ...]
Follower = tuple[str, str, Size, Size]  # path of a module, name of an attribute, its old and its new value


def _followers(network: Network, modules: dict[str, nn.Module], sizes: Sizes) -> Iterator[Follower]:
    own = Sizes({})
    for program in network.programs:
        for call in {call.path: call for call in reversed(program.calls)}.values():
            for value, table in zip((call.args, call.out), (_OF_INPUT, _OF_OUTPUT), strict=True):
                held = modules[call.path].__dict__
                present = {attribute: dim for attribute, dim in table.items() if type(held.get(attribute)) is int}
                node = _first_node(value) if present else None
                for attribute, dim in present.items():
                    if node is not None and (axis := _dim(node, dim)) is not None:
                        yield call.path, attribute, own(axis), sizes(axis)
        for node in program.graph.nodes:
            names, path = node.meta.get("names", {}), node.meta.get("module", "")
            for attribute, axis in node.meta.get("attributes", {}).items():
                if attribute in modules[path].__dict__:
                    yield path, attribute, own(axis), sizes(axis)
            module = modules.get(path)
            if isinstance(module, nn.modules.conv._ConvNd) and isinstance(names.get("g"), Axis) and module.groups > 1:
                within = network.axes.get(f"{path}.weight" if path else "weight", ())
                if len(within) > 1:  # channels within a group
                    many = "out_channels" if isinstance(module, nn.modules.conv._ConvTransposeNd) else "in_channels"
                    yield path, many, own(names["g"]) * own(within[1]), sizes(names["g"]) * sizes(within[1])
            for attribute, name in _OF_OPERATION.items():
                if name in names and attribute in modules[path].__dict__:
                    value = names[name]
                    if isinstance(value, tuple):
                        yield path, attribute, tuple(map(own, value)), tuple(map(sizes, value))
                    else:
                        yield path, attribute, own(value), sizes(value)
    for path, module in modules.items():
        axes = network.axes.get(f"{path}.weight" if path else "weight")
        for attribute, axis in _of_weight(module, axes) if axes else ():
            yield path, attribute, own(axis), sizes(axis)
        for attribute, name, dim in _of_recurrence(module):
            if (axes := network.axes.get(f"{path}.{name}" if path else name)) is not None:
                yield path, attribute, own(axes[dim]), sizes(axes[dim])


def _of_weight(module: nn.Module, axes: tuple[Axis, ...]) -> Iterator[tuple[str, Axis]]:
    """Attributes that repeat the shape of the module's own weight, however the module is called."""
    if isinstance(module, nn.PReLU):
        yield "num_parameters", axes[0]
    elif isinstance(module, nn.modules.batchnorm._NormBase):
        yield "num_features", axes[0]
    elif isinstance(module, nn.Linear):
        yield from (("out_features", axes[0]), ("in_features", axes[1]))
    elif isinstance(module, nn.modules.conv._ConvTransposeNd):
        yield "in_channels", axes[0]
        if module.groups == 1:
            yield "out_channels", axes[1]
    elif isinstance(module, nn.modules.conv._ConvNd):
        yield "out_channels", axes[0]
        if module.groups == 1:
            yield "in_channels", axes[1]


def _of_recurrence(module: nn.Module) -> Iterator[tuple[str, str, int]]:
    """Attributes of recurrent layers and cells, with the weight and the axis whose size they repeat."""
    if isinstance(module, nn.RNNCellBase):
        yield from (("input_size", "weight_ih", 1), ("hidden_size", "weight_hh", 1))
    elif isinstance(module, nn.RNNBase):
        yield "input_size", "weight_ih_l0", 1
        if module.proj_size:
            yield from (("proj_size", "weight_hh_l0", 1), ("hidden_size", "weight_hr_l0", 1))
        else:
            yield "hidden_size", "weight_hh_l0", 1


def _first_node(value: Tree) -> fx.Node | None:
    return next((leaf for leaf in pytree.tree_leaves(value) if isinstance(leaf, fx.Node)), None)


def _dim(node: fx.Node, dim: int) -> Axis | None:
    dims: Dims = node.meta["dims"]
    return dims[dim] if -len(dims) <= dim < len(dims) else None

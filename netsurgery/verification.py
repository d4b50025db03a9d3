"""Two oracles that share nothing with the rewriting: removal equals silencing, and renaming does not matter.

Both replay the recorded graph of the original network on real tensors. **Silencing** zeroes each removed unit in the
result of every operation, and takes statistics (means, norms, softmax) over what stays. **Permutation** shuffles the
units of every group in every parameter that carries it; the output must not change.

Where a network decides by values (see ``values.py``), all runs are answered with the decisions of the recorded one, and
where it draws random numbers, with those of the original; the numbers that these rest on are compared like outputs.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from netsurgery.alongside import Alongside, LeftPath
from netsurgery.axes import Axis, find, leaves
from netsurgery.copying import named_tensors
from netsurgery.costs import Sizes
from netsurgery.edit import Edit
from netsurgery.errors import InputError
from netsurgery.network import Group, Network
from netsurgery.randomness import seeded
from netsurgery.rules import Op
from netsurgery.tracing import (
    TRANSPARENT,
    Inputs,
    Program,
    as_inputs,
    bare_inputs,
    format_where,
    home,
    lend,
    lend_inputs,
    location,
    run_skeleton,
    skeleton,
    tensors_in,
    trains_otherwise,
    without_fast_path,
)
from netsurgery.untried import trace_untried
from netsurgery.values import Values, answer, draw, flat, is_number, laid_out, select, told

__all__ = [
    "STATISTICS",
    "draws",
    "entries",
    "is_view",
    "look_up_constants",
    "permuted_difference",
    "replay",
    "silenced",
    "verify",
]

aten = torch.ops.aten
Units = Callable[[Axis], Tensor]  # which units of a channel, in which order
Drawn = dict[torch.fx.Node, Any]  # by operation: the random numbers that it drew
Numbers = list[tuple[torch.fx.Node, Tensor]]  # results that decisions are taken from


def verify(model: nn.Module, small: nn.Module, edit: Edit, example_inputs: Any = None) -> float:
    """Compare a rewritten model with the original in which the removed units are silenced, given the edit's values.

    Args:
        model: the original, unchanged.
        small: what ``rewrite`` made of it.
        edit: the edit that was carried out.
        example_inputs: inputs of the traced shapes; by default those of the trace, filled with random numbers. Where
            they take another way through the code than those of the trace (another mask, say), the original is recorded
            anew with them.

    Returns:
        The largest absolute difference between the outputs over the largest absolute output of the silenced
        original, the worst over all outputs (and, where a network has parts only used in training, over both modes).
        Infinite where either has a number that is none (NaN), and where the shapes differ. Where an output is zero
        everywhere, as with a head that starts at zero, or empty, it proves nothing. Where the code decides by values of
        activations, both networks take the decisions of the recorded run, whatever these inputs would decide, and the
        numbers these are taken from count as outputs; what the code draws at random is the same in both.

    Raises:
        InputError: the arguments in another order; a first model that is not the original; inputs of other shapes than
            those of the trace, or that take a way through the code on which the edit cannot be; or a small model that
            runs other operations where the code looks at values or draws random numbers.

    Example:
        >>> import torch, netsurgery
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
        >>> x = torch.randn(1, 4)
        >>> edit = netsurgery.Edit(netsurgery.trace(model, (x,)), {"0": (0, 2, 5)})
        >>> netsurgery.verify(model, netsurgery.rewrite(model, edit), edit, (x,)) < 1e-6
        True
    """
    _check_arguments(model, small, edit)
    inputs = _given(example_inputs, model, edit.network)
    edit = edit if _alike(edit.network, inputs) else _on_the_way_of(inputs, model, edit)
    keep = {edit.network[name].channel: torch.tensor(units) for name, units in edit.keep.items()}
    units = _units({} if _fits(small, edit.network, Sizes({})) else keep)
    look_up_constants(model, edit.network, inputs)
    tensors = {**dict(named_tensors(model)), **edit.values}
    worst = 0.0
    for program in _repeatable(edit.network):
        numbers: Numbers = []
        drawn: Drawn = {}
        with seeded(0, home(model)):
            want = silenced(edit.network, program, tensors, inputs, keep, numbers, drawn)
        if program.values == "all" or drawn:
            found, read = follow(small, program, inputs, units, drawn)
            worst = max(worst, _difference(read, _chosen(numbers, units)))
        else:
            found = run(small, program, inputs)
        worst = max(worst, _difference(found, want))
    return worst


def _check_arguments(model: Any, small: Any, edit: Any) -> None:
    """Make sure of three arguments in their order, as far as they can be told apart."""
    if not (isinstance(model, nn.Module) and isinstance(small, nn.Module) and isinstance(edit, Edit)):
        kinds = ", ".join(type(value).__name__ for value in (model, small, edit))
        raise InputError(f"verify(model, small, edit) takes the original, the small model and the edit, got {kinds}")
    if not _fits(model, edit.network, Sizes({})):
        swapped = _fits(small, edit.network, Sizes({})) and _fits(model, edit.network, edit.network.sizes(edit.counts))
        raise InputError(
            "the original comes first: verify(model, small, edit)"
            if swapped
            else f"the first model is not the {edit.network.model_name} that the edit is for (its tensors have other "
            "shapes): pass the original; if it was cut in place, a copy made before"
        )


def _fits(model: nn.Module, network: Network, sizes: Sizes) -> bool:
    """Whether a model's tensors have the shapes that they have in a network at some sizes."""
    found = {name: tuple(tensor.shape) for name, tensor in named_tensors(model)}
    return all(found.get(name) == tuple(map(sizes, axes)) for name, axes in network.axes.items())


def _given(example_inputs: Any, model: nn.Module, network: Network) -> Inputs:
    """The inputs to compare on: those that are given, of the shapes of the trace, or some drawn at random."""
    if example_inputs is None:
        return _random_like(network, model)
    inputs = _in_order(as_inputs(example_inputs), network)
    _check_shapes(network, inputs)
    return inputs


def _in_order(inputs: Inputs, network: Network) -> Inputs:
    """The same inputs, keywords in the order of the trace."""
    positional, keyword = inputs
    if keyword.keys() == network.inputs[1].keys():
        return positional, {key: keyword[key] for key in network.inputs[1]}
    return inputs


def _alike(network: Network, inputs: Inputs) -> bool:
    """Whether inputs surely take the way through the code that was recorded."""
    (given, form), (traced, form_traced) = pytree.tree_flatten(inputs), pytree.tree_flatten(network.inputs)
    looks = any(program.values != "none" for program in network.programs)
    return (
        form == form_traced
        and _first_places(given) == _first_places(traced)
        and all(_stands_for(a, b, looks) for a, b in zip(given, traced, strict=True))
    )


def _first_places(values: list[Any]) -> list[int]:
    """For each tensor where it is given first: one that is given twice was recorded as one."""
    tensors = [id(value) for value in values if isinstance(value, Tensor)]
    return [tensors.index(one) for one in tensors]


def _stands_for(given: Any, traced: Any, looks: bool) -> bool:
    """Whether one input decides what another does, when the code looks at values or not; numbers decide nothing."""
    if not isinstance(given, Tensor) or not isinstance(traced, Tensor):
        plain = type(given) is type(traced) and isinstance(given, int | float | str)
        return given is traced or (plain and given == traced)
    if given.dtype != traced.dtype and not (is_number(given) and is_number(traced)):
        return False
    if not looks or is_number(traced):
        return True
    return not traced.is_meta and torch.equal(given.cpu(), traced.cpu())


def _on_the_way_of(inputs: Inputs, model: nn.Module, edit: Edit) -> Edit:
    """The same edit, of the network that is recorded with these inputs.

    Raises:
        InputError: a group is another there, or frozen.
    """
    network = trace_untried(model, inputs[0] or inputs[1])
    for name in edit.keep:
        group = network.by_name.get(name)
        if group is None or group.size != edit.network[name].size or _places(group) != _places(edit.network[name]):
            raise InputError(
                f"these inputs take another way through the code of {network.model_name} than those of the trace, and "
                f"the units of '{name}' are others there: plan the edit with such inputs"
            )
    return Edit(network, edit.keep, values=edit.values)


def _places(group: Group) -> set[tuple[str, int]]:
    return {(member.parameter, member.axis) for member in group.members}


def _random_like(network: Network, model: nn.Module) -> Inputs:
    """The inputs of the trace with random numbers in floating-point tensors, on the model's device."""
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    bare: Inputs = pytree.tree_map_only(
        Tensor, lambda t: t.to("meta") if t.dtype.is_floating_point else t, network.inputs
    )
    drawn: Inputs = draw(bare, device)
    return drawn


def _units(lists: Mapping[Axis, Tensor]) -> Units:
    """The units of a channel that a list names, in its order; all of them where there is none."""
    return lambda leaf: lists[leaf] if leaf in lists else torch.arange(leaf.size)


def _chosen(numbers: Numbers, units: Units) -> list[Tensor]:
    return [select(tensor, node.meta["dims"], units) for node, tensor in numbers]


def _repeatable(network: Network) -> list[Program]:
    """The recorded programs but those in training mode that draw random numbers."""
    seeded = torch.Tag.nondeterministic_seeded
    return [
        program
        for program in network.programs
        if program.mode == "eval" or not any(seeded in getattr(n.target, "tags", ()) for n in program.graph.nodes)
    ]


def _check_shapes(network: Network, inputs: Inputs) -> None:
    found = [tuple(t.shape) for t in tensors_in(inputs)]
    wanted = [tuple(t.shape) for t in tensors_in(network.inputs)]
    if found != wanted:
        raise InputError(f"the network was traced with inputs of shapes {wanted}, got {found}: pass such inputs")


def permuted_difference(model: nn.Module, network: Network, example_inputs: Any = None, seed: int = 0) -> float:
    """Permute the units of every prunable group wherever it occurs; return the relative change of the output."""
    inputs = _given(example_inputs, model, network)
    look_up_constants(model, network, inputs)
    generator = torch.Generator().manual_seed(seed)
    units = _units({g.channel: torch.randperm(g.size, generator=generator) for g in network.prunable})
    tensors = dict(named_tensors(model))
    shuffled = {**tensors, **{n: select(tensors[n].detach(), axes, units) for n, axes in network.axes.items()}}
    worst = 0.0
    for program in _repeatable(network):
        before: Numbers = []
        after: Numbers = []
        found = replay(program, shuffled, inputs, units=units, numbers=after)
        wanted = replay(program, tensors, inputs, numbers=before)
        worst = max(worst, _difference(found, wanted))
        worst = max(worst, _difference([tensor for _, tensor in after], _chosen(before, units)))
    return worst


def run(model: nn.Module, program: Program, inputs: Inputs) -> list[Tensor]:
    """The outputs of a model in the mode a program was recorded in; its own mode is put back."""
    modes = {module: module.training for module in model.modules()}
    try:
        for module in modes:
            module.training = program.mode == "train" and trains_otherwise(module)
        positional, keyword = pytree.tree_map_only(Tensor, Tensor.clone, inputs)  # code may write to them
        with torch.no_grad(), without_fast_path():
            return tensors_in(model(*positional, **keyword))
    finally:
        for module, training in modes.items():
            module.training = training


class _Follower(Alongside):
    """Runs a model's code with the decisions of a recorded run, and notes the numbers that these are taken from.

    Random numbers are those that were ``drawn`` in another run, by the operation that drew them.
    """

    def __init__(self, program: Program, values: Values, units: Units, drawn: Drawn):
        super().__init__(program, values)
        self.own, self.units, self.drawn = values, units, drawn
        self.numbers: list[Tensor] = []

    def see(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        try:
            node = self.expected(func)
        except LeftPath as error:
            raise InputError(
                f"the small model does not do what the original did {format_where(location())}: {error}"
            ) from error
        if node is None or not ("decided" in node.meta or node in self.drawn):
            return self.own.keep(func, args, kwargs, self.own.run(func, args, kwargs))
        positional, keyword = self.own.reals(args, kwargs)
        self.numbers.extend(t.clone() for t in flat(_read(func, positional, keyword)) if is_number(t))
        if node in self.drawn:
            found = _drawn_again(func, positional, _selected(self.drawn[node], node.meta["dims"], self.units))
        else:
            found = answer(func, positional, keyword, told(node, self.units))
        return self.own.keep(func, args, kwargs, found)


def follow(
    model: nn.Module, program: Program, inputs: Inputs, units: Units, drawn: Drawn
) -> tuple[list[Tensor], list[Tensor]]:
    """The outputs of a model whose code is run with the decisions of a recorded run, and the numbers these rest on."""
    device = home(model)
    bare, names = skeleton(model, program.mode)
    values, given = Values(device), bare_inputs(inputs)
    lend(values, model, bare, names)
    lend_inputs(values, given, inputs)
    follower = _Follower(program, values, units, drawn)
    outputs = run_skeleton(bare, follower, given, device)
    return [values.real(follower.stand_in(tensor)) for tensor in tensors_in(outputs)], follower.numbers


def draws(node: torch.fx.Node) -> bool:
    """Whether an operation draws random numbers, as it was called; dropout without a rate does not."""
    if torch.Tag.nondeterministic_seeded not in getattr(node.target, "tags", ()):
        return False
    given = Op(node, None).arguments
    rate, trains = given.get("dropout_p", given.get("p")), given.get("train", given.get("training"))
    return not (isinstance(rate, int | float) and rate == 0) and trains is not False


def _read(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> list[Any]:
    """The arguments of an operation that it does not only write to."""
    named = [*zip((a.name for a in func._schema.arguments), args, strict=False), *kwargs.items()]
    filled = {a.name for a in func._schema.arguments if a.alias_info is not None and a.alias_info.is_write}
    return [value for name, value in named if name not in filled or torch.Tag.nondeterministic_seeded not in func.tags]


def _drawn_again(func: Any, args: Any, drawn: Any) -> Any:
    """The result of an operation that draws random numbers, when it draws these."""
    (first, *_) = func._schema.returns
    return args[0].copy_(drawn) if first.alias_info is not None else drawn


def _selected(value: Any, dims: Any, units: Units) -> Any:
    """The units that stay of one result, or of each of several."""
    if isinstance(value, list):
        return [_selected(part, axes, units) for part, axes in zip(value, dims, strict=True)]
    return select(value, dims, units) if isinstance(value, Tensor) else value


def _copied(value: Any) -> Any:
    parts = [part.clone() if isinstance(part, Tensor) else part for part in flat(value)]
    return parts if isinstance(value, list | tuple) else parts[0]


def _difference(found: list[Tensor], wanted: list[Tensor]) -> float:
    if len(found) != len(wanted):
        return float("inf")
    return max((_relative(a, b) for a, b in zip(found, wanted, strict=True)), default=0.0)


def _relative(found: Tensor, wanted: Tensor) -> float:
    if found.shape != wanted.shape:
        return float("inf")
    if not wanted.is_floating_point() and not wanted.is_complex():
        found, wanted = found.double(), wanted.double()
    equal = found == wanted  # infinities are
    difference = torch.where(equal, 0.0, (found - wanted).abs())
    worst = difference.max().item() if wanted.numel() else 0.0
    scale = torch.where(wanted.isfinite(), wanted.abs(), 0.0).max().item() if wanted.numel() else 0.0
    return float("inf") if worst != worst else worst / scale if scale else worst


class _Observer(TorchDispatchMode):
    """Looks up the values of tensors that the code makes, where the run without data could not see them."""

    def __init__(self, program: Program):
        super().__init__()  # type: ignore[no-untyped-call]
        self.program = program
        self.nodes = program.operations
        self.position = 0

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func not in TRANSPARENT and self.position < len(self.nodes):
            node = self.nodes[self.position]
            self.position += 1
            if node.target is func:
                pairs = zip(pytree.tree_leaves(list(node.args)), pytree.tree_leaves(list(args)), strict=False)
                self.program.constants.update(
                    (str(wanted.target), value.detach().clone())
                    for wanted, value in pairs
                    if isinstance(wanted, torch.fx.Node) and wanted.target in self.program.constants
                )
        return func(*args, **(kwargs or {}))


def look_up_constants(model: nn.Module, network: Network, inputs: Inputs) -> None:
    """Give every constant of the recorded programs its value.

    Raises:
        InputError: the model does other operations on real tensors than on tensors without data.
    """
    for program in network.programs:
        if not any(value.is_meta for value in program.constants.values()):
            continue
        with _Observer(program):
            run(model, program, inputs)
        for node in program.graph.nodes:
            if node.op == "get_attr" and (value := program.constants.get(node.target)) is not None and value.is_meta:
                place = format_where(node.meta["where"])
                raise InputError(
                    f"cannot replay the model: the values of a tensor that its code makes {place} are not known"
                )


def replay(
    program: Program,
    tensors: Mapping[str, Tensor],
    inputs: Inputs,
    after: Callable[[Any, Any, Any], Any] | None = None,
    units: Units | None = None,
    numbers: Numbers | None = None,
) -> list[Tensor]:
    """Run a recorded program on real tensors, with the decisions of the recorded run.

    Args:
        after: called with each node, its real arguments and its result; returns the result to go on with.
        units: the order in which ``tensors`` have the units of a channel; by default as they were.
        numbers: gets the floating-point numbers that decisions are taken from, with their nodes.
    """
    given = iter(tensors_in(inputs))
    values: dict[Any, Any] = {}
    device = next((t.device for t in tensors_in(inputs)), torch.device("cpu"))
    with torch.no_grad():
        for node in program.graph.nodes:
            if node.op == "placeholder":
                values[node] = next(given).clone()
            elif node.op == "get_attr":
                source = tensors[node.target] if node.target in tensors else program.constants[node.target]
                source = source.to(device)
                values[node] = source.detach().clone()
            elif node.op == "output":
                return [values[result] for result in node.args[0]]
            else:
                args, kwargs = torch.fx.node.map_aggregate(
                    (node.args, node.kwargs), functools.partial(_value, values, device)
                )
                if numbers is not None and ("decided" in node.meta or draws(node)):
                    read = flat(_read(node.target, node.args, node.kwargs))
                    numbers.extend(
                        (s, values[s].clone()) for s in read if isinstance(s, torch.fx.Node) and is_number(values[s])
                    )
                if "decided" in node.meta:
                    values[node] = answer(node.target, args, kwargs, told(node, units or _units({})))
                else:
                    values[node] = laid_out(node.target)(*args, **kwargs)
            if after is not None and node.op != "output":
                values[node] = after(node, values, values[node])
    raise AssertionError("a recorded graph ends in its output")


def _value(values: Mapping[Any, Any], device: torch.device, item: Any) -> Any:
    if isinstance(item, torch.fx.Node):
        return values[item]
    return device if isinstance(item, torch.device) else item


def entries(masks: Sequence[Tensor]) -> Tensor:
    """Which entries of a tensor stay, to be broadcast, from which positions of each of its dimensions do."""
    shaped = [one.reshape([-1 if i == dim else 1 for i in range(len(masks))]) for dim, one in enumerate(masks)]
    return functools.reduce(torch.logical_and, shaped)


def silenced(
    network: Network,
    program: Program,
    tensors: Mapping[str, Tensor],
    inputs: Inputs,
    keep: Mapping[Axis, Tensor],
    numbers: Numbers | None = None,
    drawn: Drawn | None = None,
) -> list[Tensor]:
    """Outputs of the original network with every unit not in ``keep`` contributing nothing; ``numbers`` as above.

    What stays of a weight that is computed from others stays as it is: its computation sees all units.
    ``drawn`` gets what each operation draws at random.
    """

    @functools.cache
    def mask(axis: Axis, whole: frozenset[Axis]) -> Tensor:
        if find(axis) is not axis:
            return mask(find(axis), whole)
        if not axis.op:
            stays = torch.zeros(axis.size, dtype=torch.bool)
            stays[_units({} if axis in whole else keep)(axis)] = True
            return stays
        parts = [mask(term, whole) for term in axis.terms]
        if axis.op == "concat":
            return torch.cat(parts)
        return functools.reduce(lambda a, b: torch.kron(a.to(torch.uint8), b.to(torch.uint8)).bool(), parts)

    def stays(node: Any, dims: tuple[Axis, ...], device: torch.device) -> Tensor | None:
        """Which entries of a tensor that a node gives or takes stay, or None where all do."""
        whole = frozenset(leaf for axis in node.meta.get("whole", ()) for leaf in leaves(axis))
        masks = [mask(axis, whole).to(device) for axis in dims]
        if all(bool(one.all()) for one in masks):
            return None
        return entries(masks)

    def silence(node: Any, values: Mapping[Any, Any], out: Any) -> Any:
        if drawn is not None and node.op == "call_function" and draws(node):
            drawn[node] = _copied(out)
        special = STATISTICS.get(getattr(node.target, "overloadpacket", None))
        if special is not None and "decided" not in node.meta:
            op = Op(node, network)
            dims = op.dims(op["self"] if "self" in op.arguments else op["input"])
            kept = stays(node, dims, _first(values, op).device)
            if kept is not None:
                out = special(
                    {k: values.get(v, v) if isinstance(v, torch.fx.Node) else v for k, v in op.arguments.items()},
                    kept,
                )
        if isinstance(out, Tensor) and out.dim() and out.numel():
            kept = stays(node, node.meta["dims"], out.device)
            if kept is not None and not is_view(node):
                out = out.masked_fill_(~kept, 0) if _is_inplace(node) else out.masked_fill(~kept, 0)
        return out

    return replay(program, tensors, inputs, silence, numbers=numbers)


def _first(values: Mapping[Any, Any], op: Op) -> Tensor:
    return values[op.inputs[0]]  # type: ignore[no-any-return]


def _aliases(node: Any) -> list[bool]:
    """For each argument that the result shares memory with: whether it is written to."""
    schema = getattr(node.target, "_schema", None)
    return [argument.alias_info.is_write for argument in schema.arguments if argument.alias_info] if schema else []


def _is_inplace(node: Any) -> bool:
    return any(_aliases(node))


def is_view(node: Any) -> bool:
    """A view of silenced memory is silenced; only expand makes units of its own."""
    if node.target is operator.getitem:
        return is_view(node.args[0])
    return bool(_aliases(node)) and not _is_inplace(node) and node.target.overloadpacket is not aten.expand


def _masked_mean(x: Tensor, stays: Tensor, dims: list[int]) -> Tensor:
    full = stays.expand_as(x)
    return (x * full).sum(dims, keepdim=True) / full.sum(dims, keepdim=True)


def _normalise(x: Tensor, stays: Tensor, dims: list[int], eps: float) -> Tensor:
    centred = x - _masked_mean(x, stays, dims)
    return centred * torch.rsqrt(_masked_mean(centred**2, stays, dims) + eps)


def _dims(arguments: dict[str, Any]) -> list[int]:
    ndim, dim = arguments["self"].dim(), arguments.get("dim")
    return list(range(ndim)) if dim is None or dim == [] else [dim] if isinstance(dim, int) else list(dim)


def _over_what_stays(operation: Any, vanish: bool, a: dict[str, Any], stays: Tensor) -> Any:
    """Run an operation on the entries that stay alone; put its results where they belong, and zeros elsewhere.

    Args:
        vanish: whether the dimensions worked along vanish, or keep their size.
    """
    along = [[d for d in range(stays.dim()) if d != dim] for dim in range(stays.dim())]
    sizes = [int((stays.sum(others) > 0).sum()) if others else int(stays.sum()) for others in along]
    found = operation(**{**a, "self": a["self"].masked_select(stays).reshape(sizes)})
    places = stays.int().amax(_dims(a), a.get("keepdim", False)).bool() if vanish else stays
    results = [small.new_zeros(places.shape).masked_scatter(places, small) for small in _listed(found)]
    return results[0] if isinstance(found, Tensor) else results


def _listed(found: Any) -> list[Tensor]:
    return [found] if isinstance(found, Tensor) else list(found)


def _batch_norm(a: dict[str, Any], stays: Tensor) -> Any:
    """In eval mode the statistics are given; otherwise they are taken here, as weight standardisation does."""
    x = a["input"]
    if not a["training"]:
        return aten.native_batch_norm(*a.values())
    out = torch.nan_to_num(_normalise(x, stays, [d for d in range(x.dim()) if d != 1], a["eps"]))
    shape = [1, -1] + [1] * (x.dim() - 2)
    out = out if a["weight"] is None else out * a["weight"].reshape(shape)
    return [out if a["bias"] is None else out + a["bias"].reshape(shape), None, None]


def _layer_norm(a: dict[str, Any], stays: Tensor) -> Any:
    x = a["input"]
    out = _normalise(x, stays, list(range(x.dim() - len(a["normalized_shape"]), x.dim())), a["eps"])
    out = out if a["weight"] is None else out * a["weight"]
    return [out if a["bias"] is None else out + a["bias"], None, None]


def _group_norm(a: dict[str, Any], stays: Tensor) -> Any:
    x, blocks = a["input"], (a["N"], a["group"], -1)
    out = _normalise(x.reshape(blocks), stays.expand_as(x).reshape(blocks), [2], a["eps"])
    out = torch.nan_to_num(out).reshape(x.shape)
    shape = [1, -1] + [1] * (x.dim() - 2)
    out = out if a["weight"] is None else out * a["weight"].reshape(shape)
    return [out if a["bias"] is None else out + a["bias"].reshape(shape), None, None]


STATISTICS: dict[Any, Callable[[dict[str, Any], Tensor], Any]] = {
    **{
        one: functools.partial(_over_what_stays, one, True)
        for one in (
            aten.mean, aten.amax, aten.amin, aten.aminmax, aten.max, aten.min, aten.prod, aten.all, aten.var,
            aten.var_mean, aten.std, aten.std_mean, aten.logsumexp, aten.norm, aten.linalg_vector_norm,
        )
    },
    **{
        one: functools.partial(_over_what_stays, one, False)
        for one in (aten._softmax, aten._safe_softmax, aten._log_softmax)
    },
    aten.native_batch_norm: _batch_norm,
    aten.native_layer_norm: _layer_norm,
    aten.native_group_norm: _group_norm,
}  # fmt: skip

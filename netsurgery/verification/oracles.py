"""Two oracles that share nothing with the rewriting: removal equals silencing, and renaming does not matter.

Both replay the recorded graph of the original network on real tensors. **Silencing** zeroes each removed unit in the
result of every operation, and takes statistics (means, norms, softmax) over what stays. **Permutation** shuffles the
units of every group in every parameter that carries it; the output must not change.

Where a network decides by values (see ``capture.known_values``), all runs take the decisions of the recorded one. Where
it draws random numbers, all runs take those of the original. The numbers that decisions are taken from are compared
like outputs.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from netsurgery.analysis.blocks import constant_outputs, shortened
from netsurgery.analysis.costs import Sizes
from netsurgery.analysis.decided_runs import run_with_decisions
from netsurgery.analysis.groups import Group
from netsurgery.analysis.network import Network
from netsurgery.analysis.replay import Drawn, Numbers, Units, replay, run, units_in, with_constants
from netsurgery.analysis.tracing import network_of, undisturbed
from netsurgery.capture.copies import named_tensors
from netsurgery.capture.inputs import Inputs, as_inputs, tensors_in
from netsurgery.capture.known_values import draw, is_number, select
from netsurgery.capture.meta_run import home
from netsurgery.capture.program import Program
from netsurgery.capture.randomness import seeded
from netsurgery.capture.recorder import record
from netsurgery.edit import Edit
from netsurgery.errors import InputError
from netsurgery.rewriting.surgery import rewrite, stage_of
from netsurgery.units import adds_up, sources
from netsurgery.verification.silencing import silenced

__all__ = ["permuted_difference", "verify"]


@undisturbed()
def verify(model: nn.Module, small: nn.Module, edit: Edit, example_inputs: object = None) -> float:
    """Compare a rewritten model with the original in which the removed units are silenced, given the edit's values.

    Residual blocks that the edit drops are left out of the recorded run: their input stands for their output. Where it
    rewrites modules, outputs must be those of the original, in eval mode; where a rewrite says that it changes them
    (``exact = False``), those of the original that ``rewrite`` rewrites again. Stages are verified one by one.

    Args:
        model: the original, unchanged.
        small: the model that ``rewrite`` made of it.
        edit: the edit that was carried out.
        example_inputs: inputs of the traced shapes; by default those of the trace, filled with random numbers. Where
            they take another way through the code than those of the trace (another mask, say), the original is recorded
            anew with them.

    Returns:
        The largest absolute difference between the outputs over the largest absolute output of the silenced
        original, the worst over all outputs (and, where a network has parts only used in training, over both modes).
        Infinite where either has a NaN, and where the shapes differ. An output that is zero everywhere, as with a head
        that starts at zero, proves nothing. Where the code decides by values of activations, both networks take the
        decisions of the recorded run, and the numbers that these are taken from count as outputs. Random numbers are
        the same in both.

    Raises:
        InputError: the arguments in another order; a first model that is not the original; inputs of other shapes than
            those of the trace, or that take a way through the code to which the edit does not apply; or a small model
            that runs other operations where the code looks at values or draws random numbers.

    Example:
        >>> import torch, netsurgery
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
        >>> x = torch.randn(1, 4)
        >>> edit = netsurgery.Edit(netsurgery.trace(model, (x,)), {"0": (0, 2, 5)})
        >>> netsurgery.verify(model, netsurgery.rewrite(model, edit), edit, (x,)) < 1e-6
        True
    """
    if isinstance(edit, Edit) and edit.first is not None:
        return _stage_by_stage(model, small, edit, example_inputs)
    _check_arguments(model, small, edit)
    if taken := next((name for name, own in edit.keep.items() if not adds_up(own)), None):
        raise InputError(f"some copies of units of '{taken}' were removed again: verify each edit by itself")
    inputs = _given(example_inputs, model, edit.network)
    if edit.modules:
        return _same_outputs(model if edit.exact else rewrite(model, edit), small, edit, inputs)
    edit = edit if _alike(edit.network, inputs) else _on_the_way_of(inputs, model, edit)
    keep = {edit.network[name].channel: torch.tensor(edit.sources(name), dtype=torch.long) for name in edit.keep}
    order = {edit.network[name].channel: torch.tensor(sources(own)).clamp_(min=0) for name, own in edit.keep.items()}
    units = units_in({} if _fits(small, edit.network, Sizes({})) else order)
    network = with_constants(model, edit.network, inputs)
    tensors = {**dict(named_tensors(model)), **edit.values}
    worst = 0.0
    for whole in _repeatable(network):
        program = shortened(whole, edit.dropped) if edit.dropped else whole
        numbers: Numbers = []
        drawn: Drawn = {}
        with seeded(0, home(model)):
            want = silenced(program, tensors, inputs, keep, numbers, drawn)
        if program.values == "all" or drawn:
            found, read = run_with_decisions(small, program, inputs, units, drawn)
            worst = max(worst, _difference(read, _chosen(numbers, units)))
        else:
            found = run(small, program, inputs)
        if edit.dropped and any(constant_outputs(whole)):
            fixed = constant_outputs(record(small, inputs, whole.mode))
            found = [tensor for tensor, constant in zip(found, fixed, strict=True) if not constant]
        worst = max(worst, _difference(found, want))
    return worst


def _stage_by_stage(model: nn.Module, small: nn.Module, edit: Edit, example_inputs: object) -> float:
    """The largest difference over the stages, of models that ``rewrite`` makes and, at last, the small one."""
    worst, stages = 0.0, edit.stages
    _check_arguments(model, small, stages[0])
    for stage, later in itertools.pairwise(stages):
        between = stage_of(model, stage, later)
        worst, model = max(worst, verify(model, between, stage, example_inputs)), between
    return max(worst, verify(model, small, stages[-1], example_inputs))


def _same_outputs(model: nn.Module, small: nn.Module, edit: Edit, inputs: Inputs) -> float:
    """The largest difference of the outputs of two models."""
    worst = 0.0
    for program in _repeatable(edit.network):
        outputs: list[list[Tensor]] = []
        for one in (small, model):
            with seeded(0, home(one)):
                outputs.append(run(one, program, inputs))
        worst = max(worst, _difference(*outputs))
    return worst


def _check_arguments(model: object, small: object, edit: object) -> None:
    """Make sure that three arguments are in their order, as far as their types tell."""
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
    """True if a model's tensors have the shapes that they have in a network at some sizes."""
    found = {name: tuple(tensor.shape) for name, tensor in named_tensors(model)}
    return all(found.get(name) == tuple(map(sizes, axes)) for name, axes in network.axes.items())


def _given(example_inputs: object, model: nn.Module, network: Network) -> Inputs:
    """The inputs to compare on: the given ones, with the shapes of the trace, or random ones."""
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
    """True if inputs surely take the path through the code that was recorded."""
    (given, form), (traced, form_traced) = pytree.tree_flatten(inputs), pytree.tree_flatten(network.inputs)
    looks = any(program.values != "none" for program in network.programs)
    return (
        form == form_traced
        and _first_places(given) == _first_places(traced)
        and all(_stands_for(a, b, looks) for a, b in zip(given, traced, strict=True))
    )


def _first_places(values: Sequence[object]) -> list[int]:
    """For each tensor the place where it is given first: one that is given twice was recorded as one."""
    tensors = [id(value) for value in values if isinstance(value, Tensor)]
    return [tensors.index(one) for one in tensors]


def _stands_for(given: object, traced: object, looks: bool) -> bool:
    """True if an input leads the code the way that another does: by its value where the code looks at values."""
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
        InputError: a group is another there, or locked.
    """
    network = network_of(model, inputs[0] or inputs[1])
    for name in edit.keep:
        group = network.by_name.get(name)
        if (
            group is None
            or group.size != edit.network[name].size
            or _occurrences(group) != _occurrences(edit.network[name])
        ):
            raise InputError(
                f"these inputs take another way through the code of {network.model_name} than those of the trace, and "
                f"'{name}' has other units there: plan the edit with such inputs"
            )
    return Edit(network, edit.keep, dropped=edit.dropped, values=edit.values, composed=edit.composed)


def _occurrences(group: Group) -> set[tuple[str, int]]:
    return {(member.parameter, member.axis) for member in group.members}


def _random_like(network: Network, model: nn.Module) -> Inputs:
    """The inputs of the trace with random numbers in floating-point tensors, on the model's device."""
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    meta: Inputs = pytree.tree_map_only(
        Tensor, lambda t: t.to("meta") if t.dtype.is_floating_point else t, network.inputs
    )
    drawn: Inputs = draw(meta, device)
    return drawn


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


def permuted_difference(model: nn.Module, network: Network, example_inputs: object = None, seed: int = 0) -> float:
    """Permute the units of every prunable group wherever it occurs; return the relative change of the output."""
    inputs = _given(example_inputs, model, network)
    network = with_constants(model, network, inputs)
    generator = torch.Generator().manual_seed(seed)
    units = units_in({g.channel: torch.randperm(g.size, generator=generator) for g in network.prunable})
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

"""The one room where tensors change: carry an Edit out on a copy of the model, or on the model itself."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Mapping, Sequence
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from netsurgery.adaptation.attributes import follow
from netsurgery.adaptation.fit_code import fit_code, with_repeats
from netsurgery.adaptation.forwards import Adaptation
from netsurgery.adaptation.model_code import ModelCode
from netsurgery.analysis.tracing import undisturbed
from netsurgery.arguments import expect
from netsurgery.capture.copies import copy_with, like, named_tensors
from netsurgery.capture.paths import is_within
from netsurgery.edit import Edit
from netsurgery.errors import RewriteError
from netsurgery.positions import Positions
from netsurgery.rewriting.added import filled, gradient
from netsurgery.rewriting.data import set_data
from netsurgery.rewriting.dropping import Dropping, dropping_for
from netsurgery.rewriting.kept_weights import rescaled
from netsurgery.rewriting.modules import with_modules
from netsurgery.rewriting.optimizers import OptimizerStates, as_list, averaged
from netsurgery.rewriting.undo import all_or_nothing
from netsurgery.tables import first_of

__all__ = ["check_blocks", "rewrite", "stage_of", "with_same_names"]

Model = TypeVar("Model", bound=nn.Module)
_log = logging.getLogger("netsurgery")


@undisturbed()
def rewrite(
    model: Model,
    edit: Edit,
    *,
    inplace: bool = False,
    optimizer: Optimizer | Sequence[Optimizer] | None = None,
    ema: nn.Module | Sequence[nn.Module] | None = None,
) -> Model:
    """Carry an edit out.

    Args:
        model: the model the edit was planned for, or one of the same shapes; of the same weights if the edit has new
            values. Do not train it in between then.
        inplace: change ``model`` itself; its Parameter objects stay the same objects. Losses computed before
            cannot be differentiated any more, and a DistributedDataParallel must be put around it anew.
        optimizer: of the model, one or several; each stays the same object, so that schedulers and hooks go on. Its
            groups then hold the smaller model's parameters, in the same order with the same settings, and its state is
            cut with the weights: what it keeps of each element (momentum, moments), or averaged over some dimensions of
            a parameter. Copies of units get copies of state; that of new units begins anew. Without ``inplace`` it
            moves from ``model``, which then has no optimizer. A gradient scaler needs nothing.
        ema: averages of the model's weights, one or several: modules of the same names and shapes, or wrapped as
            ``torch.optim.swa_utils.AveragedModel`` does. They are cut in place, and go on with the smaller model;
            where the edit has new values, they are moved by as much as the weights are.

    Returns:
        The model's own class with the same module names and state_dict keys. Its tensors are cut or grown, and
        attributes such as ``in_channels`` follow. Consumers take shares from copies and zeros from new units; copies
        share the gradients of what they are copies of. Where residual blocks are dropped, an ``nn.ModuleList`` or
        ``nn.Sequential`` of them closes the gap if its code allows it (nothing else asks for an element by number):
        keys of what comes after are renumbered (``layers.3.`` becomes ``layers.2.``), and so are the places that layers
        know themselves (``layer_idx``) and ``config.num_hidden_layers``. Else a ``netsurgery.passes.Skipped`` takes the
        block's place and all keys stay. Training mode, hooks, requires_grad, dtype, device, memory format and shared
        weights stay. The entries that stay of a computed weight keep their values: the length of a weight norm is
        scaled so that they do (the norms of other computations lock the units that they are taken over).
        Where the edit rewrites modules after blocks are dropped, in one plan, lists keep a ``Skipped`` in their gaps;
        ``plan`` refuses this order where layers know their places, or ``config.num_hidden_layers`` their number.
        Where it rewrites modules, paths stay, and keys are those of the new modules: of one that is wrapped in an
        ``nn.Sequential``, ``conv.weight`` becomes ``conv.0.weight`` (``edit.diff()`` lists them). A new module has the
        mode, device and dtype of the old one and, where it does not hold it, its hooks; its new parameters join the
        param group of the old one's, and begin without state.
        A module whose code hard-codes a size gets a rewritten ``forward``, in a subclass of its own class: the logger
        ``netsurgery`` names these, ``edit.replaced`` says why.

    Raises:
        RewriteError: the model's tensors are not those of the edit's network, or its code does not follow the new sizes
            (an edit that ``plan`` made has been checked already), or an optimizer's state cannot be cut, or all that
            would stay of a filter with a weight norm are zeros.
        InputError: an optimizer or an average that is none of this model. Whatever is raised, nothing has been changed.

    Example:
        >>> import torch, netsurgery
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
        >>> optimizer = torch.optim.AdamW(model.parameters())
        >>> edit = netsurgery.Edit(netsurgery.trace(model, (torch.randn(1, 4),)), {"0": (0, 2, 5)})
        >>> small = netsurgery.rewrite(model, edit, optimizer=optimizer)
        >>> small[0]
        Linear(in_features=4, out_features=3, bias=True)
        >>> optimizer.param_groups[0]["params"][0] is small[0].weight
        True
    """
    expect("rewrite(model, edit)", "a torch.nn.Module and its Edit", (model, nn.Module), (edit, Edit))
    if edit.first is None:
        return _carried_out(model, edit, inplace, optimizer, ema)
    averages, optimizers = as_list(ema, nn.Module, "ema"), as_list(optimizer, Optimizer, "optimizer")
    stages = edit.stages
    with all_or_nothing([model, *averages], optimizers):
        for stage, later in itertools.pairwise(stages):
            model = _carried_out(model, stage, inplace, optimizers, averages, stage.closes_for(later))
            inplace = True  # the first stage has made a copy
        return _carried_out(model, stages[-1], inplace, optimizers, averages)


def stage_of(model: Model, edit: Edit, later: Edit) -> Model:
    """As ``rewrite``, on a copy, for one stage of an edit: names are those that a later stage is for."""
    return _carried_out(model, edit, close=edit.closes_for(later))


def with_same_names(model: Model, edit: Edit) -> Model:
    """Rewrite a copy whose names all stay: no list closes the gap that a block leaves."""
    return _carried_out(model, edit, close=False)


def _carried_out(
    model: Model,
    edit: Edit,
    inplace: bool = False,
    optimizer: Optimizer | Sequence[Optimizer] | None = None,
    ema: nn.Module | Sequence[nn.Module] | None = None,
    close: bool = True,
) -> Model:
    network, positions = edit.network, edit.positions
    shapes = {name: tuple(axis.size for axis in axes) for name, axes in network.axes.items()}
    tensors = _tensors(model, shapes)
    if edit.values:
        _check_weights(tensors, network.tensors)
    averages = [averaged(one, model, shapes) for one in as_list(ema, nn.Module, "ema")]
    optimizers = as_list(optimizer, Optimizer, "optimizer")
    if edit.modules:
        return with_modules(model, edit, tensors, inplace, optimizers, averages)
    modules: list[nn.Module] = [model, *averages]
    adaptations = [_adaptation(one, edit) for one in modules]
    dropping = check_blocks(model, edit, adaptations, close)
    states = OptimizerStates(optimizers, tensors, edit, not inplace, dropping.renamed)
    new: dict[int, Tensor] = {}
    result = model
    if not inplace:
        values = _valued(tensors, edit, edit.values)
        new = {
            id(t): t if dropping.renamed(name) is None else _copy(t, values.get(name, t), name, edit)
            for name, t in tensors.items()
        }
        result = copy_with(model, new)
    cuts = [_cut_all(dict(named_tensors(one)), edit, positions, _moved(one, edit)) for one in averages]
    if inplace:
        cuts.append(_cut_all(tensors, edit, positions, _valued(tensors, edit, edit.values)))
    # Whatever can be refused has been: from here on things change.
    for cut in cuts:
        _replace(cut)
    states.carry_out(new)
    done: list[nn.Module] = [result, *averages]
    for one, adaptation in zip(done, adaptations, strict=True):
        follow(one, network, network.sizes(edit.counts))
        adaptation.carry_out(one)
        dropping.carry_out(one)
    if reasons := [path for path in adaptations[0].reasons if dropping.renamed(path) is not None]:
        listed = first_of(path or "the model" for path in reasons)
        _log.warning("rewrote the forward of %d modules whose code hard-codes a size: %s", len(reasons), listed)
    return result


def _tensors(model: nn.Module, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Tensor]:
    """The tensors of a model by name, which have the shapes that the edit was made for."""
    tensors = dict(named_tensors(model))
    for name, shape in shapes.items():
        if name not in tensors or tuple(tensors[name].shape) != shape:
            found = tuple(tensors[name].shape) if name in tensors else "missing"
            raise RewriteError(f"the edit is for another model: {name} is {list(shape)} there, {found} here")
    return tensors


def _check_weights(tensors: Mapping[str, Tensor], known: Mapping[str, Tensor]) -> None:
    """Raise RewriteError for a model with other weights than those that new values were computed for."""
    for name, was in known.items():
        if tensors[name] is not was and not torch.equal(tensors[name], was.to(tensors[name])):
            raise RewriteError(
                f"the edit has new values, which are for a model with other weights: '{name}' differs; plan anew"
            )


def _adaptation(model: nn.Module, edit: Edit) -> Adaptation:
    """The changes that the code of a model needs to follow the edit."""
    known = edit.adaptation_for(model)
    if known is not None:
        return known
    code = ModelCode(model)
    adaptation, refused = fit_code(code, edit.network, edit.counts)
    if refused:
        group, why = next(iter(refused.items()))
        raise RewriteError(f"group '{group}' cannot have {edit.counts[group]} units: {why}")
    return with_repeats(code, edit.network, edit.counts, adaptation, edit.dropped)


def check_blocks(model: nn.Module, edit: Edit, adaptations: Sequence[Adaptation], close: bool = True) -> Dropping:
    """Make sure that the model's code works without the blocks that go, and find the way in which they leave.

    Raises:
        RewriteError: it does not, or a forward that is rewritten for new sizes calls one of them.
    """
    for path in [path for adaptation in adaptations for path in adaptation.code]:
        called = [block for block in edit.dropped if block != path and is_within(block, path)]
        if called:
            raise RewriteError(
                f"the forward of '{path}' is rewritten for new sizes and runs '{called[0]}', which goes: remove the "
                "blocks first (rewrite), and plan the rest for the model that is left"
            )
    return dropping_for(model, edit, close)


def _copy(tensor: Tensor, value: Tensor, name: str, edit: Edit) -> Tensor:
    new = like(tensor, _resized(value.to(tensor), name, edit))
    if tensor.is_leaf and tensor.grad is not None:  # another, such as the last result of a weight norm, has none
        new.grad = gradient(tensor.grad, name, edit)
    return new


def _resized(value: Tensor, name: str, edit: Edit) -> Tensor:
    """A tensor of the model with the units that it will have."""
    return filled(edit.positions.cut(value, edit.network.axes[name]), value, name, edit)


Cut = list[tuple[Tensor, Tensor, Tensor | None]]  # a tensor, what it will hold, and what its gradient will be


def _cut_all(tensors: Mapping[str, Tensor], edit: Edit, positions: Positions, values: Mapping[str, Tensor]) -> Cut:
    axes = edit.network.axes
    return [
        (
            old,
            _resized(values[name].to(old) if name in values else old, name, edit),
            gradient(old.grad, name, edit) if old.is_leaf and old.grad is not None else None,
        )
        for name, old in tensors.items()
        if name in axes and (name in values or positions.changes(axes[name]))
    ]


def _moved(average: nn.Module, edit: Edit) -> dict[str, Tensor]:
    """New values of an average of the weights: it changes by as much as the weights do."""
    own = dict(named_tensors(average))
    moved = {
        name: own[name].detach() + (v - edit.network.tensors[name].detach()).to(own[name])
        for name, v in edit.values.items()
    }
    return _valued(own, edit, moved)


def _valued(tensors: Mapping[str, Tensor], edit: Edit, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The edit's new values, and those of parameters with which computed weights keep their entries."""
    return {**values, **rescaled(edit.network, {**tensors, **values}, {n: edit.sources(n) for n in edit.keep})}


def _replace(cut: Cut) -> None:
    """Put the new values into tensors, which stay the same objects."""
    for old, new, grad in cut:
        old.grad = None  # it must have the shape of the tensor at any time
        set_data(old, new)
        old.grad = grad

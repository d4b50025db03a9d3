"""Soft filter pruning in a training loop: filters are set to zero after an epoch, and may return in the next."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from netsurgery.analysis.groups import Group
from netsurgery.arguments import is_count, is_real
from netsurgery.capture.copies import named_tensors
from netsurgery.edit import Edit
from netsurgery.errors import InputError
from netsurgery.passes.filter_positions import (
    Filters,
    Place,
    computed_norms,
    dead_units,
    filters_of_group,
    filters_of_layers,
    leaking_groups,
    norms,
    scale,
)  # fmt: skip
from netsurgery.passes.held_zeros import HeldZeros
from netsurgery.passes.layers import LayerRole
from netsurgery.passes.parameters import own_module
from netsurgery.passes.patterns import Chosen, Modules, Pattern, as_patterns
from netsurgery.passes.remove_dead import RemoveDead
from netsurgery.passes.selection import ANY, belongs, is_touched, one_of_each_product
from netsurgery.passes.soft_schedules import METHODS, Method, hard_share, pruned_share, soft_factor
from netsurgery.pipeline import plan, trace
from netsurgery.rewriting.surgery import rewrite
from netsurgery.tables import columns

__all__ = ["SoftPruning", "hard_share", "pruned_share", "soft_factor"]

_log = logging.getLogger("netsurgery")

Grouping = Literal["layer", "coupled"]
Masks = Mapping[str, Tensor]  # bool, (filters,), by the name of the layer's weight or of the group


class SoftPruning:
    """Prune filters after each epoch of a training loop, by the methods of the family of soft filter pruning.

    After epoch t the filters with the smallest L2 norms are multiplied by a factor, and go on being trained:

    ======  =====================  ===================  =======================
    method  pruned share           factor               share pruned for good
    ======  =====================  ===================  =======================
    sfp     ratio                  0                    none
    asfp    ``pruned_share``       0                    none
    srfp    ratio                  ``soft_factor``      none
    asrfp   ``pruned_share``       ``soft_factor``      none
    hfp     ratio                  0                    all
    ghfp    ratio                  ``soft_factor``      ``hard_share``
    ======  =====================  ===================  =======================

    A filter that is pruned for good has no gradient and no momentum, and is silent until it meets others: its bias, and
    the scale and shift of its norm, are 0 too. After the last epoch's step this holds for all pruned filters, so that
    ``finish`` changes nothing any more.

    Args:
        model: any module, also in DistributedDataParallel or torch.compile; it is traced once.
        example_inputs: as for ``netsurgery.trace``.
        method: see above.
        ratio: the share of the filters of each layer or group that goes, in [0, 1): ``floor(filters * ratio)``.
            One of the groups that are factors of one dimension is cut, as by ``PruneChannels``.
        epochs: the length of the schedule, in calls of ``step``.
        grouping: "layer", the filters of each layer are ranked by themselves; in a residual stream those that not
            all layers have pruned stay, as zeros. "coupled", a filter is a unit of the dependency graph with all
            that produces it, so that the stream becomes narrower too.
        optimizer: the optimizer of the model, or several. Needed where filters are pruned for good before the end:
            otherwise momentum would bring them back.
        asymptotic: "hfp" and "ghfp" only: let the pruned share grow as with "asfp".
        settle: a share of the epochs, at the end, in which the whole ratio is pruned, and for good, so that the
            network gets used to it. 0 is as in the source: only the last step removes filters that came back. On the
            digits (15 epochs, half of the filters) that costs up to 6 points of accuracy, and 0.2 costs nothing.
        before_training: ``step(-1)`` prunes before the first epoch, as the authors of SFP do; "sfp" and "hfp" only, as
            the others prune nothing then.
        roles: "layer" only: which layers take part: "convolution", "linear", "shortcut".
        include: modules, by name patterns (``layer3.*``), classes or themselves; filters that they alone make are
            pruned.
        exclude: likewise; filters that these make are not.

    Raises:
        InputError: an argument out of range, a pattern that matches nothing, nothing to prune, weights on the meta
            device or sharded, or an optimizer that does not hold them.
        TraceError: as for ``netsurgery.trace``.

    Example:
        >>> import torch
        >>> from netsurgery.models import resnet20
        >>> from netsurgery.passes import SoftPruning
        >>> x, model = torch.randn(2, 3, 32, 32), resnet20(widths=(4, 8, 16))
        >>> optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
        >>> pruning = SoftPruning(model, x, method="sfp", ratio=0.25, epochs=2, grouping="coupled")
        >>> for epoch in range(2):
        ...     model(x).square().mean().backward()  # an epoch of training
        ...     optimizer.step()
        ...     pruning.step(epoch)
        >>> pruning.finish().stages[2][0].conv1
        Conv2d(6, 12, kernel_size=(3, 3), stride=(2, 2), padding=(1, 1), bias=False)

    Source: SFP and ASFP: He et al., arXiv 1808.06866 and 1808.07471; SRFP and ASRFP: Cai et al., arXiv 2010.09498; HFP
    and GHFP: arXiv 2011.03170: per layer, on the kernels of convolutions. Ours: "coupled"; ``settle``; zeros in biases
    and norms of filters that are pruned for good. A soft filter keeps these, as in the source: with scale and shift at
    0 before a ReLU no gradient would ever bring it back. So it still passes a constant on, which the source's small
    networks lose at the very end, without notice. ``silenced`` shows the network without it at any time.
    """

    def __init__(
        self,
        model: nn.Module,
        example_inputs: object = None,
        *,
        method: Method = "asfp",
        ratio: float,
        epochs: int,
        grouping: Grouping = "layer",
        optimizer: Optimizer | Sequence[Optimizer] = (),
        asymptotic: bool | None = None,
        settle: float = 0.0,
        before_training: bool = False,
        roles: Sequence[LayerRole] = ("convolution",),
        include: Modules = (),
        exclude: Modules = (),
    ):
        _check(method, ratio, epochs, grouping, asymptotic, settle, roles)
        self.method, self.ratio, self.epochs, self.grouping, self.settle = method, ratio, int(epochs), grouping, settle
        own = METHODS[method]
        self._schedule = own if asymptotic is None else replace(own, asymptotic=asymptotic)
        self.asymptotic = self._schedule.asymptotic
        self.before_training = before_training
        if before_training and (self.asymptotic or own.softer):
            growing = " with asymptotic=True" if asymptotic else ""
            raise InputError(
                f"SoftPruning(before_training=True): for 'sfp' and 'hfp'; '{method}'{growing} prunes nothing before "
                "the first epoch"
            )
        self.epoch = self._first - 1  # the last epoch done
        self._model = _unwrapped(model)
        self._optimizers = [optimizer] if isinstance(optimizer, Optimizer) else list(optimizer)
        with torch.inference_mode(False):
            self._network = trace(self._model, example_inputs)
            self._leaks = leaking_groups(self._model, self._network)
        self._filters = self._chosen(as_patterns(include), as_patterns(exclude), roles)
        if not self._filters:
            raise InputError(
                f"SoftPruning: nothing of {self._network.model_name} takes part with these settings. {self._locked()}"
                f"Its groups:\n{self._network}"
            )
        self.pruned: dict[str, Tensor] = {n: torch.zeros(f.size, dtype=torch.bool) for n, f in self._filters.items()}
        self.hard: dict[str, Tensor] = dict(self.pruned)
        self._zeros = HeldZeros()
        if own.hard is not None or settle:
            self._check_optimizers()

    @property
    def schedule(self) -> tuple[float, float, float]:
        """The pruned share, the factor of soft filters and the share pruned for good after the last epoch done."""
        return (
            self._schedule.at(self.epoch, self.epochs, self.ratio, self.settle)
            if self.epoch >= self._first
            else (0.0, 1.0, 0.0)
        )

    @property
    def _first(self) -> int:
        """The first epoch that ``step`` takes; -1 stands for the time before training."""
        return -1 if self.before_training else 0

    def step(self, epoch: int) -> None:
        """Prune after an epoch of training.

        Args:
            epoch: from 0 to epochs - 1, ascending; some may be left out, such as all but the last to end early. With
                ``before_training`` from -1, which comes before the first.

        Raises:
            InputError: an epoch that was done or that there is not, or weights that are not finite or of other shapes.
        """
        if not is_count(epoch) or not self.epoch < epoch < self.epochs:
            left = f"expected an epoch from {self.epoch + 1} to {self.epochs - 1}"
            raise InputError(
                f"SoftPruning.step({epoch!r}): "
                + (left if self.epoch + 1 < self.epochs else f"all {self.epochs} epochs are done: call finish()")
            )
        tensors = self._tensors()
        share, factor, hard = self._schedule.at(int(epoch), self.epochs, self.ratio, self.settle)
        computed = computed_norms(self._network, tensors) if self.grouping == "coupled" else {}
        masks = {
            name: self._ranked(filters, computed[name] if name in computed else norms(filters, tensors), share, hard)
            for name, filters in self._filters.items()
        }
        self.pruned = {name: pruned for name, (pruned, _) in masks.items()}
        self.hard = {name: gone for name, (_, gone) in masks.items()}
        for name, filters in self._filters.items():
            soft = self.pruned[name] & ~self.hard[name]
            for place in filters.weights:
                scale(tensors[place.parameter], place.axis, place.positions(soft), factor)
        self.epoch = int(epoch)
        self._hold()

    @contextlib.contextmanager
    def silenced(self) -> Iterator[nn.Module]:
        """The model as ``finish`` would leave it if this were the end, for as long as the context lasts.

        Example:
            >>> import torch
            >>> from netsurgery.passes import SoftPruning
            >>> model = torch.nn.Sequential(torch.nn.Conv2d(1, 4, 1), torch.nn.ReLU(), torch.nn.Conv2d(4, 1, 1))
            >>> pruning = SoftPruning(model, torch.zeros(1, 1, 2, 2), method="srfp", ratio=0.5, epochs=10)
            >>> pruning.step(0)
            >>> with pruning.silenced():
            ...     print(int(model[0].weight.count_nonzero()))
            2
            >>> print(int(model[0].weight.count_nonzero()))
            4
        """
        tensors, places = self._tensors(), self._places(self.pruned)
        kept = {name: tensors[name].detach().clone() for name, _ in places}
        for (name, axis), positions in places.items():
            scale(tensors[name], axis, positions, 0)
        try:
            yield self._model
        finally:
            with torch.no_grad():
                for name, value in kept.items():
                    tensors[name].copy_(value)

    def plan(self) -> Edit:
        """The removal that ``finish`` would make now: an Edit to look at, or to carry out with ``netsurgery.rewrite``.

        Some pruned filters stay: in "layer", units of a residual stream that not all its layers have pruned.
        """
        gone = self._places(self.pruned)
        dead = {group.name: dead_units(self._network, group, gone) for group in self._removable()}
        inputs = self._network.inputs[0] or self._network.inputs[1]
        edit = plan(self._model, [RemoveDead({name: tuple(units.tolist()) for name, units in dead.items()})], inputs)
        for name, units in dead.items():
            if bool(units.any()) and (reason := edit.network[name].locked) is not None:
                _log.warning("%d units of '%s' are pruned but stay, as zeros: %s", int(units.sum()), name, reason)
        return edit

    def finish(self, **options: Any) -> nn.Module:
        """The physically smaller network: it computes what the model computes after the last step.

        Pruned filters are set to zero once more, should training have gone on; the optimizer is released.

        Args:
            options: as for ``netsurgery.rewrite``.

        Raises:
            InputError: the last epoch's step is still to come.
        """
        if self.epoch != self.epochs - 1:
            raise InputError(
                f"SoftPruning.finish: step({self.epochs - 1}) is still to come, the last was {max(self.epoch, -1)}: "
                "call it to end here"
            )
        self._hold()
        edit = self.plan()
        self.close()
        return rewrite(self._model, edit, **options)

    def close(self) -> None:
        """Let go of the parameters and the optimizer: what is pruned for good may be trained again."""
        self._zeros.release()

    def state_dict(self) -> dict[str, object]:
        """The last epoch done, and what is pruned."""
        return {
            "settings": self._settings,
            "epoch": self.epoch,
            "pruned": dict(self.pruned),
            "hard": dict(self.hard),
        }

    @property
    def _settings(self) -> dict[str, object]:
        names = ("method", "ratio", "epochs", "grouping", "asymptotic", "settle", "before_training")
        return {name: getattr(self, name) for name in names}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from there. Load the model and the optimizer too, before or after.

        Raises:
            InputError: the state is of other settings or other filters, or of an epoch that there is not.
        """
        if missing := [name for name in ("settings", "epoch", "pruned", "hard") if name not in state]:
            raise InputError(f"SoftPruning.load_state_dict: the state has no '{missing[0]}': pass one of state_dict()")
        settings = {"before_training": False, **state["settings"]}  # older states lack it
        for name, own in self._settings.items():
            if (there := settings.get(name)) != own:
                raise InputError(f"SoftPruning.load_state_dict: the state is of {name}={there!r}, here it is {own!r}")
        for name in ("pruned", "hard"):
            found = {key: len(mask) for key, mask in state[name].items()}
            wanted = {key: filters.size for key, filters in self._filters.items()}
            if found != wanted:
                other = next(key for key in {**wanted, **found} if found.get(key) != wanted.get(key))
                raise InputError(
                    f"SoftPruning.load_state_dict: the state is of other filters: {other} has "
                    f"{found.get(other, 'none')} there, {wanted.get(other, 'none')} here"
                )
        if not self._first - 1 <= state["epoch"] < self.epochs:
            raise InputError(f"SoftPruning.load_state_dict: epoch {state['epoch']} is not one of {self.epochs}")
        self.epoch = int(state["epoch"])
        self.pruned, self.hard = ({k: m.to("cpu", torch.bool) for k, m in state[n].items()} for n in ("pruned", "hard"))
        self._hold(only_watch=True)

    def __str__(self) -> str:
        rows = [
            (name, str(filters.size), str(int(self.pruned[name].sum())), str(int(self.hard[name].sum())))
            for name, filters in self._filters.items()
        ]
        what = "weight" if self.grouping == "layer" else "group"
        return (
            f"{self.method}, {self.grouping}, ratio {self.ratio:g}, {max(self.epoch + 1, 0)} of {self.epochs} epochs "
            f"done. {self._locked()}\n{columns([(what, 'filters', 'pruned', 'for good'), *rows], right=(1, 2, 3))}"
        )

    def _ranked(self, filters: Filters, sizes: Tensor, share: float, hard: float) -> tuple[Tensor, Tensor]:
        """True for the filters that are pruned, and for those of them that are pruned for good: ``(filters,)``.

        Args:
            sizes: the norms of their weights; written to.
        """
        if not bool(sizes.isfinite().all()):
            raise InputError(f"SoftPruning.step: weights of {filters.name} are NaN or infinite: training went astray")
        sizes[self.hard[filters.name]] = -1  # those come first, also among others that are zero
        order = sizes.sort(stable=True).indices
        masks = torch.zeros(2, filters.size, dtype=torch.bool)
        masks[0, order[: int(filters.size * share + 1e-9)]] = True
        masks[1, order[: int(filters.size * share * hard + 1e-9)]] = True
        return masks[0], masks[1]

    def _chosen(
        self, include: tuple[Pattern, ...], exclude: tuple[Pattern, ...], roles: Sequence[str]
    ) -> dict[str, Filters]:
        """The filters that take part, in the order of the state dict."""
        included, excluded = Chosen(self._network, include), Chosen(self._network, exclude)
        if self.grouping == "layer":
            listed = filters_of_layers(self._network).values()
            return {
                filters.name: filters
                for layer, filters in listed
                if layer.role in roles and (not include or layer.module in included) and layer.module not in excluded
            }
        groups = [
            group
            for group in self._removable()
            if group.unit in ANY
            and (not include or belongs(group, included, include))
            and not is_touched(group, excluded)
        ]
        found = {
            g.name: filters_of_group(self._network, g) for g in one_of_each_product(self._network, groups).values()
        }
        return {name: filters for name, filters in found.items() if filters.weights}

    def _removable(self) -> list[Group]:
        return [group for group in self._network.prunable if group.name not in self._leaks]

    def _locked(self) -> str:
        listed = ", ".join(self._leaks)
        return f"Units of these would not be nothing if their weights were zero: {listed}. " if listed else ""

    def _places(self, chosen: Masks) -> dict[tuple[str, int], Tensor]:
        """True at the positions along axes of parameters where zeros silence the chosen filters."""
        found: dict[tuple[str, int], Tensor] = {}

        def add(places: Sequence[Place], units: Tensor) -> None:
            for place in places:
                key, positions = (place.parameter, place.axis), place.positions(units)
                found[key] = found[key] | positions if key in found else positions

        for name, filters in self._filters.items():
            add((*filters.weights, *filters.carriers), chosen[name])
        for group in self._removable():  # carriers behind several layers go once none of these produces the unit
            add(filters_of_group(self._network, group).carriers, dead_units(self._network, group, found))
        return {key: positions for key, positions in found.items() if bool(positions.any())}

    def _tensors(self) -> dict[str, Tensor]:
        """The parameters as they are now.

        Raises:
            InputError: they have other shapes than when the model was traced, or are sharded.
        """
        tensors = dict(named_tensors(self._model))
        for name in dict.fromkeys(p.parameter for f in self._filters.values() for p in (*f.weights, *f.carriers)):
            wanted, found = self._network.tensors[name].shape, tensors[name].shape if name in tensors else None
            if wanted != found:
                raise InputError(
                    f"SoftPruning: {name} had shape {tuple(wanted)} and has {found and tuple(found)} now: "
                    "build it again after surgery"
                )
        _check_data(tensors)
        return tensors

    def _hold(self, *, only_watch: bool = False) -> None:
        """Set what is pruned for good to zero, and keep it so."""
        self.close()
        self._zeros.hold(self._tensors(), self._places(self.hard), self._optimizers, only_watch=only_watch)

    def _check_optimizers(self) -> None:
        if not self._optimizers:
            raise InputError(
                f"SoftPruning(method='{self.method}', settle={self.settle:g}) prunes filters for good while training "
                "goes on: pass optimizer=, or momentum would bring them back"
            )
        owned = {id(p) for one in self._optimizers for group in one.param_groups for p in group["params"]}
        tensors = self._tensors()
        for filters in self._filters.values():
            for place in filters.weights:
                if tensors[place.parameter].requires_grad and id(tensors[place.parameter]) not in owned:
                    raise InputError(
                        f"SoftPruning: the optimizer does not hold {place.parameter}: pass the one that does"
                    )


def _check(
    method: str, ratio: float, epochs: int, grouping: str, asymptotic: bool | None, settle: float, roles: Sequence[str]
) -> None:
    if method not in tuple(METHODS):
        raise InputError(f"SoftPruning(method={method!r}): one of {', '.join(METHODS)}")
    if grouping not in get_args(Grouping):
        raise InputError(f"SoftPruning(grouping={grouping!r}): 'layer' or 'coupled'")
    if not (is_real(ratio) and 0 <= ratio < 1):
        raise InputError(f"SoftPruning(ratio={ratio!r}): the share of filters that goes must be a number in [0, 1)")
    if not is_count(epochs, 1):
        raise InputError(f"SoftPruning(epochs={epochs!r}): expected a whole number of at least 1")
    if not (is_real(settle) and 0 <= settle <= 1):
        raise InputError(f"SoftPruning(settle={settle!r}): the share of epochs must be a number in [0, 1]")
    if asymptotic is not None and METHODS[method].hard is None:
        raise InputError(
            f"SoftPruning(asymptotic={asymptotic!r}): for 'hfp' and 'ghfp'; '{method}' says it by its name"
        )
    if isinstance(roles, str) or not set(roles) <= {"convolution", "linear", "shortcut"}:
        raise InputError(f"SoftPruning(roles={roles!r}): expected a list of 'convolution', 'linear', 'shortcut'")


def _unwrapped(model: nn.Module) -> nn.Module:
    """The user's own module, with weights that can be ranked."""
    model = own_module(model)
    if isinstance(model, nn.Module):
        _check_data(dict(named_tensors(model)))
    return model


def _check_data(tensors: Mapping[str, Tensor]) -> None:
    for name, tensor in tensors.items():
        if isinstance(tensor, nn.Parameter) and tensor.is_meta:
            raise InputError(f"SoftPruning: {name} is on the meta device: filters are ranked by their weights")
        if getattr(tensor, "placements", None) is not None:
            raise InputError(f"SoftPruning: {name} is sharded, which is not supported: use DistributedDataParallel")

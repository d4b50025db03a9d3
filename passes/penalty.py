"""Hierarchical group sparse regularisation in a training loop."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn

from netsurgery.arguments import is_real
from netsurgery.errors import InputError
from netsurgery.kernels.criteria import Name, accumulator
from netsurgery.kernels.placed import PLAIN, Placed, widest
from netsurgery.kernels.sparsity import add_gradient, values
from netsurgery.passes.layers import ROLES, Grouping, LayerRole, check_choice, layers, outer_groups
from netsurgery.passes.parameters import Parameters, own_module
from netsurgery.passes.patterns import Chosen, Modules, as_patterns
from netsurgery.pipeline import trace
from netsurgery.tables import columns

__all__ = ["HGSR"]


class HGSR:
    """The training penalty ``strength * ((1 - l1_ratio) * R(W) + l1_ratio * sum |w|)`` over the layers of a model.

    Call it for a differentiable scalar to add to the loss; or call ``add_gradient`` after ``backward``, which needs no
    graph. ``print(penalty)`` lists the layers, which of them take part and in how many outer groups.

    Args:
        model: any module; it is traced once, and its parameters are looked up by name at each call. Build the penalty
            before ``fully_shard`` and, in each step, call it after the model; a model in DistributedDataParallel or
            torch.compile may be given as it is.
        example_inputs: as for ``netsurgery.trace``.
        criterion: one of the ten of the paper.
        grouping: "feature", an outer group for each input channel of each layer; "neuron", for each output channel;
            "coupled", for each unit of each group that can be pruned, over all layers that read it.
        strength: a number, or a function of the number of ``step`` calls so far that returns one.
        l1_ratio: the share of plain L1, in [0, 1].
        roles: which layers take part: "convolution", "linear", "shortcut" (a convolution beside a residual branch) and
            "classifier" (a layer that no other follows). None: all if grouping is "coupled", else the first two.
        include: modules, by name patterns (``layer3.*``), classes or themselves; only layers in these take part.
        exclude: likewise; layers in these do not.

    Raises:
        InputError: an argument out of range, a pattern that matches nothing, or no layer that takes part.
        TraceError: as for ``netsurgery.trace``.

    Example:
        >>> import torch
        >>> from netsurgery.passes import HGSR
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
        >>> penalty = HGSR(model, grouping="coupled", strength=1e-3)
        >>> (model(torch.ones(1, 4)).sum() + penalty()).backward()
        >>> print(penalty)
        hierarchical_sq_group_l12, coupled, strength 0.001, l1_ratio 0.5: 2 of 2 layers, 8 outer groups
        weight    shape  role        outer groups
        0.weight  8x4    linear                 0
        2.weight  2x8    classifier             8

    Source: Mitsuno, Miyao, Kurita, arXiv 2004.04394: feature-wise and neuron-wise, strength 1e-3, l1_ratio 0.5, over
    all convolutions but those of shortcuts (``roles=["convolution"]``). Hidden linear layers, "coupled" and schedules
    are ours. A weight "computed" from several parameters (weight norm, low-rank updates) never takes part.
    """

    def __init__(
        self,
        model: nn.Module,
        example_inputs: object = None,
        *,
        criterion: Name = "hierarchical_sq_group_l12",
        grouping: Grouping = "feature",
        strength: float | Callable[[int], float] = 1e-3,
        l1_ratio: float = 0.5,
        roles: Sequence[LayerRole] | None = None,
        include: Modules = (),
        exclude: Modules = (),
    ):
        check_choice("HGSR", criterion, grouping)
        if not (is_real(l1_ratio) and 0 <= l1_ratio <= 1):
            raise InputError(f"HGSR(l1_ratio={l1_ratio!r}): the share of plain L1 must be a number in [0, 1]")
        if roles is None:
            roles = ROLES if grouping == "coupled" else ("convolution", "linear")
        if isinstance(roles, str) or not set(roles) <= set(ROLES):
            raise InputError(f"HGSR(roles={roles!r}): expected a list of {', '.join(map(repr, ROLES))}")
        model = _unwrapped(model)
        with torch.inference_mode(False):
            network = trace(model, example_inputs)
        included, excluded = (Chosen(network, as_patterns(given)) for given in (include, exclude))
        self.criterion, self.grouping, self._l1_ratio = criterion, grouping, l1_ratio
        found = layers(network)
        self._rows: dict[str, tuple[str, str, str]] = {
            layer.name: (layer.name, "x".join(map(str, layer.shape)), layer.role) for layer in found
        }
        for member in (member for group in network.groups for member in group.members if member.role == "consumes"):
            shape = network.tensors[member.parameter].shape  # read in a way that the weight's own axes do not show
            if len(shape) > 1 and member.parameter not in self._rows:
                self._rows[member.parameter] = (member.parameter, "x".join(map(str, shape)), "unknown")
        chosen = [
            layer
            for layer in found
            if layer.role in roles and (not included.paths or layer.module in included) and layer.module not in excluded
        ]
        if not chosen:
            raise InputError(f"HGSR: no layer of {network.model_name} takes part. Its layers:\n{self._table({})}")
        self._groups = outer_groups(network, chosen, grouping)
        if grouping == "coupled" and not self._groups.total:
            raise InputError(
                f"HGSR: no layer that takes part reads a group of {network.model_name} that can be pruned. "
                f"Its groups:\n{network}"
            )
        self._layout = self._groups.layout
        self._parameters = Parameters(model, [layer.name for layer in self._groups.layers])
        self._placed: Placed[Tensor] | None = None  # the weights as they were looked at last, and what is kept for them
        self._factors = torch.zeros(2, dtype=torch.float64)
        self._set(strength, 0)
        self._weights()

    @property
    def layers(self) -> tuple[str, ...]:
        """The state_dict names of the weights that take part."""
        return tuple(dict.fromkeys(layer.name for layer in self._groups.layers))

    @property
    def strength(self) -> float | Callable[[int], float]:
        """The factor of the penalty: a number, or a function of the number of steps that is called at each ``step``."""
        return self._strength

    @strength.setter
    def strength(self, strength: float | Callable[[int], float]) -> None:
        self._set(strength, self.steps)

    @property
    def l1_ratio(self) -> float:
        """The share of plain L1."""
        return self._l1_ratio

    def __call__(self) -> Tensor:
        """The penalty: a scalar of float32 (float64 if a weight is), differentiable once."""
        weights = self._weights()
        # A copy, since a step of the schedule may come before backward. Where it is compiled nothing is kept: the
        # memory of a CUDA graph is overwritten by the next run.
        factors = self._factors.to(weights[0].device, widest(weights), copy=True)
        return (values(weights, self._layout, self.criterion) * factors).sum()

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def add_gradient(self, scale: float = 1.0) -> Tensor:
        """Add the penalty's gradient to that of the parameters in place, and return the penalty.

        Parameters that require no gradient get none. Under ``fully_shard`` with a MixedPrecisionPolicy this is the way
        to be exact: the penalty in the loss reads some weights in low precision.

        Args:
            scale: a factor of the gradient: a GradScaler's ``get_scale()`` where the gradients there are scaled still.

        Raises:
            InputError: a weight is no parameter that an optimizer holds: computed from others, or not sharded just now.
            ValueError: a gradient is placed on the ranks otherwise than its weight.
        """
        weights = self._weights()
        self._check_parameters(weights)
        outs = [weight.grad if weight.requires_grad else None for weight in weights]
        if any(out is None for out in outs):
            for weight in weights:
                if weight.requires_grad and weight.grad is None:
                    weight.grad = torch.zeros_like(weight)
            outs = [weight.grad if weight.requires_grad else None for weight in weights]
        factors = self._factors if scale == 1 else self._factors * scale
        found = add_gradient(weights, self._layout, self.criterion, factors, outs)
        return (found * self._factors).sum()

    def step(self) -> None:
        """Go on to the next step of the strength's schedule."""
        self.load_state_dict({"steps": self.steps + 1})

    def state_dict(self) -> dict[str, int]:
        """The step that the schedule has come to."""
        return {"steps": self.steps}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Continue the schedule from there."""
        self._set(self._strength, state["steps"])

    def _set(self, strength: float | Callable[[int], float], steps: int) -> None:
        now = strength(steps) if callable(strength) else strength
        if not (is_real(now) and 0 <= now < float("inf")):
            raise InputError(f"HGSR: a strength of {now!r} at step {steps}: expected a number of at least 0")
        self._strength, self.steps, self.now = strength, steps, float(now)
        factors = [self.now * (1 - self.l1_ratio), self.now * self.l1_ratio]
        self._factors.copy_(torch.tensor(factors, dtype=torch.float64))  # compiled code reads them there

    def __getstate__(self) -> dict[str, object]:
        return {**self.__dict__, "_placed": None}  # what is kept for the weights is of no use to a copy

    def __str__(self) -> str:
        counts = dict.fromkeys(self.layers, 0)
        for layer, count in zip(self._groups.layers, self._groups.counts, strict=True):
            counts[layer.name] += count
        return (
            f"{self.criterion}, {self.grouping}, strength {self.now:g}, l1_ratio {self.l1_ratio:g}: "
            f"{len(counts)} of {len(self._rows)} layers, {self._groups.total:,} outer groups\n{self._table(counts)}"
        )

    def _table(self, counts: Mapping[str, int]) -> str:
        """One row for each layer; those without a count do not take part."""
        rows = [(*row, f"{counts[name]:,}" if name in counts else "-") for name, row in self._rows.items()]
        return columns([("weight", "shape", "role", "outer groups"), *rows], right=(3,))

    def _weights(self) -> list[Tensor]:
        """The parameters as they are now; buffers of the penalty follow them to their device and type."""
        weights = self._parameters()
        if torch.compiler.is_compiling() or not all(type(one) in PLAIN for one in weights):
            self._check_shapes(weights)
            if not torch.compiler.is_compiling():
                self._move(weights[0].device, accumulator(*weights))
            return weights
        if self._placed is None or not self._placed.still(weights):
            self._check_shapes(weights)
            self._move(weights[0].device, accumulator(*weights))
            self._placed = Placed(weights)
        return self._placed

    def _check_shapes(self, weights: Sequence[Tensor]) -> None:
        for layer, weight in zip(self._groups.layers, weights, strict=True):
            if weight.shape != layer.shape:
                raise InputError(
                    f"HGSR: {layer.name} had shape {tuple(layer.shape)} and has {tuple(weight.shape)} now: build the "
                    "penalty again after pruning; to shard the parameters, use fully_shard"
                )

    def _move(self, device: torch.device, dtype: torch.dtype) -> None:
        if device.type == "meta" or (self._factors.device == device and self._factors.dtype == dtype):
            return  # what goes to the meta device would not come back
        with torch.inference_mode(False):  # what is made here is used in training too
            self._layout = self._layout.to(device)
            self._factors = torch.zeros(2, dtype=dtype, device=device)
            self._set(self._strength, self.steps)

    def _check_parameters(self, weights: Sequence[Tensor]) -> None:
        """Make sure that weights are parameters that an optimizer holds: what is added to other gradients is lost."""
        if torch.is_inference_mode_enabled():
            raise InputError("HGSR.add_gradient: gradients made in inference mode are of no use: call it outside")
        computed = [i for i, weight in enumerate(weights) if not weight.is_leaf]
        if computed:
            raise InputError(
                f"HGSR.add_gradient: {self._groups.layers[computed[0]].name} is computed from other parameters: "
                "add the penalty to the loss"
            )
        if isinstance(weights, Placed) and HGSR in weights.kept:
            return  # they were looked at before
        for layer, weight, sharded in zip(self._groups.layers, weights, self._parameters.sharded(), strict=True):
            if sharded and getattr(weight, "placements", None) is None:
                raise InputError(
                    f"HGSR.add_gradient: {layer.name} is not sharded now, but its module is: call it after backward, "
                    "when fully_shard has sharded the parameters again, or add the penalty to the loss"
                )
        if isinstance(weights, Placed):
            weights.kept[HGSR] = True


def _unwrapped(model: nn.Module) -> nn.Module:
    """The user's own module, which is not sharded yet."""
    model = own_module(model)
    if any(getattr(parameter, "placements", None) is not None for parameter in model.parameters()):
        raise InputError(
            "HGSR: the parameters are sharded already: build the penalty before fully_shard; it follows them"
        )
    return model

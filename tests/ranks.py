"""What must hold when a penalty is used by several processes. One of them runs every check here, on every rank:

    python tests/ranks.py SIZE CHECK...

prints a line for each check that has passed on all ranks, and stops at the first that fails.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Callable, Iterator
from datetime import timedelta
from functools import cache
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

from netsurgery.errors import InputError
from netsurgery.passes import HGSR

GROUPINGS = ("feature", "neuron", "coupled")
TOLERANCE = 1e-12  # relative, in float64
STEPS = 2
ROLES = ("convolution", "linear", "shortcut", "classifier")


class Net(nn.Sequential):
    """Whole, grouped and depthwise kernels; rows that no number of ranks divides, and fewer rows than ranks."""

    def __init__(self) -> None:
        super().__init__(
            nn.Conv2d(3, 10, 3, padding=1), nn.ReLU(),
            nn.Conv2d(10, 10, 3, padding=1, groups=10), nn.ReLU(),
            nn.Conv2d(10, 6, 3, groups=2), nn.ReLU(),
            nn.ConvTranspose2d(6, 6, 2, groups=3), nn.ReLU(),
            nn.Conv2d(6, 1, 1), nn.Flatten(),
            nn.Linear(49, 3), nn.Tanh(), nn.Linear(3, 5),
        )  # fmt: skip


def net() -> Net:
    torch.manual_seed(0)
    model = Net().double()
    with torch.no_grad():
        model[2].weight[3] = 0  # a kernel, an input channel and an outer group of zeros
        model[0].weight[:, 1] = 0
        model[10].weight[:, 7] = 0
    return model


def batch() -> tuple[Tensor, Tensor]:
    torch.manual_seed(1)
    return torch.randn(12, 3, 8, 8, dtype=torch.float64), torch.randn(12, 5, dtype=torch.float64)


def mine(tensor: Tensor) -> Tensor:
    """This rank's part of a batch."""
    return tensor.chunk(dist.get_world_size())[dist.get_rank()]


def whole(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def penalty_of(model: nn.Module, grouping: str = "feature", **options: Any) -> HGSR:
    options = {"strength": lambda step: 0.1 * (step + 1), "roles": ROLES, **options}
    return HGSR(model, batch()[0], grouping=grouping, **options)


def step(model: nn.Module, penalty: HGSR, how: str, x: Tensor, y: Tensor) -> Tensor:
    """Gradients of one step, and the penalty's value."""
    model.zero_grad()
    if how == "alone":  # no other loss: also where this rank holds nothing of what is penalised
        value = penalty()
        value.backward()
        return value.detach()
    loss = (model(x) - y).square().mean()
    if how == "loss":
        value = penalty()
        (loss + value).backward()
        return value.detach()
    loss.backward()
    return penalty.add_gradient()


def train(model: nn.Module, penalty: HGSR, how: str, x: Tensor, y: Tensor) -> Iterator[Tensor]:
    """The penalty's value at each step of a few."""
    optimizer = torch.optim.SGD(model.parameters(), 1e-3, momentum=0.9)
    for _ in range(STEPS):
        yield step(model, penalty, how, x, y)
        optimizer.step()
        penalty.step()


def equal(found: Tensor, expected: Tensor, what: str) -> None:
    scale = max(float(expected.abs().max()), 1.0)
    assert found.shape == expected.shape, what
    error = float((found - expected).detach().abs().max()) / scale
    assert error < TOLERANCE, f"{what}: off by {error:.1e}"


def same_everywhere(value: Tensor) -> None:
    found = [torch.empty_like(value) for _ in range(dist.get_world_size())]
    dist.all_gather(found, value)
    assert all(torch.equal(one, value) for one in found), f"not the same on every rank: {found}"


@cache
def in_one_process(alone: bool, grouping: str, options: tuple[tuple[str, Any], ...]) -> list[tuple[Tensor, ...]]:
    """At each step the penalty's value, and a gradient (NaN for none) and a value for each parameter."""
    model = net()
    penalty = penalty_of(model, grouping, **dict(options))
    found = []
    for value in train(model, penalty, "alone" if alone else "loss", *batch()):
        grads = [
            torch.full_like(one, torch.nan) if one.grad is None else one.grad.clone() for one in model.parameters()
        ]
        found.append((value, *grads, *(one.detach().clone() for one in model.parameters())))
    return found


def as_in_one_process(spread: Callable[[Net], nn.Module], how: str, grouping: str, **options: Any) -> None:
    """Values, gradients and parameters while training, against those of a model that is not spread over ranks."""
    model = net()
    penalty = penalty_of(model, grouping, **options)
    wrapped = spread(model)
    expected = in_one_process(how == "alone", grouping, tuple(options.items()))
    found = train(wrapped, penalty, how, *map(mine, batch()))
    for now, (value, *others) in zip(found, expected, strict=True):
        same_everywhere(now)
        equal(now, value, "value")
        both = zip(model.named_parameters(), others[: len(others) // 2], others[len(others) // 2 :], strict=True)
        for (name, parameter), grad, data in both:
            what = f"{how}, {grouping}, {options}: {name}"
            if grad.isnan().all():
                assert parameter.grad is None, what
            else:
                equal(whole(parameter.grad), grad, f"gradient of {what}")
            equal(whole(parameter.detach()), data, what)


# Checks ----------------------------------------------------------------------------------------------------------


def layer_by_layer(model: Net, **options: Any) -> Net:
    for place in (2, 4, 10):
        fully_shard(model[place], **options)
    fully_shard(model, **options)
    return model


def ddp() -> None:
    for how, grouping in (("loss", "feature"), ("add", "coupled")):
        as_in_one_process(DistributedDataParallel, how, grouping)
    model = DistributedDataParallel(net())
    assert penalty_of(model).layers == penalty_of(net()).layers


def fsdp() -> None:
    for how, grouping, options in (
        ("loss", "feature", {}),
        ("add", "neuron", {"l1_ratio": 0.0}),
        ("loss", "coupled", {}),
    ):
        as_in_one_process(layer_by_layer, how, grouping, **options)


def fsdp_everything() -> None:
    for how, grouping, ratio in product(("loss", "add"), GROUPINGS, (0.0, 0.5)):
        as_in_one_process(layer_by_layer, how, grouping, l1_ratio=ratio)


def fsdp_criteria() -> None:
    for criterion in ("l1", "group_lasso", "hierarchical_sqrt_exclusive", "hierarchical_sqrt_group_l12"):
        as_in_one_process(layer_by_layer, "loss", "coupled", criterion=criterion)


def fsdp_kept_whole() -> None:
    """Parameters that stay whole between forward and backward, all or only those of the root."""
    for how, keep in product(("loss", "add"), (True, False)):
        as_in_one_process(lambda model, keep=keep: layer_by_layer(model, reshard_after_forward=keep), how, "neuron")


def nothing_here() -> None:
    """All that is penalised is on the first rank: the others have a value and (empty) gradients as well."""
    for how in ("alone", "add"):
        as_in_one_process(layer_by_layer, how, "neuron", include="8")


def frozen() -> None:
    def partly(model: Net) -> Net:
        model[4].weight.requires_grad_(False)
        return layer_by_layer(model)

    for how in ("loss", "add"):
        model = net()
        penalty = penalty_of(model)
        step(partly(model), penalty, how, *map(mine, batch()))
        assert model[4].weight.grad is None and model[2].weight.grad is not None


def replicated() -> None:
    """Hybrid sharding: over one axis of the mesh copies, over the other parts."""
    size = dist.get_world_size()
    copies = size if size % 2 else 2
    for how, shape in (("loss", (copies, size // copies)), ("add", (1, size))):
        mesh = init_device_mesh("cpu", shape, mesh_dim_names=("copies", "parts"))
        as_in_one_process(lambda model, mesh=mesh: layer_by_layer(model, mesh=mesh), how, "feature")


def mesh() -> DeviceMesh:
    return init_device_mesh("cpu", (dist.get_world_size(),))


def sharded(model: Net, places: dict[int, list[Any]], on: DeviceMesh) -> Net:
    for place, placements in places.items():
        model[place].weight = nn.Parameter(distribute_tensor(model[place].weight.detach(), on, placements))
    return model


def other_placements() -> None:
    """Sharded along the second axis, and not at all, beside weights that are no DTensor."""
    places = {0: [Shard(1)], 2: [Replicate()], 4: [Shard(1)], 6: [Shard(1)], 10: [Shard(1)], 12: [Shard(0)]}
    for grouping in GROUPINGS:
        as_in_one_process(lambda model: sharded(model, places, mesh()), "alone", grouping)
    if dist.get_world_size() == 4:
        square = init_device_mesh("cpu", (2, 2))
        both = {0: [Shard(0), Shard(1)], 4: [Shard(0), Shard(0)], 10: [Shard(1), Shard(0)], 12: [Replicate(), Shard(0)]}
        for grouping in GROUPINGS:
            as_in_one_process(lambda model: sharded(model, both, square), "alone", grouping)


def meta() -> None:
    """Built without memory, sharded, filled: as large models are."""
    with torch.device("meta"):
        model = Net().double()
    penalty = penalty_of(model, "coupled")
    layer_by_layer(model).to_empty(device="cpu")
    filled = net()
    expected = penalty_of(filled, "coupled")
    for parameter, value in zip(model.parameters(), filled.parameters(), strict=True):
        parameter.detach().copy_(distribute_tensor(value.detach(), parameter.device_mesh, parameter.placements))
    equal(penalty.add_gradient(), expected.add_gradient(), "value")
    equal(whole(model[4].weight.grad), filled[4].weight.grad, "gradient")


def mixed_precision() -> None:
    """What is added after backward is the gradient at the parameters, not at their copies of lower precision."""
    model, one = net(), net()
    penalty, alone = penalty_of(model), penalty_of(one)
    layer_by_layer(model, mp_policy=MixedPrecisionPolicy(param_dtype=torch.bfloat16))
    x, y = map(mine, batch())
    (model(x.bfloat16()) - y).square().mean().backward()
    before = [whole(layer.weight.grad).clone() for layer in (model[2], model[4])]
    equal(penalty.add_gradient(), alone.add_gradient(), "value")
    for layer, base, expected in zip((model[2], model[4]), before, (one[2], one[4]), strict=True):
        equal(whole(layer.weight.grad) - base, expected.weight.grad, "gradient")


def compiled() -> None:
    """A compiled step leaves the sharded penalty to eager mode."""
    x, y = map(mine, batch())
    for backend in ("eager", "aot_eager"):
        model = net()
        penalty = penalty_of(model)
        layer_by_layer(model)
        expected = step(model, penalty, "loss", x, y)
        grads = [whole(one.grad) for one in model.parameters()]
        model.zero_grad()
        loss = torch.compile(
            lambda model=model, penalty=penalty: (model(x) - y).square().mean() + penalty(), backend=backend
        )
        loss().backward()
        for found, grad in zip(model.parameters(), grads, strict=True):
            equal(whole(found.grad), grad, "gradient")
        equal(penalty(), expected, "value")


def errors() -> None:
    x, y = map(mine, batch())
    model = layer_by_layer(net())
    with pytest.raises(InputError, match="sharded already: build the penalty before fully_shard"):
        penalty_of(model)

    model = net()
    penalty = penalty_of(model)
    sharded(model, {0: [Shard(2)]}, mesh())
    for use in (penalty, penalty.add_gradient):
        with pytest.raises(
            ValueError, match=r"weight 0 of shape \(10, 3, 3, 3\) .* axis 2, which cuts its kernels: .* exclude="
        ):
            use()
    penalty_of(net(), exclude="0")()

    local = torch.ones(10, 3, 3, 3, dtype=torch.float64)
    model[0].weight = nn.Parameter(DTensor.from_local(local, mesh(), [Partial()]))
    with pytest.raises(
        ValueError, match=r"weight 0 of .* placed as \(Partial.* by Shard and Replicate only, .* exclude="
    ):
        penalty()

    model = net()
    penalty = penalty_of(model)
    sharded(model, {0: [Replicate()]}, mesh())
    model[0].weight.grad = DTensor.from_local(local, mesh(), [Partial()])
    with pytest.raises(ValueError, match=r"weight 0 .* but its gradient as \(Partial.* add the penalty to the loss"):
        penalty.add_gradient()

    model = net()
    penalty = penalty_of(model)
    layer_by_layer(model)
    model.set_reshard_after_backward(False)
    (model(x) - y).square().mean().backward()
    with pytest.raises(InputError, match="is not sharded now, but its module is: call it after backward"):
        penalty.add_gradient()


def work(rank: int, size: int, store: str, checks: list[str]) -> None:
    dist.init_process_group(
        "gloo", init_method=f"file://{store}", rank=rank, world_size=size, timeout=timedelta(seconds=60)
    )
    torch.set_num_threads(1)
    for name in checks:
        globals()[name]()
        dist.barrier()
        if rank == 0:
            print(f"passed {name}", flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        # Forked: torch is imported once for all of them, and runs no threads yet.
        torch.multiprocessing.start_processes(
            work, (int(sys.argv[1]), str(Path(folder) / "store"), sys.argv[2:]), int(sys.argv[1]), start_method="fork"
        )

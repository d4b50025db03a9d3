"""All that is checked on a GPU, in one command, a line for each check: `python tests/gpu.py`.

The kernels' own checks are dealt over processes, since most of their time is compiling; meanwhile networks go through
each part of the project here. Every check is a function of a device that returns its error, so that
``test_gpu_command.py`` runs on the CPU those that need no CUDA. Exits with 1 if a check fails, and with 2 where there
is no GPU.
"""

from __future__ import annotations

import argparse
import copy
import os
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import IO, Any

import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn

import netsurgery
from netsurgery.kernels.hgsr_reference import reference
from netsurgery.models import resnet20
from netsurgery.passes import (
    HGSR,
    FisherScore,
    GradMax,
    LossIncreaseScore,
    MagnitudeScore,
    PlantChannels,
    Planting,
    PruneChannels,
    ReconstructionScore,
    SoftPruning,
    TaylorScore,
    WidenChannels,
    measure,
)
from netsurgery.passes.calibration import draw_samples
from netsurgery.passes.compensation import compensate

ROOT = Path(__file__).resolve().parent.parent
HALF = [MagnitudeScore(), PruneChannels(0.5)]


@dataclass(frozen=True)
class Check:
    """Something that holds on every device (or only with CUDA), up to an error of at most ``bound``."""

    name: str
    run: Callable[[str], float]
    bound: float
    cuda: bool = False


# The networks --------------------------------------------------------------------------------------------------------


class Small(nn.Module):
    """A residual link, a depthwise and a grouped convolution, and a flattened map."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.shortcut = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(3, 6, 1)
        self.depthwise, self.grouped = nn.Conv2d(8, 8, 3, padding=1, groups=8), nn.Conv2d(8, 6, 3, padding=1, groups=2)
        self.hidden, self.last = nn.Linear(6 * 16, 10), nn.Linear(10, 4)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.grouped(F.relu(self.depthwise(F.relu(self.first(x))))) + self.shortcut(x))
        return self.last(F.relu(self.hidden(F.avg_pool2d(y, 2).flatten(1))))


class Plain(nn.Sequential):
    def __init__(self) -> None:
        reader = nn.Conv2d(6, 5, 3)
        super().__init__(nn.Conv2d(3, 6, 3), nn.ReLU(), reader, nn.ReLU(), nn.Flatten(), nn.Linear(5 * 16, 4))


class Block(nn.Module):
    """Causal attention and a gated feed-forward layer."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads, self.head_dim = heads, width // heads
        self.norm, self.qkv, self.out = nn.LayerNorm(width), nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.norm2, self.gate, self.up = nn.LayerNorm(width), nn.Linear(width, 96), nn.Linear(width, 96)
        self.down = nn.Linear(96, width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(self.norm(x)).unflatten(2, (3, self.heads, self.head_dim)).permute(2, 0, 3, 1, 4)
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(attended.transpose(1, 2).flatten(2))
        y = self.norm2(x)
        return x + self.down(F.silu(self.gate(y)) * self.up(y))


class Transformer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.blocks = nn.Embedding(50, 32), nn.Sequential(Block(32, 4), Block(32, 4))
        self.norm, self.head = nn.LayerNorm(32), nn.Linear(32, 50)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.norm(self.blocks(self.embedding(tokens))))


def vit() -> nn.Module:
    return torchvision.models.VisionTransformer(32, 8, num_layers=2, num_heads=4, hidden_dim=48, mlp_dim=96)


NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "resnet18": torchvision.models.resnet18,
    "densenet121": torchvision.models.densenet121,
    "mobilenet_v2": torchvision.models.mobilenet_v2,
    "a small ViT": vit,
    "a small transformer": Transformer,
}


def built(kind: Callable[[], nn.Module], device: str, dtype: torch.dtype = torch.float64) -> nn.Module:
    """In eval mode, without parameters that are zero, as the heads of some networks are at first."""
    torch.manual_seed(0)
    model = kind().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape) / 50)
    return model.to(device, dtype)


def images(device: str, count: int = 8, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(count, 3, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).to(
        device, dtype
    )


def targets(count: int = 8) -> Tensor:
    return torch.arange(count) % 4


def relative(found: Tensor, wanted: Tensor) -> float:
    """The largest difference over the largest number that is wanted; not a number where something found is none."""
    found, wanted = found.detach().cpu().double(), wanted.detach().cpu().double()
    return float((found - wanted).abs().max() / wanted.abs().max())


def worst(errors: Sequence[float]) -> float:
    return float(torch.tensor(errors, dtype=torch.float64).max())  # which is NaN if one is


# The penalty ---------------------------------------------------------------------------------------------------------


def penalised(device: str, grouping: str = "coupled") -> tuple[Any, HGSR]:
    """A small network in float32, in which kernels and whole outer groups are zero."""
    model: Any = built(Small, device, torch.float32)
    with torch.no_grad():
        model.first.weight[2], model.grouped.weight[:, 1], model.hidden.weight[3] = 0, 0, 0
    return model, HGSR(model, images(device, 2, torch.float32), grouping=grouping, strength=0.1)  # type: ignore[arg-type]


def penalty_error(penalty: HGSR, model: nn.Module, value: Tensor, gradients: Mapping[str, Tensor]) -> float:
    """Of the value and the gradients, beside the reference in float64 on the CPU."""
    exact = dict(copy.deepcopy(model).cpu().double().named_parameters())
    layout = penalty._groups.layout.to(torch.device("cpu"))
    weights = [exact[layer.name] for layer in penalty._groups.layers]
    plain = torch.stack([exact[name].abs().sum() for name in penalty.layers]).sum()
    group = reference(weights, penalty.criterion, layout.readings, layout.index, layout.groups)
    wanted = penalty.now * ((1 - penalty.l1_ratio) * group + penalty.l1_ratio * plain)
    wanted_gradients = torch.autograd.grad(wanted, [exact[name] for name in penalty.layers])
    errors = [relative(gradients[n], one) for n, one in zip(penalty.layers, wanted_gradients, strict=True)]
    return worst([relative(value, wanted), *errors])


def taken(penalty: HGSR, model: nn.Module) -> dict[str, Tensor]:
    """The gradients of the weights in the penalty; the model has none afterwards."""
    found = {name: model.get_parameter(name).grad for name in penalty.layers}
    model.zero_grad(set_to_none=True)
    assert all(gradient is not None for gradient in found.values()), "a weight of the penalty has no gradient"
    return found  # type: ignore[return-value]


def whole_network(device: str, grouping: str) -> float:
    model = built(torchvision.models.resnet18, device, torch.float32)
    x = torch.randn(1, 3, 64, 64, device=device)
    penalty = HGSR(model, x, grouping=grouping, strength=1e-3)  # type: ignore[arg-type]
    value = penalty()
    value.backward()
    error = penalty_error(penalty, model, value, taken(penalty, model))
    value = penalty.add_gradient()
    return worst([error, penalty_error(penalty, model, value, taken(penalty, model))])


def mixed_precision(device: str, dtype: torch.dtype) -> float:
    """Under autocast and with a GradScaler: in the loss, and added afterwards."""
    model, penalty = penalised(device)
    x, y = images(device, dtype=torch.float32), targets().to(device)
    scaler = torch.amp.GradScaler(device, init_scale=1024.0)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    errors = []
    for in_loss in (True, False):
        with torch.autocast(device, dtype):
            loss = 0 * F.cross_entropy(model(x), y)  # so that what is there is the penalty's
            value = penalty() if in_loss else torch.zeros((), device=device)
        scaler.scale(loss + value).backward()
        if not in_loss:
            value = penalty.add_gradient(scale=scaler.get_scale())
        scaler.unscale_(optimizer)
        scaler.update()
        errors.append(penalty_error(penalty, model, value, taken(penalty, model)))
    return worst(errors)


def compiled(device: str, mode: str) -> float:
    model, penalty = penalised(device)
    torch.compiler.reset()
    step = torch.compile(penalty.__call__, mode=mode)
    errors = []
    for _ in range(4):
        value = step()
        value.backward()
        errors.append(penalty_error(penalty, model, value, taken(penalty, model)))
        with torch.no_grad():
            for name in penalty.layers:
                model.get_parameter(name).mul_(1.25)
    return worst(errors)


def in_a_graph(device: str, in_place: bool) -> float:
    """Captured once, replayed with other weights."""
    model, penalty = penalised(device)
    weights = [model.get_parameter(name) for name in penalty.layers]
    for weight in weights:
        weight.grad = torch.zeros_like(weight)

    def step() -> list[Tensor]:
        if in_place:
            return [penalty.add_gradient(), *(weight.grad for weight in weights)]
        value = penalty()
        return [value.detach(), *torch.autograd.grad(value, weights)]

    (value, *gradients), replay = captured(step)
    errors = []
    for _ in range(3):
        with torch.no_grad():
            for weight in weights:
                weight.mul_(1.25)
                weight.grad.zero_()
        replay()
        errors.append(penalty_error(penalty, model, value, dict(zip(penalty.layers, gradients, strict=True))))
    return worst(errors)


def captured(step: Callable[[], list[Tensor]]) -> tuple[list[Tensor], Callable[[], None]]:
    """What a step returns in a CUDA graph, and what brings it up to date."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = step()
    return found, graph.replay


# Surgery -------------------------------------------------------------------------------------------------------------


def sample(name: str, device: str) -> Tensor:
    side = 32 if name == "a small ViT" else 64
    torch.manual_seed(2)
    x = torch.randn(2, 3, side, side).double() if name != "a small transformer" else torch.randint(50, (2, 12))
    return x.to(device)


def surgery(device: str, name: str) -> float:
    """Half of everything goes by `apply`, and `verify` compares the rest with the silenced original."""
    model = built(NETWORKS[name], device)
    x = sample(name, device)
    edit = netsurgery.plan(model, HALF, (x,))
    small = netsurgery.apply(model, HALF, (x,))
    before, after = (sum(p.numel() for p in one.parameters()) for one in (model, small))
    assert after < 0.8 * before, f"{after:,} of {before:,} parameters are left"
    assert all(p.device.type == device for p in small.parameters())
    return netsurgery.verify(model, small, edit, (x,))


def loss_increase(device: str) -> float:
    """The loss changes as it does where the unit is cut out. The data is on the CPU."""
    model, data = built(Small, device), (images("cpu", 24), targets(24))
    network = netsurgery.trace(model, data[0][:2].to(device))
    scores = LossIncreaseScore(data, samples=16).run(network).scores
    chosen = draw_samples(data, 16)
    x, y = chosen.inputs[0][0].to(device), chosen.targets.to(device)

    def losses(one: nn.Module) -> Tensor:
        with torch.no_grad():
            return F.cross_entropy(one(x), y, reduction="none").double().cpu()

    errors = []
    for group in network.prunable:
        stay = [tuple(u for u in range(group.size) if u != unit) for unit in range(group.size)]
        cut = [netsurgery.rewrite(model, netsurgery.Edit(network, {group.name: units})) for units in stay]
        wanted = torch.stack([(losses(small) - losses(model)).abs().mean() for small in cut])
        errors.append(relative(scores[group.name], wanted))
    return worst(errors)


def compensation(device: str, method: str) -> float:
    """Units that are constant cost nothing."""
    model: Any = built(Plain, device)
    with torch.no_grad():
        model[0].weight[[1, 4]] = 0
        model[0].bias[[1, 4]] = torch.tensor([0.7, 1.9], dtype=torch.float64, device=device)
    network = netsurgery.trace(model, images(device, 2))
    edit = netsurgery.Edit(network, {"0": (0, 2, 3, 5)})
    edit = compensate(edit, method, (images("cpu", 24), targets(24)), ridge=1e-4)  # type: ignore[arg-type]
    small = netsurgery.rewrite(model, edit)
    assert not edit.uncompensated, edit.uncompensated
    with torch.no_grad():
        return relative(small(images(device)), model(images(device)))


def scores(device: str, kind: Callable[[Any], netsurgery.Pass]) -> float:
    """As on the CPU, where the data is."""
    data = images("cpu", 24), targets(24)

    def scored(where: str) -> Mapping[str, Tensor]:
        return kind(data).run(netsurgery.trace(built(Small, where), images(where, 2))).scores

    found, wanted = scored(device), scored("cpu")
    assert found.keys() == wanted.keys() and len(found) > 3
    return worst([relative(found[name], one) for name, one in wanted.items()])


def figures(device: str) -> float:
    """What a plan measures, as on the CPU."""
    data = images("cpu", 24), targets(24)

    def measured(where: str) -> Tensor:
        model = built(Small, where)
        removal = PruneChannels(0.5, compensate="least-squares", data=data)
        small = netsurgery.apply(model, [MagnitudeScore(), removal], images(where, 2))
        found = measure(model, small, data)
        assert found.loss and found.agreement is not None and found.kl is not None
        return torch.tensor([*found.loss, found.agreement, found.kl, found.error], dtype=torch.float64)

    return relative(measured(device), measured("cpu"))


DATA_SCORES: dict[str, Callable[[Any], netsurgery.Pass]] = {
    "TaylorScore": TaylorScore,
    "TaylorScore, second order": partial(TaylorScore, order=2),
    "FisherScore": FisherScore,
    "ReconstructionScore": ReconstructionScore,
}


# Growth --------------------------------------------------------------------------------------------------------------


def growth(device: str, name: str) -> float:
    """More units, by copies and new ones, and the same outputs."""
    model = built(NETWORKS[name], device)
    x = sample(name, device)
    errors = []
    for passes in ([WidenChannels(2, noise=0.3)], [PlantChannels(4)]):
        grown = netsurgery.apply(model, passes, (x,))
        before, after = (sum(p.numel() for p in one.parameters()) for one in (model, grown))
        assert after > 1.02 * before and all(p.device.type == device for p in grown.parameters())
        with torch.no_grad():
            errors.append(relative(grown(x), model(x)))
    return worst(errors)


def planting(device: str, make: Callable[[Any], torch.optim.Optimizer], dtype: torch.dtype | None) -> float:
    """The share of old entries that training changed, with momentum, decay, a scaled loss and batch norms; none may."""
    model = built(lambda: resnet20(widths=(4, 8, 16)), device, torch.float32).train()
    x, y = images(device, dtype=torch.float32), targets().to(device)
    optimizer = make(model.parameters())

    def train(steps: int) -> None:
        scaler = torch.amp.GradScaler(device, init_scale=1024.0, enabled=dtype is not None)
        for _ in range(steps):
            optimizer.zero_grad()
            with torch.autocast(device, dtype, enabled=dtype is not None):
                loss = F.cross_entropy(model(x).float(), y)
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()

    train(2)
    old = {name: value.clone() for name, value in model.state_dict().items()}
    edit = netsurgery.plan(model, [PlantChannels(2), GradMax((x, y), candidates=3)], (x,))
    plant = Planting(model, x, edit=edit, optimizer=optimizer)
    train(4)
    model = plant.finish()
    changed, moved = 0, 0
    for name, value in model.state_dict().items():
        there, grown = edit.positions, value
        for dim, axis in enumerate(edit.network.axes.get(name, ())):
            if (new := there.new(axis)) is not None:
                grown = grown.index_select(dim, (~new).nonzero().flatten().to(device))
        changed += int((grown != old[name]).sum())
        moved += value.numel() - grown.numel()
    assert moved > 100, "nothing has grown"
    train(2)
    return float(changed)


def searched(device: str) -> float:
    """A search by planting is the same twice; the data is on the CPU."""
    model = built(lambda: nn.Sequential(*Plain()), device, torch.float32)
    x = images("cpu", 96, torch.float32)
    given: dict[str, Any] = {"budget": {"params": 1200}, "amount": 2, "epochs": 4, "lr": 0.01, "progress": False}
    one, other = (
        netsurgery.grow(model, (x, (x[:, 0].mean((1, 2)) > 0).long()), example_inputs=x[:2].to(device), **given)
        for _ in range(2)
    )
    grown, again = one.model.state_dict(), other.model.state_dict()
    assert sum(value.numel() for value in grown.values()) > sum(value.numel() for value in model.state_dict().values())
    assert all(value.device.type == device for value in grown.values())
    return worst([relative(again[name], value) for name, value in grown.items()])


# Training ------------------------------------------------------------------------------------------------------------


def soft(device: str, method: str, grouping: str) -> float:
    """What is pruned softly goes in the end without a difference."""
    model = built(lambda: resnet20(widths=(4, 8, 16)), device).train()
    x, y = images(device), targets().to(device)
    optimizer = torch.optim.SGD(model.parameters(), 0.05, momentum=0.9)
    pruning = SoftPruning(
        model, x, method=method, ratio=0.4, epochs=3, grouping=grouping, optimizer=optimizer  # type: ignore[arg-type]
    )  # fmt: skip
    for epoch in range(3):
        for _ in range(2):
            optimizer.zero_grad()
            F.cross_entropy(model(x), y).backward()
            optimizer.step()
        pruning.step(epoch)
    small = pruning.finish()
    assert sum(p.numel() for p in small.parameters()) < sum(p.numel() for p in model.parameters())
    with torch.no_grad():
        return relative(small.eval()(x), model.eval()(x))


def training_goes_on(device: str, make: Callable[[Any], torch.optim.Optimizer]) -> float:
    """After surgery as if what is removed were held at zero in the full network."""
    model = built(Small, device)
    x, y = images(device), targets().to(device)
    optimizer = make(model.parameters())

    def train(one: nn.Module, its: torch.optim.Optimizer, masks: Mapping[str, Tensor] | None = None) -> None:
        its.zero_grad()
        F.cross_entropy(one(x), y).backward()
        for name, mask in (masks or {}).items():
            one.get_parameter(name).grad.mul_(mask)  # type: ignore[union-attr]
        its.step()
        hold(one, masks or {})

    for _ in range(3):
        train(model, optimizer)
    edit = netsurgery.plan(model, HALF, (x,))
    twin, other = copy.deepcopy((model, optimizer))
    marked = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in marked.parameters():
            parameter.copy_(torch.arange(parameter.numel()).view_as(parameter))
    places = {name: one.long().flatten() for name, one in netsurgery.rewrite(marked, edit).named_parameters()}
    masks = {
        name: torch.zeros_like(one).flatten().index_fill(0, places[name], 1).view_as(one)
        for name, one in twin.named_parameters()
    }
    small = netsurgery.rewrite(model, edit, optimizer=optimizer)
    hold(twin, masks)
    before = {name: one.detach().clone() for name, one in small.named_parameters()}
    for _ in range(3):
        train(small, optimizer)
        train(twin, other, masks)
    full = dict(twin.named_parameters())
    assert all((one != before[name]).any() for name, one in small.named_parameters()), "some parameter is not trained"
    return worst([relative(one, full[n].flatten()[places[n]].view_as(one)) for n, one in small.named_parameters()])


@torch.no_grad()
def hold(model: nn.Module, masks: Mapping[str, Tensor]) -> None:
    for name, mask in masks.items():
        model.get_parameter(name).mul_(mask)


OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "SGD, fused": lambda p: torch.optim.SGD(p, 0.05, momentum=0.9, weight_decay=0.01, fused=True),
    "AdamW, fused": lambda p: torch.optim.AdamW(p, 0.01, fused=True),
    "AdamW, capturable": lambda p: torch.optim.AdamW(p, 0.01, capturable=True),
}
GROUPINGS = ("feature", "neuron", "coupled")

# The penalty is in float32, all else in float64, so that what a device rounds elsewhere hides nothing.
CHECKS = [
    *(Check(f"penalty of resnet18, {one}", partial(whole_network, grouping=one), 1e-5) for one in GROUPINGS),
    Check("penalty under AMP, bfloat16", partial(mixed_precision, dtype=torch.bfloat16), 1e-5),
    Check("penalty under AMP, float16", partial(mixed_precision, dtype=torch.float16), 1e-5, cuda=True),
    Check("penalty in a CUDA graph", partial(in_a_graph, in_place=False), 1e-5, cuda=True),
    Check("penalty's add_gradient in a CUDA graph", partial(in_a_graph, in_place=True), 1e-5, cuda=True),
    Check("penalty under torch.compile", partial(compiled, mode="default"), 1e-5),
    Check("penalty under torch.compile, reduce-overhead", partial(compiled, mode="reduce-overhead"), 1e-5),
    *(Check(f"apply and verify, {one}", partial(surgery, name=one), 1e-9) for one in NETWORKS),
    *(Check(f"growth, {one}", partial(growth, name=one), 1e-10) for one in ("mobilenet_v2", "a small transformer")),
    Check("planting, AdamW", partial(planting, make=partial(torch.optim.AdamW, lr=0.01), dtype=None), 0),
    *(
        Check(f"planting, {one}, AMP", partial(planting, make=make, dtype=torch.float16), 0, cuda=True)
        for one, make in OPTIMIZERS.items()
    ),
    Check("grow", searched, 1e-6),
    Check("LossIncreaseScore", loss_increase, 1e-4),
    *(Check(f"compensation, {one}", partial(compensation, method=one), 1e-9) for one in ("bias", "least-squares")),
    *(Check(name, partial(scores, kind=kind), 1e-6) for name, kind in DATA_SCORES.items()),
    Check("measure", figures, 1e-6),
    Check("SoftPruning, asfp by layer", partial(soft, method="asfp", grouping="layer"), 1e-9),
    Check("SoftPruning, ghfp on coupled units", partial(soft, method="ghfp", grouping="coupled"), 1e-9),
    *(
        Check(f"surgery in training, {one}", partial(training_goes_on, make=make), 1e-9, cuda="capturable" in one)
        for one, make in OPTIMIZERS.items()
    ),
]


# The command ---------------------------------------------------------------------------------------------------------


def report(passed: bool, name: str, seconds: float, found: str) -> bool:
    print(f"{'ok    ' if passed else 'FAILED'} {name:<46} {seconds:6.1f} s  {found}", flush=True)
    return passed


def carry_out(check: Check, device: str) -> bool:
    """Run a check and print its line, and after it what it raised."""
    start = time.perf_counter()
    try:
        error, raised = check.run(device), ""
    except Exception:  # a check that fails in any way must not hide the others
        error, raised = float("nan"), traceback.format_exc()
    text = raised.strip().rpartition("\n")[2] or f"error {error:.1e}, at most {check.bound:.0e}"
    passed = report(error <= check.bound, check.name, time.perf_counter() - start, text)
    if raised:
        print(raised, flush=True)
    return passed


@dataclass(frozen=True)
class Slice:
    """Every ``of``-th of the kernels' checks, in a process of its own."""

    number: int
    of: int
    process: subprocess.Popen[str]
    output: IO[str]
    start: float

    @classmethod
    def begin(cls, number: int, of: int, **environment: str) -> Slice:
        kept = {key: value for key, value in os.environ.items() if not key.startswith(("PYTEST_", "TRITON_INTERPRET"))}
        paths = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist"]
        command += ["-p", "tests.slices", "--slice", f"{number}/{of}", str(ROOT / "tests" / "hgsr_triton_checks.py")]
        output = tempfile.TemporaryFile("w+")  # noqa: SIM115 - it is closed by the end of the process's output
        process = subprocess.Popen(
            command, cwd=ROOT, env=kept | {"PYTHONPATH": paths} | environment, stdout=output, stderr=subprocess.STDOUT,
            text=True,
        )  # fmt: skip
        return cls(number, of, process, output, time.perf_counter())

    def end(self, timeout: float = 600) -> bool:
        """Wait for it and print its line, and after it what failed."""
        try:
            code = self.process.wait(timeout)
        except subprocess.TimeoutExpired:
            self.process.kill()
            code = self.process.wait()
        with self.output:
            self.output.seek(0)
            text = self.output.read().strip()
        said = text.rpartition("\n")[2].strip("= ")
        name = f"kernels, part {self.number + 1} of {self.of}"
        passed = report(code == 0 and "passed" in said, name, time.perf_counter() - self.start, said)
        if not passed:
            print(text[-10000:], flush=True)
        return passed


def main(arguments: Sequence[str] | None = None) -> int:
    """Carry out all checks."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--processes", type=int, default=min(8, os.cpu_count() or 1), help="for the kernels' checks")
    options = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        print(f"No GPU: torch {torch.__version__} finds no CUDA device, and nothing was checked.")
        return 2
    start = time.perf_counter()
    import triton

    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, triton {triton.__version__}", flush=True)
    slices = [Slice.begin(number, options.processes) for number in range(options.processes)]
    passed = [carry_out(check, "cuda") for check in CHECKS]
    passed += [one.end() for one in slices]
    print(f"{sum(passed)} of {len(passed)} passed in {time.perf_counter() - start:.0f} s")
    return 0 if all(passed) else 1


if __name__ == "__main__":
    sys.exit(main())

"""What comes after a removal alone, on the zoo and on random networks: the same as the whole network silenced."""

import os
from collections import Counter
from collections.abc import Callable
from math import inf
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from torch import Tensor, nn

import netsurgery
import zoo
from netsurgery.analysis.replay import with_constants
from netsurgery.analysis.replay_without import replay_without
from netsurgery.analysis.statistics import STATISTICS
from netsurgery.capture.copies import named_tensors
from netsurgery.passes.functional_graph import Unsuited
from netsurgery.passes.partial_replay import PartialReplay
from netsurgery.passes.removed_units import Removal
from netsurgery.verification.silencing import silenced
from random_networks import THEMES, Program, build, example, programs

aten = torch.ops.aten
EXAMPLES = int(os.environ.get("NETSURGERY_EXAMPLES", "60"))


def difference(model: nn.Module, inputs: tuple[Tensor, ...], seed: int, most: int) -> tuple[float, int]:
    """The largest relative difference over removals of some groups, alone and two at a time, beside others or not.

    Returns:
        The difference, and how many outputs that are not all zeros it is taken over.

    Raises:
        Unsuited: as ``PartialReplay`` does.
    """
    network = netsurgery.trace(model, inputs)
    given, tensors = (inputs, {}), dict(named_tensors(model))
    network = with_constants(model, network, given)
    engine = PartialReplay(network, tensors)
    generator = torch.Generator().manual_seed(seed)

    def some(group: netsurgery.Group) -> tuple[int, ...]:
        units = torch.randperm(group.size, generator=generator)[: max(1, group.size // 3)]
        return tuple(units.sort().values.tolist())

    def wanted(removal: Removal) -> list[Tensor]:
        kept = {network[name].channel: stay(network[name].size, units) for name, units in removal.items()}
        return silenced(network.programs[0], tensors, given, kept)

    order = torch.randperm(len(network.prunable), generator=generator).tolist()
    groups = [network.prunable[index] for index in order]
    worst, compared = 0.0, 0
    for index, group in enumerate(groups[:most]):
        others = {other.name: some(other) for other in groups[index + 1 :: 2]}
        tied = network.equal_to(group.name)
        for names, before in (((group.name,), {}), ((group.name,), others), (tied, others)):
            before = {name: units for name, units in before.items() if name not in names}
            suffix = engine.suffix(names, frozenset(before))
            whole = engine.whole(given, suffix.reads, before)
            first = {name: some(network[name]) for name in names}
            removals = [first, {name: units[-1:] for name, units in first.items()}]
            both = [wanted({**before, **removal}) for removal in removals]
            pairs = list(zip(engine.without(removals[:1], whole, before), both[0], strict=True))
            if suffix.blocks and all(t.shape[0] % 2 == 0 for t in inputs):
                for found, one, other, node in zip(
                    engine.without(removals, whole, before), *both, engine.outputs, strict=True
                ):
                    row = engine.row(engine.dims[node])
                    if row is not None:
                        half = one.shape[row] // 2
                        pairs.append((found, torch.cat([one.narrow(row, 0, half), other.narrow(row, half, half)], row)))
            for found, want in pairs:
                worst = max(worst, relative(found, want))
                compared += bool(want.count_nonzero())
    return worst, compared


def relative(found: Tensor, want: Tensor) -> float:
    """The largest difference, relative to the largest number that is wanted; infinite where zeros or NaN are missed."""
    assert found.shape == want.shape
    if not torch.equal(found.isnan(), want.isnan()):
        return inf
    found, want = found.nan_to_num(), want.nan_to_num()
    return 0.0 if torch.equal(found, want) else float((found - want).abs().max() / want.abs().max())


def stay(size: int, units: tuple[int, ...]) -> Tensor:
    return torch.tensor([unit for unit in range(size) if unit not in units])


MODELS = ["densenet121", "mobilenet_v3_small", "regnet_x_400mf", "resnet18", "shufflenet_v2_x0_5"]


@pytest.mark.parametrize(
    "name",
    [*MODELS, *(pytest.param(name, marks=pytest.mark.slow) for name in zoo.REPRESENTATIVES if name not in MODELS)],
)
def test_the_zoo(name: str) -> None:
    found, compared = difference(zoo.build(name), (zoo.images(name),), seed=0, most=3)
    assert found < 1e-5 and compared >= 9  # three groups, each in three ways


def test_random_networks() -> None:
    """All that suit are right; and most suit, and show something."""
    seen: Counter[str] = Counter()

    @settings(
        max_examples=EXAMPLES, derandomize=EXAMPLES <= 100, deadline=None, database=None, print_blob=False,
        suppress_health_check=list(HealthCheck),
    )  # fmt: skip
    @given(programs("everything"))
    def run(program: Program) -> None:
        torch.manual_seed(0)
        try:
            found, compared = difference(build(program), example(program), program.seed, most=3)
        except Unsuited:
            seen["unsuited"] += 1
            return
        assert found < 1e-10
        seen["compared" if compared else "nothing to compare"] += 1

    run()  # of 40: 29 are compared, 10 are unsuited, and 1 has nothing to compare
    assert seen["unsuited"] <= 0.35 * seen.total(), seen
    assert seen["nothing to compare"] <= 0.1 * seen.total(), seen


def replayed(model: nn.Module, inputs: tuple[Tensor, ...], seed: int) -> float:
    """The largest relative difference of whole replays without a third of the units of every other group, in turn."""
    network = netsurgery.trace(model, inputs)
    given, tensors = (inputs, {}), dict(named_tensors(model))
    network = with_constants(model, network, given)
    generator, worst = torch.Generator().manual_seed(seed), 0.0
    for groups in (network.prunable[::2], network.prunable[1::2]):
        keep = {}
        for name in dict.fromkeys(tied for group in groups for tied in network.equal_to(group.name)):
            size = network[name].size
            keep[network[name].channel] = torch.randperm(size, generator=generator)[size // 3 :].sort().values
        want = silenced(network.programs[0], tensors, given, keep)
        lists = {channel: units.tolist() for channel, units in keep.items()}
        pairs = zip(replay_without(network.programs[0], tensors, given, lists), want, strict=True)
        worst = max([worst, *(relative(found, one) for found, one in pairs)])
    return worst


@pytest.mark.parametrize("theme", THEMES)
def test_whole_replays_on_random_networks(theme: str) -> None:
    @settings(max_examples=12, derandomize=True, deadline=None, database=None, suppress_health_check=list(HealthCheck))
    @given(programs(theme))
    def run(program: Program) -> None:
        torch.manual_seed(0)
        assert replayed(build(program), example(program), program.seed) < 1e-10

    run()


@pytest.mark.parametrize("name", ["resnet18", "shufflenet_v2_x0_5", "swin_t"])
def test_whole_replays_on_the_zoo(name: str) -> None:
    assert replayed(zoo.build(name), (zoo.images(name),), seed=0) < 1e-5


def test_what_is_missed_is_seen() -> None:
    zeros, nan = torch.zeros(3), torch.full((3,), torch.nan)
    assert relative(zeros, zeros) == relative(nan, nan) == 0.0
    assert relative(zeros + 1e-9, zeros) == relative(nan, zeros + 1) == relative(zeros + 1, nan) == inf
    assert relative(torch.tensor([1.0, 2.5]), torch.tensor([1.0, 2.0])) == 0.25


#: An operation that takes statistics over units, ``(rows, 6, 4, units)``.
OVER_UNITS: dict[str, tuple[Any, Callable[..., Tensor]]] = {
    "mean": (aten.mean, lambda x, *_: x - x.mean(-1, keepdim=True)),
    "mean of several": (aten.mean, lambda x, *_: x * x.mean((1, 3))[:, None, :, None]),
    "largest": (aten.amax, lambda x, *_: x - x.amax(-1, keepdim=True)),
    "smallest": (aten.amin, lambda x, *_: x * x.amin((-1, 1))[:, None, :, None]),
    "product": (aten.prod, lambda x, *_: x + x.prod(-1, keepdim=True)),
    "variance": (aten.var, lambda x, *_: x * x.var(-1, keepdim=True)),
    "variance and mean": (aten.var_mean, lambda x, *_: x * sum(torch.var_mean(x, 3, keepdim=True))),
    "deviation": (aten.std, lambda x, *_: x / (1 + x.std((2, 3), keepdim=True))),
    "deviation and mean": (aten.std_mean, lambda x, *_: x * sum(torch.std_mean(x, -1))[..., None]),
    "logarithm of a sum": (aten.logsumexp, lambda x, *_: x - x.logsumexp(-1, keepdim=True)),
    "norm": (aten.linalg_vector_norm, lambda x, *_: x / (1 + torch.linalg.vector_norm(x, dim=-1, keepdim=True))),
    "all": (aten.all, lambda x, *_: x + (x > -1).all(-1, keepdim=True)),
    "softmax": (aten._softmax, lambda x, *_: x.softmax(-1)),
    "logarithm of softmax": (aten._log_softmax, lambda x, *_: x.log_softmax(-1)),
    "layer norm": (aten.native_layer_norm, lambda x, *w: F.layer_norm(x, x.shape[-1:], *w)),
    "layer norm of two": (aten.native_layer_norm, lambda x, *_: F.layer_norm(x, x.shape[-2:])),
    "group norm": (aten.native_group_norm, lambda x, *w: F.group_norm(x.movedim(-1, 1), 3, *w).movedim(1, -1)),
    "group norm of one": (aten.native_group_norm, lambda x, *_: F.group_norm(x.movedim(-1, 1), 1).movedim(1, -1)),
    "batch norm": (aten.native_batch_norm, lambda x, *_: F.batch_norm(x, None, None, training=True)),
}  # fmt: skip


class OverUnits(nn.Module):
    """Two layers with an operation between them, which is given a weight and a bias."""

    def __init__(self, between: Callable[..., Tensor]):
        super().__init__()
        self.first, self.last, self.between = nn.Linear(5, 12), nn.Linear(12, 3), between
        self.weight, self.bias = nn.Parameter(torch.rand(12)), nn.Parameter(torch.rand(12))

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.between(self.first(x), self.weight, self.bias))


@pytest.mark.parametrize("name", OVER_UNITS)
def test_statistics_are_taken_over_what_stays(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    packet, between = OVER_UNITS[name]
    called, own = [], STATISTICS[packet]
    monkeypatch.setitem(STATISTICS, packet, lambda *given: called.append(packet) or own(*given))
    torch.manual_seed(0)
    model = OverUnits(between).double()
    found, compared = difference(model, (torch.randn(4, 6, 4, 5, dtype=torch.float64),), seed=1, most=1)
    assert called and compared and found < 1e-12

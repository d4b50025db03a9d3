"""What comes after a removal alone, on the zoo and on random networks: the same as the whole network silenced."""

import os

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from torch import Tensor, nn

import netsurgery
import zoo
from netsurgery.analysis.replay import look_up_constants
from netsurgery.capture.copies import named_tensors
from netsurgery.passes.partial_replay import PartialReplay, Removal, Unsuited
from netsurgery.verification.silencing import silenced
from random_networks import Program, build, example, programs

EXAMPLES = int(os.environ.get("NETSURGERY_EXAMPLES", "60"))


def difference(model: nn.Module, inputs: tuple[Tensor, ...], seed: int, most: int) -> float | None:
    """The largest relative difference over removals of some groups, alone and two at a time, beside others or not."""
    network = netsurgery.trace(model, inputs)
    given, tensors = (inputs, {}), dict(named_tensors(model))
    look_up_constants(model, network, given)
    try:
        suffixes = PartialReplay(network, tensors)
    except Unsuited:
        return None
    generator = torch.Generator().manual_seed(seed)

    def some(group: netsurgery.Group) -> tuple[int, ...]:
        units = torch.randperm(group.size, generator=generator)[: max(1, group.size // 3)]
        return tuple(units.sort().values.tolist())

    def wanted(removal: Removal) -> list[Tensor]:
        kept = {network[name].channel: stay(network[name].size, units) for name, units in removal.items()}
        return silenced(network, network.programs[0], tensors, given, kept)

    order = torch.randperm(len(network.prunable), generator=generator).tolist()
    groups = [network.prunable[index] for index in order]
    worst = 0.0
    for index, group in enumerate(groups[:most]):
        others = {other.name: some(other) for other in groups[index + 1 :: 2]}
        tied = network.equal_to(group.name)
        for names, before in (((group.name,), {}), ((group.name,), others), (tied, others)):
            before = {name: units for name, units in before.items() if name not in names}
            suffix = suffixes.suffix(names, frozenset(before))
            whole = suffixes.whole(given, suffix.reads, before)
            first = {name: some(network[name]) for name in names}
            removals = [first, {name: units[-1:] for name, units in first.items()}]
            both = [wanted({**before, **removal}) for removal in removals]
            pairs = list(zip(suffixes.without(removals[:1], whole, before), both[0], strict=True))
            if suffix.blocks and all(t.shape[0] % 2 == 0 for t in inputs):
                for found, one, other, node in zip(
                    suffixes.without(removals, whole, before), *both, suffixes.outputs, strict=True
                ):
                    row = suffixes.row(suffixes.dims[node])
                    if row is not None:
                        half = one.shape[row] // 2
                        pairs.append((found, torch.cat([one.narrow(row, 0, half), other.narrow(row, half, half)], row)))
            for found, want in pairs:
                scale = float(want.abs().max()) if want.numel() else 0.0
                worst = max(worst, float((found - want).abs().max()) / scale if scale else 0.0)
    return worst


def stay(size: int, units: tuple[int, ...]) -> Tensor:
    return torch.tensor([unit for unit in range(size) if unit not in units])


MODELS = ["densenet121", "mobilenet_v3_small", "resnet18", "resnext50_32x4d", "shufflenet_v2_x0_5"]


@pytest.mark.parametrize(
    "name",
    [*MODELS, *(pytest.param(name, marks=pytest.mark.slow) for name in zoo.REPRESENTATIVES if name not in MODELS)],
)
def test_the_zoo(name: str) -> None:
    found = difference(zoo.build(name), (zoo.images(name),), seed=0, most=3)
    assert found is not None and found < 1e-5


@settings(
    max_examples=EXAMPLES, derandomize=EXAMPLES <= 100, deadline=None, database=None, print_blob=False,
    suppress_health_check=list(HealthCheck),
)  # fmt: skip
@given(programs("everything"))
def test_random_networks(program: Program) -> None:
    torch.manual_seed(0)
    found = difference(build(program), example(program), program.seed, most=3)
    assert found is None or found < 1e-10

"""Scores by what layers lack without units: redundant units are free, groups weigh what they do to the outputs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torchvision import models

import netsurgery
import zoo
from netsurgery.errors import InputError
from netsurgery.models import resnet20
from netsurgery.passes import MagnitudeScore, PruneChannels, ReconstructionScore, reconstruction
from netsurgery.passes.calibration import draw_inputs

Pair = tuple[nn.Module, Tensor]


def seeded(make: Callable[[], Pair]) -> Pair:
    torch.manual_seed(0)
    model, x = make()
    return model.double().eval(), x.double()


def linear() -> Pair:
    return nn.Sequential(nn.Linear(6, 12), nn.Tanh(), nn.Linear(12, 4)), torch.randn(400, 6)


def convolution() -> Pair:
    layers = nn.Conv2d(3, 12, 3), nn.BatchNorm2d(12), nn.Tanh(), nn.Conv2d(12, 5, 1, bias=False), nn.BatchNorm2d(5)
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten()), torch.randn(40, 3, 8, 8)


def flattened() -> Pair:
    layers = nn.Conv2d(3, 12, 3), nn.Tanh(), nn.Flatten(), nn.Linear(12 * 9, 4)
    return nn.Sequential(*layers), torch.randn(300, 3, 5, 5)


class Joined(nn.Module):
    """Two layers' outputs in one, read by one convolution, and the second's by another."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 8, 1), nn.Conv2d(3, 12, 1)
        self.c, self.d = nn.Conv2d(20, 4, 1), nn.Conv2d(12, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        a, b = self.a(x).tanh(), self.b(x).tanh()
        return (self.c(torch.cat([a, b], 1)) + self.d(b)).mean((2, 3))


def joined() -> Pair:
    return Joined(), torch.randn(40, 3, 8, 8)


def score(model: nn.Module, x: Tensor, **settings: Any) -> netsurgery.Network:
    return ReconstructionScore(x, **settings).run(netsurgery.trace(model, x[:2]))


@pytest.mark.parametrize("make", [linear, convolution, flattened, joined])
def test_of_units_that_say_the_same_all_but_one_are_free(make: Callable[[], Pair]) -> None:
    model, x = seeded(make)
    first = model.b if isinstance(model, Joined) else model[0]  # type: ignore[index]
    with torch.no_grad():
        first.weight[3] = first.weight[1]  # type: ignore[union-attr, index]
        first.bias[3] = first.bias[1]  # type: ignore[union-attr, index]
    name = "b" if isinstance(model, Joined) else "0"
    if isinstance(model, nn.Sequential) and isinstance(model[1], nn.BatchNorm2d):
        zoo.randomise(model, x)
        with torch.no_grad():
            for tensor in (*model[0].parameters(), *model[1].parameters(), *model[1].buffers()):
                if tensor.dim():
                    tensor[3] = tensor[1]
    found = score(model, x, ridge=1e-8)
    assert int(found.scores[name].argmin()) in (1, 3)
    assert sorted(found.scores[name].tolist())[0] < 1e-3 * sorted(found.scores[name].tolist())[1]
    assert found.comparable


def eliminated_by_hand(x: Tensor, weight: Tensor, ridge: float) -> list[int]:
    """The order in which inputs go: each time all that are left are tried, and least squares solved anew."""
    x = x - x.mean(0)
    gram = x.T @ x / len(x)
    gram += ridge * gram.diagonal().mean() * torch.eye(len(gram), dtype=gram.dtype)
    left, order, wanted = list(range(len(gram))), list[int](), gram @ weight.T

    def lost(some: list[int]) -> float:
        if not some:
            return float((weight @ gram * weight).sum())
        found = torch.linalg.solve(gram[some][:, some], wanted[some])
        return float((weight @ gram * weight).sum() - (found * wanted[some]).sum())

    while left:
        best = min(left, key=lambda unit: lost([other for other in left if other != unit]))
        order.append(best)
        left.remove(best)
    return order


def test_units_go_in_the_order_of_what_least_squares_without_them_lacks() -> None:
    model, x = seeded(linear)
    found = score(model, x, samples=400)
    held = draw_inputs(x, 400, 0).rows(slice(80, None), torch.device("cpu"))[0][0][0]
    with torch.no_grad():
        hidden = model[1](model[0](held))  # type: ignore[index, operator]
        order = eliminated_by_hand(hidden, model[2].weight, 1e-2)  # type: ignore[index, arg-type]
    assert found.scores["0"].argsort(stable=True).tolist() == order


@pytest.mark.parametrize("make", [linear, convolution, joined])
def test_what_is_changed_to_measure_a_group_is_the_least_squares(make: Callable[[], Pair]) -> None:
    """Linear readers alone: the change that an elimination leaves is what a regression on what stays gives."""
    model, x = seeded(make)
    network = netsurgery.trace(model, x[:2])
    sections = reconstruction._sections(network, network.prunable)
    reconstruction._add_inputs(network, sections, draw_inputs(x, len(x), 0))
    name = "b" if isinstance(model, Joined) else "0"
    one = next(section for section in sections[name] if section.groups == 1)
    found = reconstruction._eliminated([one], 1e-9, reconstruction._counts(network[name].size, [0.5]))
    changes, stay = dict(found.changes[0]), found.order[found.counts[0] :].sort().values
    gone = found.order[: found.counts[0]].sort().values
    gram = one.gram / one.rows - torch.outer(one.sums[:, 0], one.sums[:, 0]) / one.rows**2
    weight = one.module.weight.detach().flatten(1)[:, one.at[:, 0]]
    wanted = torch.linalg.solve(gram[stay][:, stay], gram[stay][:, gone] @ weight[:, gone].T).T
    change = changes[str(one.reader.weight)].flatten(1)[:, one.at[:, 0]]
    torch.testing.assert_close(change[:, stay], wanted, rtol=1e-5, atol=1e-7)
    assert bool((change[:, gone] + weight[:, gone]).abs().max() < 1e-12)


def test_groups_are_compared_by_what_they_do_to_the_outputs() -> None:
    """The units of a branch that is multiplied by nearly nothing go first, however large its weights are."""

    class Branches(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.loud, self.quiet = nn.Linear(6, 10), nn.Linear(6, 10)
            self.of_loud, self.of_quiet = nn.Linear(10, 4), nn.Linear(10, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.of_loud(self.loud(x).tanh()) + 1e-3 * self.of_quiet(self.quiet(x).tanh())

    torch.manual_seed(0)
    model, x = Branches().double().eval(), torch.randn(200, 6, dtype=torch.float64)
    with torch.no_grad():
        model.of_quiet.weight.mul_(10)
    scores = score(model, x).scores
    assert float(scores["quiet"].mean()) < 1e-3 * float(scores["loud"].mean())
    edit = netsurgery.plan(model, [ReconstructionScore(x), PruneChannels(0.4, scope="global")], x[:2])
    assert set(edit.keep) == {"quiet"} or len(edit.keep["quiet"]) < len(edit.keep.get("loud", range(10)))


def test_parts_of_a_group_weigh_what_was_measured() -> None:
    one = reconstruction._Eliminated(torch.arange(10), torch.ones(10), [2, 4, 8], [])
    assert one.scores([0.2, 0.6, 2.2]).tolist() == pytest.approx([0.1] * 2 + [0.2] * 2 + [0.4] * 6)
    flat = one.scores([0.4, 0.6, 1.4])  # 0.2 and 0.1 a unit: taken together, as nothing may go before what is before it
    assert flat.tolist() == pytest.approx([0.15] * 4 + [0.2] * 6)
    assert one.scores([0.0, 0.0, 0.0]).tolist() == [0.0] * 10


WIDE = [pytest.param(name, marks=pytest.mark.slow) for name in ("resnet18", "grouped")]  # up to 2,048 units a group


@pytest.mark.parametrize("name", ["resnet20", "densenet", "shuffle", "attention", *WIDE])
def test_every_unit_of_a_network_has_a_score_and_nothing_is_changed(name: str) -> None:
    torch.manual_seed(0)
    found = {
        "resnet20": lambda: resnet20(7),
        "resnet18": lambda: models.resnet18(num_classes=7),
        "densenet": lambda: models.DenseNet(4, (2, 2), 8, num_classes=7),
        "shuffle": lambda: models.shufflenet_v2_x0_5(num_classes=7),
        "grouped": lambda: models.ResNet(models.resnet.Bottleneck, [1, 1, 1, 1], 7, groups=4, width_per_group=8),
        "attention": lambda: models.VisionTransformer(32, 8, 1, 4, 32, 64, num_classes=7),
    }[name]().eval()
    x = torch.randn(10, 3, 32, 32)
    zoo.randomise(found, x)
    before = {key: value.clone() for key, value in found.state_dict().items()}
    scored = score(found, x, probes=(0.3,))
    for group in scored.prunable:
        assert scored.scores[group.name].shape == (group.size,)
        assert bool(scored.scores[group.name].isfinite().all() and (scored.scores[group.name] >= 0).all())
    assert all(value.equal(before[key]) for key, value in found.state_dict().items())
    assert not any(module._forward_hooks for module in found.modules())


def test_outputs_that_are_no_classes_are_compared_by_their_difference() -> None:
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(6, 10), nn.Tanh(), nn.Linear(10, 1)), torch.randn(64, 6)
    found = score(model, x).scores["0"]
    assert bool((found > 0).all())


def test_a_part_that_is_free_says_nothing_of_the_rest() -> None:
    """Of twenty units twelve are silent: 30% of them cost nothing, the eight others do."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 20), nn.ReLU(), nn.Linear(20, 20), nn.ReLU(), nn.Linear(20, 5))
    with torch.no_grad():
        model[0].bias[8:] = -100  # type: ignore[index]
    scores = score(model, torch.randn(200, 8)).scores["0"]
    assert float(scores[:8].min()) > 1e3 * float(scores[8:].max())


def test_numbers_that_are_no_classes() -> None:
    """Two outputs that move together are equal classes, and other numbers."""
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(6, 10), nn.Tanh(), nn.Linear(10, 2)), torch.randn(64, 6)
    with torch.no_grad():
        model[2].weight[1], model[2].bias[1] = model[2].weight[0], model[2].bias[0]  # type: ignore[index]
    assert float(score(model, x).scores["0"].sum()) < 1e-9
    assert float(score(model, x, classes=False).scores["0"].sum()) > 1e-3


@pytest.mark.parametrize("hidden", [(1,), (0, 2)])
def test_masked_classes_play_no_part(hidden: tuple[int, ...]) -> None:
    class Masked(nn.Sequential):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x).index_fill(1, torch.tensor(hidden), -torch.inf)

    torch.manual_seed(0)
    layers, x = [nn.Linear(6, 10), nn.Tanh(), nn.Linear(10, 4)], torch.randn(64, 6)
    masked, rest = Masked(*layers), nn.Sequential(*layers, nn.Linear(4, 4 - len(hidden), bias=False))
    rest[3].weight.data = torch.eye(4)[[one for one in range(4) if one not in hidden]]  # type: ignore[assignment]
    wanted = score(rest, x).scores["0"]
    torch.testing.assert_close(score(masked, x).scores["0"], wanted, rtol=1e-4, atol=1e-9)
    squares = [score(one, x, classes=False).scores["0"] for one in (masked, rest)]
    torch.testing.assert_close(*squares, rtol=1e-4, atol=1e-9)


def test_other_classes_masked_without_units() -> None:
    class Best(nn.Sequential):
        def forward(self, x: Tensor) -> Tensor:
            y = super().forward(x)
            return y.masked_fill(y < y.median(1, keepdim=True).values, -torch.inf)

    torch.manual_seed(0)
    model = Best(nn.Linear(6, 10), nn.Tanh(), nn.Linear(10, 5))
    with pytest.raises(
        InputError, match=r"the outputs of Best are infinite without units of '0' where they were finite"
    ):
        score(model, torch.randn(64, 6), probes=(0.9,))


@pytest.mark.parametrize("make", [linear, convolution, flattened, joined])
def test_little_memory_means_several_runs(make: Callable[[], Pair], monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = seeded(make)
    monkeypatch.setattr(reconstruction, "POSITIONS", 20)
    whole = score(model, x)
    largest = max(2 * 8 * group.size**2 * (2 if group.name == "b" else 1) for group in whole.prunable)
    runs, run = [], reconstruction.outputs_by_batch
    monkeypatch.setattr(reconstruction, "outputs_by_batch", lambda *given: runs.append(1) or run(*given))
    parts = score(model, x, memory=largest)
    assert len(runs) == 1 + len(whole.prunable)  # one more for what the outputs are
    assert whole.scores.keys() == parts.scores.keys()
    for name, scores in whole.scores.items():
        assert torch.equal(scores, parts.scores[name])


@pytest.mark.parametrize(("name", "size"), [("a", 2 * 8 * 8 * 8), ("b", 2 * 2 * 8 * 12 * 12)])
def test_a_group_that_needs_too_much_memory_is_refused(name: str, size: int) -> None:
    model, x = seeded(joined)
    says = (
        rf"ReconstructionScore\(memory={size - 1:,}\): the matrices of the layers that read group '{name}' take "
        rf"{size:,} bytes: pass memory={size}, or score by TaylorScore"
    )
    with pytest.raises(InputError, match=says):
        score(model, x, memory=size - 1)
    with pytest.raises(InputError, match=r"ReconstructionScore\(memory=0\): a whole number of at least 1"):
        ReconstructionScore(x, memory=0)


def test_layers_that_do_not_run_as_modules_are_no_readers() -> None:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(16, 2, 24, batch_first=True)
    model, x = nn.Sequential(layer, nn.Flatten(), nn.Linear(16 * 4, 3)).eval(), torch.randn(40, 4, 16)
    found = score(model, x)
    assert all(bool(one.isfinite().all()) and float(one.sum()) > 0 for one in found.scores.values())


def test_short_types_are_summed_in_longer_ones() -> None:
    model, x = seeded(linear)
    wanted = score(model, x).scores["0"]
    found = score(model.bfloat16(), x.bfloat16()).scores["0"]
    assert float(torch.corrcoef(torch.stack([wanted, found]))[0, 1]) > 0.95


def test_units_that_no_layer_reads_go_by_their_weights() -> None:
    class Summed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Linear(6, 8)

        def forward(self, x: Tensor) -> Tensor:
            y = self.a(x).tanh()
            return torch.stack([y.sum(1), y.square().sum(1)], 1)

    torch.manual_seed(0)
    model, x = Summed(), torch.randn(64, 6)
    network = score(model, x)
    by_norm = MagnitudeScore().run(network).scores["a"]
    assert network.scores["a"].argsort().tolist() == by_norm.argsort().tolist()
    assert float(network.scores["a"].sum()) > 0


def test_groups_are_measured_on_what_is_held_back() -> None:
    """Of inputs that are all the same every unit seems free; of others it is not."""
    model, x = seeded(linear)
    same = x[:1].expand(60, -1)
    alike = score(model, same, ridge=1e-6).scores["0"]
    others = score(model, same, held_back=x, ridge=1e-6).scores["0"]
    assert float(alike.sum()) < 1e-3 * float(others.sum())
    with pytest.raises(InputError, match="one sample is not enough"):
        score(model, x[:1])


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"samples": 1}, "a whole number of at least 2"),
        ({"ridge": 0.0}, "ridge is positive"),
        ({"probes": ()}, "probes are in"),
        ({"probes": (0.5, 1.0)}, "probes are in"),
    ],
)
def test_settings_out_of_range(settings: dict[str, Any], says: str) -> None:
    with pytest.raises(InputError, match=says):
        ReconstructionScore(torch.randn(4, 6), **settings)


def test_inputs_that_are_not_finite() -> None:
    model, x = seeded(linear)
    x[3, 2] = float("nan")
    with pytest.raises(InputError, match=r"what '2' of Sequential is given on the data is not finite"):
        score(model, x)

"""The rise of the loss: what cutting a unit out and running what is left gives."""

import functools
import json
import os
import re
import signal
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Literal

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import BatchSampler, DataLoader, Dataset, SubsetRandomSampler, TensorDataset

import netsurgery
from netsurgery.errors import InputError
from netsurgery.passes import LossIncreaseScore
from netsurgery.passes.ablation import Ablation, AblationSettings
from netsurgery.passes.calibration import draw_samples
from netsurgery.passes.losses import Loss
from netsurgery.passes.readings import Reading
from netsurgery.passes.score_checkpoint import ScoreCheckpoint


def randomised(model: nn.Module) -> nn.Module:
    """In float64 and eval mode, every number random: a norm's shift leaks through a ReLU."""
    generator = torch.Generator().manual_seed(0)
    model.double().eval()
    with torch.no_grad():
        for tensor in model.state_dict().values():
            if tensor.is_floating_point():
                tensor.copy_(torch.randn(tensor.shape, generator=generator) / max(1, tensor[0].numel()) ** 0.5)
        for module in model.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                module.running_var.uniform_(0.5, 1.5, generator=generator)
    return model


class Residual(nn.Module):
    """A residual stream that three layers read, with in-place activations."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.bn = nn.Conv2d(3, 6, 3, padding=1, bias=False), nn.BatchNorm2d(6)
        self.a, self.bn_a = nn.Conv2d(6, 5, 3, padding=1), nn.BatchNorm2d(5)
        self.b, self.bn_b = nn.Conv2d(5, 6, 3, padding=1), nn.BatchNorm2d(6)
        self.act = nn.ReLU(inplace=True)
        self.head = nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.act(self.bn(self.stem(x)))
        x = self.act(self.bn_b(self.b(self.act(self.bn_a(self.a(x))))) + x)
        return self.head(x.mean((2, 3)))


class Concatenated(nn.Module):
    """Two branches side by side, read together, then by one alone."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 4, 3), nn.Conv2d(3, 5, 3)
        self.bn, self.c = nn.BatchNorm2d(9), nn.Conv2d(9, 6, 1)
        self.d, self.head = nn.Conv2d(4, 6, 1), nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        a, b = self.a(x), self.b(x)
        y = self.c(F.relu(self.bn(torch.cat([a, b], 1)))) * torch.sigmoid(self.d(a))
        return self.head(y.amax((2, 3)))


class Depthwise(nn.Module):
    """Depthwise and grouped convolutions with squeeze and excitation."""

    def __init__(self) -> None:
        super().__init__()
        self.expand, self.bn1 = nn.Conv2d(3, 8, 1, bias=False), nn.BatchNorm2d(8)
        self.depth, self.bn2 = nn.Conv2d(8, 8, 3, padding=1, groups=8, bias=False), nn.BatchNorm2d(8)
        self.squeeze, self.excite = nn.Conv2d(8, 3, 1), nn.Conv2d(3, 8, 1)
        self.group, self.norm = nn.Conv2d(8, 8, 3, groups=2), nn.GroupNorm(2, 8)
        self.head = nn.Conv2d(8, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = F.hardswish(self.bn1(self.expand(x)))
        x = F.hardswish(self.bn2(self.depth(x)))
        x = x * torch.sigmoid(self.excite(F.relu(self.squeeze(x.mean((2, 3), keepdim=True)))))
        return self.head(F.gelu(self.norm(self.group(x)))).mean((2, 3))


class Flattened(nn.Module):
    """Channels times positions are features of a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)
        self.hidden, self.head = nn.Linear(4 * 9, 7), nn.Linear(7, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = F.max_pool2d(F.relu(self.bn(self.conv(x))), 2)
        return self.head(torch.tanh(self.hidden(x.flatten(1))))


class Heads(nn.Module):
    """Two heads of four dimensions."""

    def __init__(self) -> None:
        super().__init__()
        self.heads, self.dim = 2, 4
        self.qkv, self.out = nn.Linear(8, 24), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).view(*x.shape[:2], 3, self.heads, self.dim).permute(2, 0, 3, 1, 4)
        attended = (q @ k.transpose(-2, -1) / 2).softmax(-1) @ v
        return self.out(attended.transpose(1, 2).flatten(2))


class Attention(nn.Module):
    """Heads, layer norms over a residual stream, and a weight that is standardised."""

    def __init__(self) -> None:
        super().__init__()
        self.patch, self.norm, self.attention = nn.Conv2d(3, 8, 4, 4), nn.LayerNorm(8), Heads()
        self.norm2, self.up, self.down = nn.LayerNorm(8), nn.Linear(8, 12), nn.Linear(12, 8)
        self.head = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patch(x).flatten(2).transpose(1, 2)
        x = x + self.attention(self.norm(x))
        x = x + self.down(F.gelu(self.up(self.norm2(x))))
        weight = self.head.weight - self.head.weight.mean(1, keepdim=True)
        return F.linear(x.mean(1), weight, self.head.bias)


class Normed(nn.Module):
    """Weights that are normalised: of units that go, nothing is left in the norms."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.utils.parametrizations.weight_norm(nn.Conv2d(3, 6, 3))
        self.b = nn.utils.parametrizations.weight_norm(nn.Conv2d(6, 5, 3))
        self.head = nn.Linear(5, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.relu(self.b(torch.relu(self.a(x)))).mean((2, 3)))


NETWORKS: dict[str, Callable[[], nn.Module]] = {
    one.__name__.lower(): lambda one=one: randomised(one())  # type: ignore[misc]
    for one in (Residual, Concatenated, Depthwise, Flattened, Attention)
}


def data_for(_: nn.Module, count: int = 24) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(count, 3, 8, 8, generator=generator).double(), torch.arange(count) % 4


def by_surgery(
    model: nn.Module, network: netsurgery.Network, name: str, units: set[int], x: Tensor, y: Tensor
) -> float:
    """The loss of the network in which units are cut out."""
    stay = tuple(u for u in range(network[name].size) if u not in units)
    small = netsurgery.rewrite(model, netsurgery.Edit(network, {name: stay}))
    return loss_of(small, x, y)


@torch.no_grad()
def loss_of(model: nn.Module, x: Tensor, y: Tensor) -> float:
    return float(F.cross_entropy(model(x), y))


def changes(model: nn.Module, network: netsurgery.Network, name: str, unit: int, x: Tensor, y: Tensor) -> Tensor:
    """By how much the loss of each sample changes where a unit is cut out, ``(n,)``."""
    stay = tuple(u for u in range(network[name].size) if u != unit)
    small = netsurgery.rewrite(model, netsurgery.Edit(network, {name: stay}))
    with torch.no_grad():
        return F.cross_entropy(small(x), y, reduction="none") - F.cross_entropy(model(x), y, reduction="none")


#: What is scored by, of the changes of each sample's loss ``(n,)``.
READINGS: dict[Reading, Callable[[Tensor], float]] = {
    "effect": lambda change: float(change.abs().mean()),
    "rise": lambda change: float(change.mean()),
}


def drawn(data: tuple[Tensor, Tensor], count: int) -> tuple[Tensor, Tensor]:
    chosen = draw_samples(data, count)
    return chosen.inputs[0][0], chosen.targets


@pytest.mark.parametrize("by", READINGS)
@pytest.mark.parametrize("rows", [None, 5])
@pytest.mark.parametrize("build", [*NETWORKS.values(), lambda: randomised(Normed())], ids=[*NETWORKS, "normed"])
def test_a_score_is_the_change_of_the_loss_where_the_unit_is_cut_out(
    build: Callable[[], nn.Module], rows: int | None, by: Reading
) -> None:
    model = build()
    data = data_for(model)
    network = netsurgery.trace(model, data[0][:3])
    scores = LossIncreaseScore(data, samples=16, rows=rows, by=by).run(network).scores
    x, y = drawn(data, 16)
    tied = {name for names in network.equal_sizes for name in names}
    assert set(scores) == {group.name for group in network.prunable}
    assert len(scores) >= 2
    for group in network.prunable:
        if group.name in tied:
            continue
        for unit in range(group.size):
            wanted = READINGS[by](changes(model, network, group.name, unit, x, y))
            assert float(scores[group.name][unit]) == pytest.approx(wanted, rel=1e-4, abs=1e-12), (group.name, unit)


def test_few_samples_go_through_several_removals_at_a_time() -> None:
    model = NETWORKS["residual"]()
    data = data_for(model)
    network = netsurgery.trace(model, data[0][:3])
    alone = LossIncreaseScore(data, samples=7, rows=7).run(network).scores
    together = LossIncreaseScore(data, samples=7, rows=64).run(network).scores
    for name, score in alone.items():
        torch.testing.assert_close(together[name], score, rtol=1e-9, atol=1e-13)


class AcrossSamples(nn.Module):
    """What becomes of a sample depends on the others."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.head = nn.Linear(3, 5), nn.Linear(5, 6), nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.a(x.mean((2, 3))))
        return self.head(self.b(x).softmax(0))


def test_samples_that_depend_on_each_other_are_not_put_beside_those_of_another_removal() -> None:
    model = randomised(AcrossSamples())
    data = data_for(model)
    network = netsurgery.trace(model, data[0][:3])
    scores = LossIncreaseScore(data, samples=8).run(network).scores["a"]
    x, y = drawn(data, 8)
    for unit in range(5):
        wanted = READINGS["effect"](changes(model, network, "a", unit, x, y))
        assert float(scores[unit]) == pytest.approx(wanted, rel=1e-6)


class ByPlace(nn.Module):
    """What a sample gives depends on where it stands in the batch."""

    def __init__(self, how: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.a, self.b, self.head, self.how = nn.Linear(3, 5), nn.Linear(5, 6), nn.Linear(6, 4), how

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.relu(self.b(self.how(torch.relu(self.a(x.mean((2, 3))))))))


@pytest.mark.parametrize("how", [
    lambda x: x.cumsum(0), lambda x: x + x.sort(0).values, lambda x: x * torch.arange(len(x))[:, None],
])  # fmt: skip
def test_samples_that_are_told_apart_by_their_place_are_not_put_beside_themselves(
    how: Callable[[Tensor], Tensor],
) -> None:
    model = randomised(ByPlace(how))
    data = data_for(model)
    network = netsurgery.trace(model, data[0][:3])
    scores = LossIncreaseScore(data, samples=8).run(network).scores["a"]
    x, y = drawn(data, 8)
    for unit in range(5):
        wanted = READINGS["effect"](changes(model, network, "a", unit, x, y))
        assert float(scores[unit]) == pytest.approx(wanted, rel=1e-6, abs=1e-12)


class Contrasted(AcrossSamples):
    """Every sample is compared with every other."""

    def forward(self, x: Tensor) -> Tensor:
        x = self.b(torch.relu(self.a(x.mean((2, 3)))))
        return x @ x.T


def contrasts(out: Tensor, _: Tensor) -> Tensor:
    """A loss of outputs that compare each sample with every other."""
    return out.logsumexp(1) - out.diagonal()


def test_outputs_that_compare_samples() -> None:
    model = randomised(Contrasted())
    data = data_for(model)[0][:8], torch.arange(8)
    network = netsurgery.trace(model, data[0][:3])
    scores = LossIncreaseScore(data, contrasts).run(network).scores["a"]
    x, y = drawn(data, 8)
    for unit in range(5):
        stay = tuple(other for other in range(5) if other != unit)
        small = netsurgery.rewrite(model, netsurgery.Edit(network, {"a": stay}))
        wanted = READINGS["effect"]((contrasts(small(x), y) - contrasts(model(x), y)).detach())
        assert float(scores[unit]) == pytest.approx(wanted, rel=1e-6, abs=1e-12)


def test_little_memory_changes_nothing() -> None:
    model = NETWORKS["concatenated"]()
    data = data_for(model)
    network = netsurgery.trace(model, data[0][:3])
    plenty = LossIncreaseScore(data, samples=12).run(network).scores
    little = LossIncreaseScore(data, samples=12, memory=1).run(network).scores
    for name, score in plenty.items():
        torch.testing.assert_close(little[name], score, rtol=0, atol=0)


def test_every_kind_of_data_gives_the_same() -> None:
    model = NETWORKS["flattened"]()
    x, y = data_for(model)
    network = netsurgery.trace(model, x[:3])
    pairs = TensorDataset(x, y)
    found = [
        LossIncreaseScore(data, samples=12).run(network).scores["conv"]
        for data in ((x, y), pairs, DataLoader(pairs, batch_size=5, shuffle=True))
    ]
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])


def test_samples_come_from_the_part_that_a_sampler_names() -> None:
    data = TensorDataset(torch.arange(50.0)[:, None], torch.arange(50) % 3)
    sampler = SubsetRandomSampler(range(40, 50))
    for loader in (
        DataLoader(data, 4, sampler=sampler),
        DataLoader(data, batch_sampler=BatchSampler(sampler, 4, False)),
    ):
        assert sorted(draw_samples(loader, 20).inputs[0][0].flatten().tolist()) == list(range(40, 50))


class Listing(Dataset[tuple[Tensor, int]]):
    """Lists the targets of other items than it has."""

    def __init__(self, listed: int) -> None:
        self.targets = [0] * listed

    def __len__(self) -> int:
        return 30

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return torch.zeros(4), index % 3


@pytest.mark.parametrize("listed", [20, 40])
def test_targets_listed_of_other_items_are_not_those_of_the_items(listed: int) -> None:
    found = draw_samples(Listing(listed), 9).targets
    assert found.bincount().tolist() == [3, 3, 3]


def test_no_samples() -> None:
    with pytest.raises(InputError, match="the data holds no samples"):
        draw_samples((torch.zeros(0, 4), torch.zeros(0).long()), 9)


def test_the_model_is_left_as_it_was() -> None:
    model = NETWORKS["residual"]().train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    data = data_for(model)
    LossIncreaseScore(data, samples=8).run(netsurgery.trace(model, data[0][:3]))
    assert all(module.training for module in model.modules())
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_a_loss_of_ones_own_and_outputs_that_are_no_logits() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = NETWORKS["flattened"]()

        def forward(self, x: Tensor) -> dict[str, Tensor]:
            return {"logits": self.inner(x)}

    model = Twice().eval()
    data = data_for(model)
    network = netsurgery.trace(model, data[0][:3])
    with pytest.raises(InputError, match=r"the model returns dict, not logits: pass loss=f\(outputs, targets\)"):
        LossIncreaseScore(data, samples=8).run(network)
    own = LossIncreaseScore(data, lambda out, y: F.cross_entropy(out["logits"], y), samples=8)
    plain = LossIncreaseScore(data, samples=8).run(netsurgery.trace(model.inner, data[0][:3]))
    torch.testing.assert_close(own.run(network).scores["inner.conv"], plain.scores["conv"], rtol=1e-9, atol=1e-13)
    wrong = LossIncreaseScore(data, lambda out, y: out["logits"], samples=8)
    with pytest.raises(InputError, match=r"the loss of 8 samples is \(8, 4\): return the mean, or one number for each"):
        wrong.run(network)


class Deciding(nn.Module):
    """Takes its way by values: it is only known where it is run."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.head = nn.Linear(3, 5), nn.Linear(5, 6), nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.a(x.mean((2, 3))))
        if float(x.detach().sum()) > -1.0:
            x = x * 2
        return self.head(torch.relu(self.b(x)))


def test_a_network_that_looks_at_values_is_cut_for_each_unit() -> None:
    model = randomised(Deciding())
    data = data_for(model)
    network = netsurgery.trace(model, data[0][:3])
    scores = LossIncreaseScore(data, samples=8).run(network).scores
    x, y = drawn(data, 8)
    for unit in range(5):
        wanted = READINGS["effect"](changes(model, network, "a", unit, x, y))
        assert float(scores["a"][unit]) == pytest.approx(wanted, rel=1e-6)


class WritesIntoViews(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.head = nn.Conv2d(3, 6, 3), nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x)
        x[:, :, 0].mul_(2)
        return self.head(x.mean((2, 3)))


def test_a_network_that_writes_into_views_is_cut_for_each_unit() -> None:
    model = randomised(WritesIntoViews())
    data = data_for(model)
    network = netsurgery.trace(model, data[0][:3])
    scores = LossIncreaseScore(data, samples=8).run(network).scores
    x, y = drawn(data, 8)
    wanted = READINGS["effect"](changes(model, network, "conv", 2, x, y))
    assert float(scores["conv"][2]) == pytest.approx(wanted, rel=1e-6)


def separable(seed: int = 0) -> tuple[nn.Module, tuple[Tensor, Tensor]]:
    """A trained network with more units than it needs, and its data."""
    torch.manual_seed(seed)
    x, y = torch.randn(1000, 8), torch.randint(4, (1000,))
    x[torch.arange(1000), y] += 3
    model = nn.Sequential(nn.Linear(8, 48), nn.ReLU(), nn.Linear(48, 4))
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    for _ in range(60):
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
    return model, (x, y)


def checkpoints(monkeypatch: pytest.MonkeyPatch) -> list[ScoreCheckpoint]:
    """What passes know of removals from now on, in the order in which they are run."""
    made: list[ScoreCheckpoint] = []
    monkeypatch.setattr(ScoreCheckpoint, "load", lambda one: made.append(one))
    return made


@pytest.mark.parametrize("by", READINGS)
def test_racing_finds_the_selection_and_sees_fewer_samples(by: Reading, monkeypatch: pytest.MonkeyPatch) -> None:
    made = checkpoints(monkeypatch)
    found, seeds = 0, 3
    for seed in range(seeds):
        model, data = separable(seed)
        network = netsurgery.trace(model, data[0][:3])
        exact = LossIncreaseScore(data, by=by).run(network).scores["0"]
        race = LossIncreaseScore(data, racing=True, by=by)
        raced = race.run(network).scores["0"]
        lowest = [set(score.argsort(stable=True)[:24].tolist()) for score in (exact, raced)]
        found += len(lowest[0] & lowest[1])
        *_, checkpoint = made
        assert int(checkpoint.entries["0"][1].sum()) < 48 * 1000 / 2
    assert found >= 0.9 * 24 * seeds
    with pytest.raises(InputError, match="racing compares samples: let the loss return one number for each"):
        LossIncreaseScore(data, F.cross_entropy, racing=True, by=by).run(network)


SCRIPT = """
    import signal, sys, time, netsurgery
    signal.signal(signal.SIGINT, signal.default_int_handler)  # processes in the background ignore it
    sys.path.insert(0, {tests!r})
    from test_loss_increase import NETWORKS, data_for
    from netsurgery.passes import LossIncreaseScore
    from netsurgery.passes.ablation import Ablation
    slow = Ablation.loss_deltas
    def loss_deltas(*args):
        for found in slow(*args):
            yield found
            print("one", flush=True)
            time.sleep(0.05)
    Ablation.loss_deltas = loss_deltas
    model = NETWORKS["residual"]()
    data = data_for(model)
    network = netsurgery.trace(model, data[0][:3])
    LossIncreaseScore(data, samples=12, rows=3, file={file!r}).run(network)
"""


def test_what_is_interrupted_goes_on_from_its_file(tmp_path: Path) -> None:
    file, tests = tmp_path / "deep" / "scores.safetensors", Path(__file__).parent
    script = textwrap.dedent(SCRIPT.format(tests=str(tests), file=str(file)))
    process = subprocess.Popen(
        [sys.executable, "-c", script], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env={**os.environ, "PYTHONPATH": str(tests.parent)},
    )  # fmt: skip
    assert process.stdout is not None
    for _ in range(9):
        assert process.stdout.readline() == "one\n"
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert "KeyboardInterrupt" in errors and file.exists()

    model = NETWORKS["residual"]()
    data = data_for(model)
    network = netsurgery.trace(model, data[0][:3])
    half = LossIncreaseScore(data, samples=12, rows=3, file=file)
    resumed = half.run(network).scores
    whole = LossIncreaseScore(data, samples=12, rows=3).run(network).scores
    for name, score in whole.items():
        torch.testing.assert_close(resumed[name], score, rtol=1e-12, atol=1e-15)
    other = NETWORKS["residual"]()
    other.head.weight.data += 1
    with pytest.raises(InputError, match="holds scores of another model, other samples or other settings: remove it"):
        LossIncreaseScore(data, samples=12, rows=3, file=file).run(netsurgery.trace(other, data[0][:3]))
    file.write_bytes(b"no scores")
    with pytest.raises(InputError, match=r"cannot be read .*: remove it, or name another file"):
        LossIncreaseScore(data, samples=12, rows=3, file=file).run(network)
    assert json.dumps(sorted(p.name for p in file.parent.iterdir())) == '["scores.safetensors"]'


@pytest.mark.parametrize("place", ["file/scores", "folder", "/proc/nowhere/scores"])
def test_a_file_that_cannot_be_written_is_known_before_the_work(
    place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(LossIncreaseScore, "_exact", None)  # calling it would fail
    (tmp_path / "file").write_text("precious")
    (tmp_path / "folder").mkdir()
    model, data = small_regression()

    score = LossIncreaseScore(data, nn.MSELoss(), file=tmp_path / place)
    with pytest.raises(InputError, match=r"cannot be written to \(.*\): name another file$"):
        score.run(netsurgery.trace(model, data[0]))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "folder"]


def small_regression() -> tuple[nn.Module, tuple[Tensor, Tensor]]:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3)), (torch.randn(20, 4), torch.randn(20, 3))


def squares(outputs: Tensor, targets: Tensor, times: float = 1.0) -> Tensor:
    return times * (lambda difference: difference.square().mean())(outputs - targets)


@pytest.mark.parametrize(("one", "other"), [
    (lambda o, t: F.l1_loss(o, t), lambda o, t: F.mse_loss(o, t)),
    (functools.partial(squares, times=1.0), functools.partial(squares, times=5.0)),
    (nn.CrossEntropyLoss(), nn.CrossEntropyLoss(label_smoothing=0.5)),
    (nn.MSELoss(), lambda o, t: (o - o.detach()).square().mean()),
])  # fmt: skip
def test_a_file_is_of_one_loss(one: Loss, other: Loss, tmp_path: Path) -> None:
    model, data = small_regression()
    network = netsurgery.trace(model, data[0])
    first = LossIncreaseScore(data, one, file=tmp_path / "scores").run(network).scores["0"]
    assert torch.equal(LossIncreaseScore(data, one, file=tmp_path / "scores").run(network).scores["0"], first)
    with pytest.raises(InputError, match="holds scores of another model, other samples or other settings"):
        LossIncreaseScore(data, other, file=tmp_path / "scores").run(network)


def test_a_loss_is_known_again_in_another_process() -> None:
    """What code repeats of itself, such as the address of a function within, changes nothing."""
    model, data = small_regression()
    network = netsurgery.trace(model, data[0])
    losses = [functools.partial(squares, times=2.0) for _ in range(2)]
    one, other = (Ablation(AblationSettings(loss), network, draw_samples(data, 20)).fingerprint() for loss in losses)
    assert one == other


@pytest.mark.parametrize("mode", ["score", "cumulative", "per-group"])
def test_a_loss_that_is_not_finite_is_refused(mode: Literal["score", "cumulative", "per-group"]) -> None:
    model, data = small_regression()
    score = LossIncreaseScore(data, lambda o, t: o.mean() * float("nan"), mode=mode)
    with pytest.raises(InputError, match="the loss of the model as it is, is NaN or infinite: look at its weights"):
        score.run(netsurgery.trace(model, data[0]))


def test_targets_that_are_no_classes() -> None:
    model, (x, _) = small_regression()
    network = netsurgery.trace(model, x)
    for targets, found in ((torch.randn(20), "float32 (20,)"), (torch.zeros(20, 1).long(), "int64 (20, 1)")):
        shown = found.replace("20", "16")  # of the first few
        with pytest.raises(
            InputError, match=re.escape(f"the model returns (16, 3) and targets are torch.{shown}, nei")
        ):
            LossIncreaseScore((x, targets)).run(network)
    classes = torch.randint(3, (20,))
    whole = LossIncreaseScore((x, classes)).run(network).scores["0"]
    assert torch.equal(LossIncreaseScore((x, classes.to(torch.uint8))).run(network).scores["0"], whole)


def test_products_in_a_shorter_type() -> None:
    model = NETWORKS["residual"]().float()
    x, y = data_for(model)
    data = x.float(), y
    network = netsurgery.trace(model, data[0][:3])
    exact = LossIncreaseScore(data, samples=12).run(network).scores["a"]
    short = LossIncreaseScore(data, samples=12, autocast=torch.bfloat16).run(network).scores["a"]
    assert not torch.equal(short, exact)
    assert float((short - exact).abs().max()) < 0.1 * float(exact.abs().max())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"mode": "all"}, r"LossIncreaseScore\(mode='all'\): 'score', 'cumulative' or 'per-group'"),
        ({"racing": True, "mode": "cumulative"}, "goes with mode='score'"),
        ({"share": 1.0}, r"share=1.0\): a number in \(0, 1\)"),
        ({"tolerance": -1.0}, r"tolerance=-1.0\): must not be negative"),
        ({"rows": 0}, "a whole number of at least 1"),
        ({"samples": 0}, "a whole number of at least 1"),
        ({"by": "sign"}, r"LossIncreaseScore\(by='sign'\): 'effect' or 'rise'"),
        ({"by": "effect", "mode": "cumulative"}, r"by='effect'\) goes with mode='score': mode='cumulative' holds the"),
        ({"by": "effect", "mode": "per-group"}, r"by='effect'\) goes with mode='score': mode='per-group' holds the"),
    ],
)
def test_settings_that_cannot_be_are_refused(settings: dict[str, object], message: str) -> None:
    with pytest.raises(InputError, match=message):
        LossIncreaseScore((), **settings)  # type: ignore[arg-type]

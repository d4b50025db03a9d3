"""Models whose code looks at values: they are recorded with them, and compared along the path that was recorded."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torchvision
from torch import Tensor, nn

import netsurgery
from netsurgery.analysis.replay import replay, with_constants
from netsurgery.capture import known_values as values
from netsurgery.capture.operations import OpCall
from netsurgery.capture.recorder import record
from netsurgery.errors import InputError, TraceError
from netsurgery.passes import PruneChannels, RandomScore
from netsurgery.verification import permuted_difference
from oracles import check, snapshot

X = torch.randn(6, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
HALF = [RandomScore(seed=1), PruneChannels(0.5)]


class Net(nn.Module):
    """Code between a first layer of 8 units, and two last ones."""

    def __init__(self, run: Callable[..., Any]):
        super().__init__()
        self.run = run
        self.a, self.b, self.c = nn.Linear(4, 8), nn.Linear(8, 3), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Any:
        h = self.a(x)
        return self.run(self, h), 0 * (self.b(h) + self.c(h))


def net(run: Callable[..., Any], seed: int = 0) -> Net:
    torch.manual_seed(seed)
    return Net(run).double().eval()


def loop(m: Net, h: Tensor) -> Tensor:
    for _ in range(int(h.abs().sum()) % 3 + 1):
        h = h * 1.5
    return m.b(h)


def written(m: Net, h: Tensor) -> Tensor:
    h = h.clone()
    h[h.mean(1) > 0] = 0.5
    h[h.amax(1) > 1] = h[h.amax(1) > 1] * 2
    return m.b(h) * h.sum().item()


def table(m: Net, h: Tensor) -> Tensor:
    means = torch.zeros(6, dtype=h.dtype)
    means[:3] = h.mean(1)[:3]
    return m.b(h) * means.sum().item()


def buckets(m: Net, h: Tensor) -> Tensor:
    found, place, count = torch.unique((h.sum(1) * 2).long(), return_inverse=True, return_counts=True)
    sums = h.new_zeros(len(found), h.shape[1]).index_add_(0, place, h)
    return m.b(sums / count[:, None])


def kept_boxes(m: Net, h: Tensor) -> dict[str, Any]:
    corners = m.b(h).abs()[:, [0, 1]]
    boxes = torch.cat([corners, corners + 1 + m.c(h).abs()[:, :2]], 1)
    keep = torchvision.ops.batched_nms(boxes, h.mean(1), (h.mean(1) > 0).long(), 0.3)
    return {"boxes": boxes[keep], "labels": (h.mean(1) > 0)[keep], "features": [m.b(row) for row in h[keep]]}


def flags_of_units(m: Net, h: Tensor) -> Tensor:
    """A decision for each unit, which goes with it."""
    return (m.b(h * (h > 0.1)) + m.c(torch.where(h < 0, h, 0.0))) * h.amax().item()


#: What the code does, and what of it is compared.
LOOKS: dict[str, Callable[..., Any]] = {
    "a branch": lambda m, h: m.b(h) if h.sum() > 0 else m.c(h),
    "a loop": loop,
    "an item": lambda m, h: m.b(h) * h.mean().item(),
    "a list": lambda m, h: m.b(h) * sum(h.mean(1).tolist()),
    "an array": lambda m, h: m.b(h) * float(h.mean(1).cpu().numpy().sum()),
    "a tensor of items": lambda m, h: m.b(h) * torch.tensor([h.mean(), h.amax(), 1.0]),
    "a new tensor of items": lambda m, h: m.b(h) * h.new_tensor([h.mean(), h.amax(), 1.0]),
    "equality": lambda m, h: m.b(h) if torch.equal(h, h * 2) else m.c(h),
    "flags of units": flags_of_units,
    "rows of a mask": lambda m, h: m.b(h[h.mean(1) > 0]),
    "no rows": lambda m, h: m.b(h[h.mean(1) > 1e9][:, :, None].flatten(1)),
    "rows written": written,
    "nonzero": lambda m, h: m.b(h.index_select(0, (h.mean(1) > 0).nonzero()[:, 0])),
    "the place of the largest": lambda m, h: m.b(h[h.mean(1).argmax().item()]),
    "some of the best": lambda m, h: m.b(h[h.mean(1).topk(3)[1]]) * h.mean(1).topk(int((h.mean(1) > 9).sum()) + 3)[0],
    "a sort": lambda m, h: m.b(h[h.mean(1).sort()[1][h.mean(1).sort(descending=True)[0] > 0]]),
    "largest of rows": lambda m, h: m.b(h) * h[(h @ h.T).max(1)[1]].mean().item() + (h @ h.T).max(1)[0][:, None],
    "repeats": lambda m, h: m.b(h.repeat_interleave((h.mean(1) > 0).long() + 1, 0)),
    "a table": table,
    "buckets": buckets,
    "boxes": kept_boxes,
}


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("name", LOOKS)
def test_code_that_looks_at_values(name: str, seed: int) -> None:
    _, edit = check(net(LOOKS[name], seed), (X,), 1e-10, seed)
    assert edit.network.programs[0].values == "all"
    assert "a" in [group.name for group in edit.network.prunable]


#: What is known without running the network: nothing is decided, and the network's weights are not needed.
KNOWN: dict[str, Callable[..., Any]] = {
    "positions": lambda m, h: m.b(h) if bool((torch.arange(len(h)).diff() == 1).all()) else m.c(h),
    "a constant": lambda m, h: m.b(h) * torch.tensor(2.5).sqrt().item(),
    "an array of positions": lambda m, h: m.b(h) * float(torch.arange(len(h)).numpy().sum()),
    "a mask": lambda m, h: m.b(h[torch.arange(len(h)) % 2 == 0]),
    "a table in the making": lambda m, h: m.b(h) * torch.zeros(3).index_fill_(0, torch.tensor([1]), 2.0).sum().item(),
}


@pytest.mark.parametrize("name", KNOWN)
def test_values_that_are_known_without_the_network(name: str) -> None:
    _, edit = check(net(KNOWN[name]), (X,), 1e-10)
    assert edit.network.programs[0].values == "known"
    assert edit.counts.keys() == {"a"}
    with torch.device("meta"):
        bare = Net(KNOWN[name])
    assert [group.name for group in netsurgery.trace(bare, X.float().to("meta")).prunable] == ["a"]


#: Code that follows a size through a value.
SIZES: dict[str, Callable[..., Any]] = {
    "a root": lambda m, h: m.b(h) / torch.tensor(float(h.shape[1])).sqrt().item(),
    "a sum": lambda m, h: m.b(h) * torch.arange(h.shape[1]).sum().item(),
    "a list": lambda m, h: m.b(h) * torch.tensor(h.shape).tolist()[1],
    "a branch": lambda m, h: m.b(h) if torch.tensor(h.shape).amax() > 6 else m.c(h),
    "beside the data": lambda m, h: m.b(h) * (h.mean() * torch.tensor(h.shape[1])).item(),
    "a number of rows": lambda m, h: m.b(h[: int(torch.tensor(h.shape[1])) // 2]),
}


@pytest.mark.parametrize("name", SIZES)
def test_code_that_follows_a_size_through_a_value_locks(name: str) -> None:
    assert netsurgery.trace(net(SIZES[name]), X)["a"].locked


class Quantised(nn.Module):
    """The output depends on the first layer through a decision alone."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.codes = nn.Linear(4, 8), nn.Linear(8, 5), nn.Embedding(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        place = self.b(self.a(x)).argmax(1)
        return self.codes(place) * (1 if bool((place >= 0).all()) else 2)


def test_the_numbers_that_decisions_are_taken_from_are_compared() -> None:
    torch.manual_seed(0)
    model = Quantised().double()
    edit = netsurgery.plan(model, HALF, X)
    small = netsurgery.rewrite(model, edit)
    assert netsurgery.verify(model, small, edit, X) < 1e-12
    with torch.no_grad():
        small.a.weight[0] += 1e-3  # too little to change a decision
    assert torch.equal(small(X), netsurgery.rewrite(model, edit)(X))
    assert netsurgery.verify(model, small, edit, X) > 1e-6


def ranked(m: Net, h: Tensor) -> tuple[Tensor, ...]:
    best, which = h.mean(1).topk(3)
    rows, order = h.sort(0, descending=True)
    large, where = h.max(1)
    return best, which, rows, order, large, where, m.b(h) * h.mean().item()


def test_numbers_that_go_with_a_choice_are_those_of_the_new_inputs() -> None:
    model, other = net(ranked), X.flip(0) * 2 + X
    with torch.no_grad():
        best, which, rows, order, large, where, _ = replay(
            netsurgery.trace(model, X).programs[0], dict(model.named_parameters()), ((other,), {})
        )[:7]
        before, after = model.a(X), model.a(other)
    assert torch.equal(which, before.mean(1).topk(3)[1]) and not torch.equal(which, after.mean(1).topk(3)[1])
    assert torch.equal(order, before.sort(0, descending=True)[1]) and torch.equal(where, before.max(1)[1])
    assert torch.allclose(best, after.mean(1)[which]) and torch.allclose(rows, after.gather(0, order))
    assert torch.allclose(large, after[range(6), where])


class Tie(nn.Module):
    """Which branch runs depends on rounding: both sums are equal but for their order."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.p, self.q = nn.Linear(4, 64), nn.Linear(4, 64), nn.Linear(64, 3), nn.Linear(64, 3)
        self.order = torch.randperm(64).tolist()
        self.b.weight.data, self.b.bias.data = self.a.weight.data[self.order], self.a.bias.data[self.order]

    def forward(self, x: Tensor) -> Tensor:
        a, b = self.a(x), self.b(x)
        rows = [self.p(u) if s > t else self.q(v) for u, v, s, t in zip(a, b, a.sum(1), b.sum(1), strict=True)]
        return torch.stack(rows)


def test_rounding_does_not_change_the_path() -> None:
    torch.manual_seed(0)
    model, x = Tie(), torch.randn(32, 4)
    network = netsurgery.trace(model, x)
    assert [group.name for group in network.prunable] == ["a", "b"]
    assert permuted_difference(model, network, x) < 1e-5
    edit = netsurgery.Edit(network, {"a": range(32), "b": [i for i, unit in enumerate(model.order) if unit < 32]})
    small = netsurgery.rewrite(model, edit)
    assert netsurgery.verify(model, small, edit, x) < 1e-5
    for node in network.programs[0].operations:  # what is decided anew takes another path
        node.meta.pop("decided", None)
    assert netsurgery.verify(model, small, edit, x) > 0.1


class Writes(nn.Module):
    """Writes into all it is given, and looks at the result."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 8), nn.Linear(8, 3)
        self.norm = nn.BatchNorm1d(8)
        self.count = nn.Buffer(torch.zeros((), dtype=torch.int64))
        self.total = nn.Buffer(torch.zeros(8))
        self.log: list[Tensor] = [torch.zeros(3)]

    def forward(self, x: Tensor) -> Tensor:
        self.count += 1
        x.mul_(2)
        self.a.weight[1:3].clamp_(-0.1, 0.1)
        h = nn.functional.batch_norm(self.a(x), self.norm.running_mean, self.norm.running_var, training=True)
        self.total += h.sum(0)
        self.log[0] += torch.rand(3)
        self.log.append(h)
        return self.b(h) * self.total.mean().item() * self.count.item() + self.log[0].sum()


def test_the_model_the_inputs_and_the_random_state_stay_as_they_are() -> None:
    torch.manual_seed(0)
    model, x = Writes().requires_grad_(False).eval(), torch.randn(6, 4)
    before, given, state = snapshot(model), x.clone(), torch.get_rng_state()
    values_before = copy.deepcopy(model.log)
    versions = [tensor._version for tensor in (*model.parameters(), *model.buffers(), x)]
    program = record(model, ((x,), {}))
    assert program.values == "all"
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert torch.equal(x, given) and torch.equal(torch.get_rng_state(), state)
    assert len(model.log) == 1 and torch.equal(model.log[0], values_before[0])
    assert versions == [tensor._version for tensor in (*model.parameters(), *model.buffers(), x)]
    assert not model.training
    decided = [node.meta["decided"] for node in program.operations if "decided" in node.meta]
    assert decided == [node.meta["decided"] for node in record(model, ((x,), {})).operations if "decided" in node.meta]
    assert decided[-1] == 1  # the count of the run
    with torch.no_grad():
        torch.manual_seed(0)
        model(x.clone())
    assert decided[0] == pytest.approx(model.total.mean().item(), rel=1e-5)


def test_memory_is_let_go(monkeypatch: pytest.MonkeyPatch) -> None:
    """A deep network that looks at its last activation: at no time are more than a few of them kept."""
    most = 0

    class Counting(values.ConcreteValues):
        def run(self, call: OpCall) -> Any:
            nonlocal most
            held = {v.untyped_storage().data_ptr(): v.untyped_storage().nbytes() for _, v in self.of.items.values()}
            most = max(most, sum(held.values()))
            return super().run(call)

    monkeypatch.setattr("netsurgery.capture.recorder.ConcreteValues", Counting)

    class Deep(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList(nn.Linear(4, 4) for _ in range(30))

        def forward(self, x: Tensor) -> Tensor:
            for layer in self.layers:
                x = torch.relu(layer(x))
            return x * x.mean().item()

    x = torch.randn(10_000, 4)
    assert record(Deep(), ((x,), {})).values == "all"
    assert 2 * x.nbytes < most < 6 * x.nbytes


def test_inputs_without_data_are_drawn() -> None:
    model = net(LOOKS["a branch"])
    bare = X.to("meta")
    first, second = (record(model, ((bare,), {})) for _ in range(2))
    assert first.values == "all" and str(first.graph) == str(second.graph)
    for example in (bare, None):
        edit = netsurgery.plan(model, HALF, example)
        assert netsurgery.verify(model, netsurgery.rewrite(model, edit), edit) < 1e-10


def test_a_model_without_data_whose_code_looks_at_values_is_refused() -> None:
    with torch.device("meta"):
        model = Net(LOOKS["a branch"])
    message = r"aten._local_scalar_dense.*test_known_values.py:\d+\), but 'a.weight' has none: it is on the meta device"
    with pytest.raises(TraceError, match=message):
        netsurgery.trace(model, torch.randn(6, 4))


def where_it_is(m: Net, h: Tensor) -> Tensor:
    assert h.device == torch.device("cpu") and h.is_cpu and not h.is_cuda and not h.is_meta
    ones = torch.ones(3, device=h.device, dtype=h.dtype) + torch.tensor([0.0, 1.0, 2.0], device=h.device)
    return m.b(h.to(h.device).cpu()[:, list(range(8))]) * ones.to("cpu") + h.new_tensor([1, 2, 3])


def test_code_that_asks_where_a_tensor_is() -> None:
    _, edit = check(net(where_it_is), (X,), 1e-10)
    assert edit.network.programs[0].values == "none"
    assert not any(value.is_meta for value in edit.network.programs[0].constants.values())


def test_constants_are_looked_up_in_a_network_of_their_own() -> None:
    model = net(lambda m, h: m.b(h) * torch.tensor([1.0, 2.0, 3.0], dtype=h.dtype))
    network = netsurgery.trace(model, (X,))
    (program,) = network.programs
    unknown = {name: value.to("meta") for name, value in program.constants.items()}
    bare = dataclasses.replace(network, programs=(dataclasses.replace(program, constants=dict(unknown)),))
    (found,) = with_constants(model, bare, ((X,), {})).programs
    assert unknown and all(torch.equal(found.constants[name], value) for name, value in program.constants.items())
    assert bare.programs[0].constants == unknown  # a network changes nothing


def test_a_small_model_that_does_something_else_is_refused() -> None:
    model = net(LOOKS["a branch"])
    edit = netsurgery.plan(model, HALF, X)
    small = netsurgery.rewrite(model, edit)
    small.run = lambda m, h: m.b(torch.relu(h)) if h.sum() > 0 else m.c(torch.relu(h))
    with pytest.raises(InputError, match=r"does not do what the original did at .*test_known_values.py:\d+: aten.relu"):
        netsurgery.verify(model, small, edit, X)


def test_python_that_reads_what_another_run_knows() -> None:
    """At other sizes the code reads values that it did not read before."""
    model = net(lambda m, h: m.b(h) if h.shape[1] == 8 else m.b(h) * h.mean().tolist())
    assert "the code" in (netsurgery.trace(model, X)["a"].locked or "")


class Few(nn.Module):
    """Layers that run on those rows alone whose mean is above a threshold."""

    def __init__(self) -> None:
        super().__init__()
        self.threshold = 0.0
        self.a, self.conv, self.norm = nn.Linear(4, 8), nn.Conv2d(8, 6, 1), nn.GroupNorm(2, 6)
        self.up, self.b, self.c = nn.ConvTranspose2d(6, 5, 2), nn.Linear(45, 7), nn.Linear(7, 3)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        h = self.a(x)
        rows = h[h.mean(1) > self.threshold]
        maps = torch.relu(self.norm(self.conv(rows[:, :, None, None].expand(-1, -1, 2, 2))))
        last = self.b(self.up(maps).flatten(1))
        return h, torch.softmax(self.c(torch.cat([last, last[:0]])), 1)


def test_layers_that_run_on_no_rows_are_coupled_as_on_some() -> None:
    torch.manual_seed(0)
    model = Few().double().eval()
    network = netsurgery.trace(model, X)
    model.threshold = 1e9
    empty = netsurgery.trace(model, X)
    assert {g.name: (g.size, g.members, g.locked is None) for g in empty.groups} == {
        g.name: (g.size, g.members, g.locked is None) for g in network.groups
    }
    assert [group.name for group in empty.prunable] == ["conv", "conv:2", "up", "b"]
    edit = netsurgery.Edit(network, netsurgery.plan(model, HALF, X).keep)  # planned where no row runs
    model.threshold = 0.0
    assert netsurgery.verify(model, netsurgery.rewrite(model, edit), edit, X) < 1e-10


class Expert(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.gate, self.down = nn.Linear(8, 10), nn.Linear(8, 10), nn.Linear(10, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(nn.functional.silu(self.gate(x)) * self.up(x))


class Experts(nn.Module):
    """Each token goes to the two experts that score it best, as in Mixtral; experts are modules of their own."""

    def __init__(self, count: int = 3) -> None:
        super().__init__()
        self.gate = nn.Linear(8, count, bias=False)
        self.experts = nn.ModuleList(Expert() for _ in range(count))

    def forward(self, x: Tensor) -> Tensor:
        weights, chosen = self.gate(x).softmax(-1).topk(2)
        weights = weights / weights.sum(-1, keepdim=True)
        out = torch.zeros_like(x)
        mask = nn.functional.one_hot(chosen, len(self.experts)).permute(2, 1, 0)
        for index in mask.sum((-1, -2)).nonzero():
            rank, token = torch.where(mask[index].squeeze(0))
            out.index_add_(0, token, self.run(index, x[token]) * weights[token, rank, None])
        return out

    def run(self, index: Tensor, x: Tensor) -> Tensor:
        return self.experts[index](x)


class Stacked(Experts):
    """All experts in three-dimensional parameters."""

    def __init__(self, count: int = 3) -> None:
        nn.Module.__init__(self)
        self.gate = nn.Linear(8, count, bias=False)
        self.experts = range(count)
        self.up, self.down = nn.Parameter(torch.randn(count, 20, 8)), nn.Parameter(torch.randn(count, 8, 10))

    def run(self, index: Tensor, x: Tensor) -> Tensor:
        gate, up = nn.functional.linear(x, self.up[index[0]]).chunk(2, -1)
        return nn.functional.linear(nn.functional.silu(gate) * up, self.down[index[0]])


class Routed(nn.Module):
    def __init__(self, experts: nn.Module) -> None:
        super().__init__()
        self.a, self.norm, self.experts, self.b = nn.Linear(4, 8), nn.RMSNorm(8), experts, nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = self.a(x)
        return self.b(h + self.experts(self.norm(h)))


@pytest.mark.parametrize("seed", range(2))
def test_experts_that_are_modules(seed: int) -> None:
    torch.manual_seed(seed)
    model = Routed(Experts()).double()
    _, edit = check(model, (torch.randn(24, 4, dtype=torch.float64),), 1e-10, seed)
    widths = {f"experts.experts.{i}.up" for i in range(3)}
    assert {group.name for group in edit.network.prunable} == {"a", *widths}
    assert "identified by position: aten.topk" in edit.network["experts.gate"].locked


@pytest.mark.parametrize("seed", range(2))
def test_experts_in_one_parameter(seed: int) -> None:
    torch.manual_seed(seed)
    model = Routed(Stacked()).double()
    small, edit = check(model, (torch.randn(24, 4, dtype=torch.float64),), 1e-10, seed)
    assert [group.name for group in edit.network.prunable] == ["a", "experts:2"]
    count, width = small.experts.up.shape[0], small.experts.down.shape[2]
    assert count == 3 and small.experts.up.shape[1] == 2 * width < 20
    stacks = [g for g in edit.network.groups if ("experts.up", 0) in [(m.parameter, m.axis) for m in g.members]]
    assert "identified by position: aten.select" in stacks[0].locked


def test_an_expert_that_no_token_chooses_keeps_its_width() -> None:
    torch.manual_seed(0)
    model = Routed(Experts()).double()
    with torch.no_grad():
        model.experts.gate.weight[0] = 0
        model.a.bias[0] = 1e3
        model.experts.gate.weight[1:, 0] = 10.0
    network = netsurgery.trace(model, X)
    assert network["experts.experts.0.up"].locked == "the recorded run does not use this tensor"
    assert network["experts.experts.1.up"].locked is None

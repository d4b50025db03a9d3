"""What apply promises: the user's own model, smaller, everything else as it was; and errors that leave no trace."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
from torch import Tensor, nn

import netsurgery
from netsurgery.errors import InputError, PassError, RewriteError, TraceError
from netsurgery.passes import HGSRScore, MagnitudeScore, PruneChannels, RandomScore


class Block(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.conv1 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, groups=2)
        self.norm = nn.GroupNorm(2, width)
        self.drop = nn.Dropout(0.5)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(x + self.drop(self.norm(self.conv2(torch.relu(self.bn1(self.conv1(x)))))))


class Small(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.block = Block(8)
        self.head = nn.Linear(8 * 16, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.block(self.stem(x)).flatten(1))


X = torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(0))
HALF = [MagnitudeScore(), PruneChannels(0.5)]


def randomised(model: nn.Module, seed: int = 0) -> nn.Module:
    generator = torch.Generator().manual_seed(seed)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.copy_(torch.randn(module.num_features, generator=generator) * 0.3)
            module.running_var.copy_(torch.rand(module.num_features, generator=generator) + 0.5)
        if isinstance(module, nn.BatchNorm2d | nn.GroupNorm):
            module.weight.data.copy_(torch.rand(module.weight.shape, generator=generator) + 0.5)
            module.bias.data.copy_(torch.randn(module.weight.shape, generator=generator))
    return model


@pytest.fixture
def model() -> nn.Module:
    torch.manual_seed(0)
    return randomised(Small())


def test_golden_diff(model: nn.Module) -> None:
    edit = netsurgery.plan(model, HALF, (X,))
    assert (
        edit.diff()
        == """\
stem.weight 8x3x3x3 -> 4x3x3x3
stem.bias 8 -> 4
block.conv1.weight 8x8x3x3 -> 4x4x3x3
block.bn1.weight 8 -> 4
block.bn1.bias 8 -> 4
block.bn1.running_mean 8 -> 4
block.bn1.running_var 8 -> 4
block.conv2.weight 8x4x3x3 -> 4x2x3x3
block.conv2.bias 8 -> 4
block.norm.weight 8 -> 4
block.norm.bias 8 -> 4
head.weight 5x128 -> 5x64
parameters 1,773 -> 673 (38.0%)
MACs 35,840 -> 11,008 (30.7%)"""
    )


def test_result_is_the_users_model(model: nn.Module) -> None:
    small = netsurgery.apply(model, HALF, (X,))
    assert type(small) is Small and type(small.block) is Block
    assert list(small.state_dict()) == list(model.state_dict())
    edit = netsurgery.plan(model, HALF, (X,))
    assert netsurgery.verify(model, small, edit, (X,)) < 1e-6
    assert netsurgery.cost(small, (X,)) == edit.after
    assert (small.stem.out_channels, small.block.conv1.in_channels, small.block.bn1.num_features) == (4, 4, 4)
    conv, norm = small.block.conv2, small.block.norm
    assert (conv.in_channels, conv.out_channels, conv.groups) == (4, 4, 2)
    assert (norm.num_groups, norm.num_channels, small.head.in_features) == (2, 4, 64)


def test_the_given_model_stays_as_it_was(model: nn.Module) -> None:
    before = copy.deepcopy(model)
    ids = [id(p) for p in model.parameters()]
    netsurgery.apply(model, HALF, (X,))
    assert ids == [id(p) for p in model.parameters()]
    assert str(model) == str(before) and model.training
    for name, tensor in before.state_dict().items():
        assert torch.equal(tensor, model.state_dict()[name])
    assert all("forward" not in module.__dict__ for module in model.modules())


def test_nothing_is_shared_with_the_given_model(model: nn.Module) -> None:
    small = netsurgery.apply(model, HALF, (X,))
    storages = {t.untyped_storage().data_ptr() for t in model.state_dict().values()}
    assert not storages & {t.untyped_storage().data_ptr() for t in small.state_dict().values()}


@pytest.mark.parametrize("training", [True, False])
def test_what_survives(model: nn.Module, training: bool) -> None:
    seen: list[str] = []
    model.train(training)
    model.block.drop.eval()
    model.block.conv1.register_forward_hook(lambda *_: seen.append("hook"))
    model.stem.weight.requires_grad_(False)
    model.stem.weight.note = "mine"
    model = model.to(torch.float64).to(memory_format=torch.channels_last)
    small = netsurgery.apply(model, HALF, (X.double(),))
    assert small.training is training and not small.block.drop.training
    assert not small.stem.weight.requires_grad and small.block.conv1.weight.requires_grad
    assert small.stem.weight.note == "mine"
    assert small.stem.weight.dtype == torch.float64
    assert small.stem.weight.is_contiguous(memory_format=torch.channels_last)
    assert list(map(len, (small.block.conv1._forward_hooks, model.block.conv1._forward_hooks))) == [1, 1]
    seen.clear()
    small(X.double())
    assert seen == ["hook"]


def test_inplace_keeps_parameter_objects(model: nn.Module) -> None:
    expected = netsurgery.apply(model, HALF, (X,))
    objects = dict(model.named_parameters())
    model(X).sum().backward()
    assert netsurgery.apply(model, HALF, (X,), inplace=True) is model
    for name, parameter in model.named_parameters():
        assert parameter is objects[name]
        assert torch.equal(parameter, expected.state_dict()[name])
        assert parameter.grad.shape == parameter.shape
    model(X).sum().backward()


def test_tied_parameters_stay_tied() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(6, 6), nn.Linear(6, 6)
            self.b.weight = self.a.weight
            self.out = nn.Linear(6, 2)
            self.first = nn.Linear(3, 6)

        def forward(self, x: Tensor) -> Tensor:
            return self.out(self.b(torch.relu(self.a(self.first(x)))))

    model, x = Tied(), torch.randn(2, 3)
    for inplace in (False, True):
        edit = netsurgery.plan(model, [RandomScore(1), PruneChannels(0.5)], (x,))
        original = copy.deepcopy(model)
        small = netsurgery.rewrite(model, edit, inplace=inplace)
        assert small.a.weight is small.b.weight and small.a.weight.shape == (3, 3)
        assert netsurgery.verify(original, small, edit, (x,)) < 1e-6


def test_several_removals_compose(model: nn.Module) -> None:
    passes = [RandomScore(0), PruneChannels(0.25), MagnitudeScore(), PruneChannels(0.5)]
    edit = netsurgery.plan(model, passes, (X,))
    assert edit.after.params < netsurgery.plan(model, passes[:2], (X,)).after.params
    assert netsurgery.verify(model, netsurgery.rewrite(model, edit), edit, (X,)) < 1e-6


def test_same_plan_twice_is_equal_and_survives_json(model: nn.Module) -> None:
    one, two = (netsurgery.plan(model, HALF, (X,)) for _ in range(2))
    assert one == two
    assert netsurgery.Edit.from_json(one.to_json(), netsurgery.trace(model, (X,))) == one


def test_save_and_load(model: nn.Module, tmp_path) -> None:
    edit = netsurgery.plan(model, HALF, (X,))
    small = netsurgery.rewrite(model, edit).eval()
    netsurgery.save(tmp_path / "small", small, edit)
    again = netsurgery.load(tmp_path / "small", Small()).eval()
    assert torch.equal(small(X), again(X))
    with pytest.raises(InputError, match=r"holds no edit.json"):
        netsurgery.load(tmp_path, Small(), (X,))
    with pytest.raises(InputError, match="another model"):
        netsurgery.load(tmp_path / "small", nn.Linear(3, 4), torch.zeros(1, 3))


@pytest.mark.parametrize(
    ("layer", "shape"),
    [
        (nn.Conv2d(3, 4, 3), (1, 3, 224, 224)),
        (nn.Conv1d(2, 4, 3), (1, 2, 224)),
        (nn.Linear(7, 4), (1, 7)),
        (nn.Sequential(nn.Conv2d(1, 4, 3), nn.Flatten(), nn.Linear(4 * 36, 2)), (1, 1, 8, 8)),
    ],
)
def test_inputs_are_inferred(layer: nn.Module, shape: tuple[int, ...]) -> None:
    assert netsurgery.trace(layer).inputs[0][0].shape == shape


def test_inputs_that_cannot_be_inferred_are_asked_for() -> None:
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(3, 3)

        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            return self.fc(x) + y

    with pytest.raises(
        TraceError, match=r"no example input could be inferred for Odd: pass example_inputs=\(tensor, \.\.\.\)"
    ):
        netsurgery.trace(Odd())
    x = torch.zeros(1, 3)
    for inputs in ((x, x), {"x": x, "y": x}):
        assert netsurgery.trace(Odd(), inputs).model_name == "Odd"


def test_inputs_that_do_not_fit(model: nn.Module) -> None:
    with pytest.raises(TraceError, match=r"aten\.convolution.* in module 'stem'") as caught:
        netsurgery.trace(model, (torch.zeros(1, 4, 4, 4),))
    assert "test_pipeline.py:" in str(caught.value)
    with pytest.raises(TraceError, match=r"Small does not run on inputs of shape .*Pass example_inputs that fit"):
        netsurgery.trace(model, (X, X))
    with pytest.raises(InputError, match=r"expected a torch.nn.Module, got builtin_function"):
        netsurgery.trace(torch.relu, (X,))


@pytest.mark.parametrize(
    ("passes", "message"),
    [
        ([], "no passes given"),
        ([PruneChannels(0.5)], r"pass 1, PruneChannels\(.*needs scores, which no pass before it gives"),
        ([PruneChannels(0.5), HGSRScore(), PruneChannels(0.5)], r"pass 1, .*needs scores"),
        ([HGSRScore()], "no pass gives an edit"),
        ([HGSRScore, PruneChannels(0.5)], "passes are instances"),
    ],
)
def test_order_of_passes_is_checked_before_anything_runs(passes: list, message: str) -> None:
    class Explodes(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            raise RuntimeError("was run")

    with pytest.raises(PassError, match=message):
        netsurgery.apply(Explodes(), passes, (X,))


def test_a_module_whose_units_are_in_another_group() -> None:
    class Sum(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = nn.Linear(3, 8), nn.Linear(3, 8), nn.Linear(8, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.c(self.a(x) + self.b(x))

    with pytest.raises(InputError, match="'b' is no group of this network; the units of that module are in 'a'"):
        netsurgery.trace(Sum(), torch.randn(2, 3))["b"]


def test_a_pass_that_returns_something_else(model: nn.Module) -> None:
    @dataclass(frozen=True)
    class Wrong(netsurgery.Pass):
        gives: ClassVar[frozenset[str]] = frozenset({"edit"})

        def run(self, network: netsurgery.Network) -> netsurgery.Network:
            return network

    with pytest.raises(PassError, match="declares that it gives"):
        netsurgery.plan(model, [Wrong()], (X,))


@pytest.mark.parametrize(
    ("keep", "message"),
    [
        ({"nothing": (0,)}, "'nothing' is no group"),
        ({"stem": ()}, "would lose all of its"),
        ({"block.conv1": (0, 8)}, "must be distinct and in 0..7"),
        ({"block.conv1": (-1, 2)}, "must be distinct and in 0..7"),
        ({"block.conv1": (2, 2)}, r"must be distinct and in 0..7, got \[2, 2\]; Copy\(unit\) makes another"),
        ({"head": (0,)}, "'head' is locked: the network output has this dimension"),
    ],
)
def test_impossible_edits(keep: dict, message: str) -> None:
    class Plain(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.block, self.head = (
                nn.Conv2d(3, 4, 1),
                nn.ModuleDict({"conv1": nn.Conv2d(4, 8, 1)}),
                nn.Linear(8, 2),
            )

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.block["conv1"](self.stem(x).relu()).mean((2, 3)))

    network = netsurgery.trace(Plain(), (X,))
    with pytest.raises(InputError, match=message):
        netsurgery.Edit(network, keep)


def test_an_edit_for_another_model(model: nn.Module) -> None:
    edit = netsurgery.plan(model, HALF, (X,))
    with pytest.raises(RewriteError, match=r"the edit is for another model: stem.weight"):
        netsurgery.rewrite(nn.Linear(3, 2), edit)


def test_uninitialised_and_scripted_models_are_refused() -> None:
    with pytest.raises(TraceError, match="lazy"):
        netsurgery.trace(nn.Sequential(nn.LazyLinear(4)), (torch.zeros(1, 3),))


def test_graph_of_dependencies(model: nn.Module) -> None:
    graph = netsurgery.trace(model, (X,)).graph
    assert graph.has_edge("module:stem", "stem") and graph.has_edge("stem", "module:block.conv1")
    (edge,) = graph.get_edge_data("stem", "module:head").values()
    assert edge == {"parameter": "head.weight", "axis": 1, "role": "consumes"}


def test_recorded_operations_know_where_they_come_from(model: nn.Module) -> None:
    network = netsurgery.trace(model, (X,))
    (node,) = [node for node in network.ir.nodes if node.target is torch.ops.aten.native_group_norm.default]
    assert node.meta["module"] == "block.norm" and node.meta["where"][0] == __file__
    assert [network.axis_expression(axis) for axis in node.meta["dims"][0]] == ["2", "stem*stem:2", "4", "4"]


def test_what_only_training_runs_must_be_recordable() -> None:
    class NeedsTargets(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.loss = nn.Linear(3, 4), nn.Linear(4, 1)
            self.b = nn.Linear(4, 2)

        def forward(self, x: Tensor, target: Tensor | None = None) -> Tensor:
            if self.training and target is None:
                raise ValueError("give me targets")
            return self.b(self.a(x)) if target is None else self.loss(self.a(x))

    with pytest.raises(
        TraceError, match=r"some parameters are not used in eval mode, and in training mode .*give me targets"
    ):
        netsurgery.trace(NeedsTargets(), torch.zeros(1, 3))


def test_gradients_and_training_go_on(model: nn.Module) -> None:
    small = netsurgery.apply(model, HALF, (X,))
    small(X).sum().backward()
    assert all(p.grad is not None and p.grad.shape == p.shape for p in small.parameters())


def test_hard_coded_sizes_that_cannot_follow_are_named_and_frozen() -> None:
    class HardCoded(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 6, 1), nn.Linear(96, 4)

        def forward(self, x: Tensor) -> Tensor:
            with torch.enable_grad():  # so that it is not rewritten
                return self.c(self.b(self.a(x).view(-1, 8, 4, 4)).view(x.shape[0], -1))

    model = HardCoded()
    network = netsurgery.trace(model, (X,))
    assert [group.name for group in network.prunable] == ["b"]
    assert "size 8 is fixed by the code: aten.view" in network["a"].locked
    assert "test_pipeline.py:" in network["a"].locked
    edit = netsurgery.plan(model, HALF, (X,))  # plan finds it by itself
    assert list(edit.keep) == ["b"]
    assert netsurgery.verify(model, netsurgery.rewrite(model, edit), edit, (X,)) < 1e-6


def test_a_number_computed_from_a_size_freezes() -> None:
    class Mean(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(3, 8), nn.Linear(8, 2)

        def forward(self, x: Tensor) -> Tensor:
            x = self.a(x)
            return self.b(x / x.shape[1] ** 0.5)

    network = netsurgery.trace(Mean(), torch.randn(2, 3))
    assert not network.prunable
    assert "the code computes other=2.828" in network["a"].locked
    with pytest.raises(InputError, match="nothing of Mean can be pruned"):
        netsurgery.apply(Mean(), HALF, torch.randn(2, 3))


def test_slice_offsets_are_checked() -> None:
    class Offset(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = nn.Linear(3, 8), nn.Linear(4, 4), nn.Linear(4, 2)

        def forward(self, x: Tensor) -> Tensor:
            x = self.a(x)
            return self.c(self.b(x[:, 4:8]) * x[:, 0:4])

    model, x = Offset(), torch.randn(2, 3)
    edit = netsurgery.plan(model, HALF, x)
    assert netsurgery.verify(model, netsurgery.rewrite(model, edit), edit, x) < 1e-6


def test_in_inference_mode_all_is_as_without_it(model: nn.Module) -> None:
    passes = [MagnitudeScore(), PruneChannels(0.5)]
    wanted, cost = netsurgery.plan(model, passes, (X,)), netsurgery.cost(model, (X,))
    with torch.inference_mode():
        edit = netsurgery.plan(model, passes, (X,))
        small = netsurgery.rewrite(model, edit)
        assert edit.keep == wanted.keep and netsurgery.cost(model, (X,)) == cost
        assert netsurgery.verify(model, small, edit, (X,)) < 1e-5
    assert not any(parameter.is_inference() for parameter in small.parameters())


@pytest.mark.parametrize("settings", [{"macs": True}, {"params": True}, {"ratio": True}, {"ratio": False}])
def test_a_truth_value_is_no_number(settings: dict) -> None:
    with pytest.raises(InputError, match="expected a number"):
        PruneChannels(**settings)

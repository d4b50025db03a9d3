"""The penalty over models: which layers, which outer groups, its gradient, its schedule, its errors."""

from __future__ import annotations

import pytest
import torch
import torchvision
from torch import Tensor, nn

import netsurgery
import zoo
from netsurgery.errors import InputError
from netsurgery.kernels import CRITERIA
from netsurgery.kernels.hgsr_reference import power
from netsurgery.passes import HGSR, HGSRScore
from netsurgery.passes.layers import layers


def own_terms(kernels: list[Tensor], criterion: str) -> Tensor:
    """The criterion of one outer group from its kernels, each (number, elements)."""
    rule = CRITERIA[criterion]  # type: ignore[index]
    norms = torch.cat([kernel.norm(rule.norm, dim=1) for kernel in kernels])
    return power(power(norms, rule.inner).sum(), rule.outer)


class Everything(nn.Module):
    """Residual link, concatenation, grouped, depthwise and transposed convolution, and flatten to linear."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3, padding=1)
        self.one = nn.Conv2d(4, 4, 3, padding=1)
        self.other = nn.Conv2d(4, 4, 1)
        self.grouped = nn.Conv2d(8, 4, 3, padding=1, groups=2)
        self.depthwise = nn.Conv2d(4, 4, 3, padding=1, groups=4)
        self.turned = nn.ConvTranspose2d(4, 5, 2)
        self.head = nn.Linear(5 * 3 * 3, 2)

    def forward(self, x: Tensor) -> Tensor:
        stem = self.stem(x).relu()
        both = torch.cat([stem + self.one(stem), self.other(stem)], 1)
        x = self.turned(self.depthwise(self.grouped(both)).relu())
        head: Tensor = self.head(x.relu().flatten(1))
        return head


def coupled_by_hand(net: Everything, criterion: str) -> Tensor:
    """Every unit's kernels, picked out of the weights by hand."""
    total = torch.zeros((), dtype=torch.float64)
    for i in range(4):  # the stream and the other branch stand in equal places of the two groups of `grouped`
        read = [net.one.weight, net.other.weight, net.grouped.weight[:2], net.grouped.weight[2:]]
        total = total + own_terms([weight[:, i].flatten(1) for weight in read], criterion)
    for i in range(2):  # of each group of outputs as many stay
        read = [net.depthwise.weight[i], net.depthwise.weight[2 + i], net.turned.weight[i], net.turned.weight[2 + i]]
        total = total + own_terms([weight.flatten(1) for weight in read], criterion)
    for i in range(5):
        total = total + own_terms([net.head.weight.view(2, 5, 9)[:, i].reshape(-1, 1)], criterion)
    return total


def everything() -> tuple[Everything, Tensor]:
    torch.manual_seed(0)
    return Everything().double(), torch.zeros(1, 3, 2, 2, dtype=torch.float64)


@pytest.mark.parametrize("criterion", CRITERIA)
def test_coupled_by_hand(criterion: str) -> None:
    net, x = everything()
    penalty = HGSR(net, x, criterion=criterion, grouping="coupled", strength=2.0, l1_ratio=0.0)  # type: ignore[arg-type]
    wanted = 2 * coupled_by_hand(net, criterion)
    torch.testing.assert_close(penalty(), wanted)
    weights = [net.get_parameter(name) for name in penalty.layers]
    torch.testing.assert_close(
        torch.autograd.grad(penalty(), weights), torch.autograd.grad(wanted, weights, materialize_grads=True)
    )
    scores = HGSRScore(criterion, "coupled").run(netsurgery.trace(net, x)).scores  # type: ignore[arg-type]
    assert list(scores) == ["stem", "grouped", "turned"]
    torch.testing.assert_close(sum(2 * score.sum() for score in scores.values()), wanted)


@pytest.mark.parametrize("grouping", ["feature", "neuron"])
def test_by_layer_by_hand(grouping: str) -> None:
    net, x = everything()
    network_roles = ("convolution", "linear", "shortcut", "classifier")
    penalty = HGSR(net, x, criterion="group_lasso", grouping=grouping, strength=1.0, l1_ratio=0.0, roles=network_roles)  # type: ignore[arg-type]
    total = torch.zeros((), dtype=torch.float64)
    for name in ("stem", "one", "other", "head"):
        weight = net.get_submodule(name).weight.reshape(*net.get_submodule(name).weight.shape[:2], -1)
        total = total + weight.norm(dim=(0, 2) if grouping == "feature" else (1, 2)).sum()
    for weight, groups in ((net.grouped.weight, 2), (net.depthwise.weight, 4)):
        blocks = weight.unflatten(0, (groups, -1)).flatten(3)  # (groups, out, in, window)
        total = total + blocks.norm(dim=(1, 3) if grouping == "feature" else (2, 3)).sum()
    total = total + net.turned.weight.flatten(2).norm(dim=(1, 2) if grouping == "feature" else (0, 2)).sum()
    torch.testing.assert_close(penalty(), total)


@pytest.mark.parametrize("grouping", ["feature", "neuron", "coupled"])
def test_adding_the_gradient_equals_backward(grouping: str) -> None:
    net, x = everything()
    penalty = HGSR(net, x, grouping=grouping, strength=0.1)  # type: ignore[arg-type]
    value = penalty()
    value.backward()
    wanted = {name: weight.grad.clone() for name, weight in net.named_parameters() if weight.grad is not None}
    assert set(wanted) == set(penalty.layers)
    for weight in net.parameters():
        weight.grad = torch.ones_like(weight) if weight is not net.one.weight else None
    found = penalty.add_gradient()
    torch.testing.assert_close(found, value.detach())
    for name, weight in net.named_parameters():
        start = 0 if weight is net.one.weight else 1
        torch.testing.assert_close(weight.grad, start + wanted.get(name, torch.zeros_like(weight)))


def test_l1_counts_every_weight_once() -> None:
    """Also one that belongs to two sorts of groups, as the projection of attention's output does."""
    torch.manual_seed(0)
    vit = torchvision.models.VisionTransformer(
        image_size=8, patch_size=4, num_layers=1, num_heads=2, hidden_dim=8, mlp_dim=16, num_classes=3
    )
    penalty = HGSR(vit, torch.zeros(1, 3, 8, 8), grouping="coupled", strength=1.0, l1_ratio=1.0)
    want = sum(vit.get_parameter(name).abs().sum() for name in penalty.layers)
    torch.testing.assert_close(penalty(), want)
    heads = HGSR(vit, torch.zeros(1, 3, 8, 8), criterion="group_lasso", grouping="coupled", strength=1.0, l1_ratio=0.0,
                 include="*.out_proj")  # fmt: skip
    weight = vit.encoder.layers[0].self_attention.out_proj.weight.view(8, 2, 4)  # (out, heads, head_dim)
    torch.testing.assert_close(heads(), weight.norm(dim=(0, 2)).sum() + weight.norm(dim=(0, 1)).sum())


def test_scope_of_the_source() -> None:
    """Every convolution, the first included, but those of shortcuts; no bias, norm or classifier."""
    penalty = HGSR(torchvision.models.resnet18(), torch.zeros(1, 3, 32, 32))
    assert len(penalty.layers) == 17
    assert penalty.layers[0] == "conv1.weight"
    assert not any("downsample" in name or name.startswith("fc") for name in penalty.layers)


@pytest.mark.parametrize(
    ("name", "shortcuts", "last"),
    [
        ("resnet50", 4, ["fc"]), ("regnet_y_400mf", 4, ["fc"]), ("vgg11_bn", 0, ["classifier.6"]),
        ("mobilenet_v2", 0, ["classifier.1"]), ("densenet121", 0, ["classifier"]), ("shufflenet_v2_x0_5", 0, ["fc"]),
        ("squeezenet1_1", 0, ["classifier.1"]), ("inception_v3", 0, ["AuxLogits.fc", "fc"]),
    ],
)  # fmt: skip
def test_roles_on_the_zoo(name: str, shortcuts: int, last: list[str]) -> None:
    network = netsurgery.trace(zoo.build(name), zoo.images(name))
    found = layers(network)
    weights = [key for key, tensor in network.tensors.items() if tensor.dim() > 1]
    assert [layer.name for layer in found] == weights
    assert sum(layer.role == "shortcut" for layer in found) == shortcuts
    assert [layer.module for layer in found if layer.role == "classifier"] == last


def test_printed() -> None:
    net, x = everything()
    assert (
        str(HGSR(net, x, grouping="coupled", exclude="turned"))
        == """\
hierarchical_sq_group_l12, coupled, strength 0.001, l1_ratio 0.5: 6 of 7 layers, 11 outer groups
weight            shape    role         outer groups
stem.weight       4x3x3x3  convolution             0
one.weight        4x4x3x3  convolution             4
other.weight      4x4x1x1  convolution             4
grouped.weight    4x4x3x3  convolution             4
depthwise.weight  4x1x3x3  convolution             2
turned.weight     4x5x2x2  convolution             -
head.weight       2x45     classifier              5"""
    )


def test_strength_follows_a_schedule() -> None:
    net, x = everything()
    whole = HGSR(net, x, strength=1.0)()
    penalty = HGSR(net, x, strength=lambda step: min(1.0, step / 4))
    assert penalty().item() == 0
    for _ in range(2):
        penalty.step()
    torch.testing.assert_close(penalty(), 0.5 * whole)
    state = penalty.state_dict()
    other = HGSR(net, x, strength=lambda step: min(1.0, step / 4))
    other.load_state_dict(state)
    torch.testing.assert_close(other(), 0.5 * whole)
    broken = HGSR(net, x, strength=lambda step: 1.0 if step < 1 else float("nan"))
    with pytest.raises(InputError, match="a strength of nan at step 1: expected a number of at least 0"):
        broken.step()


def test_the_model_is_not_touched() -> None:
    net, x = everything()
    before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    penalty = HGSR(net, x, grouping="coupled")
    penalty()
    assert net.training
    assert all(torch.equal(before[name], tensor) for name, tensor in net.state_dict().items())
    assert all(weight.grad is None for weight in net.parameters())


def test_parameters_are_looked_up_when_it_is_called() -> None:
    net, x = everything()
    penalty = HGSR(net, x, strength=1.0)
    exact = penalty()
    net.float()
    assert penalty().dtype == torch.float32
    net.one.weight = nn.Parameter(torch.zeros_like(net.one.weight))
    assert penalty() < exact


def test_errors() -> None:
    net, x = everything()
    for arguments, message in {
        "criterion='l2'": "HGSR has no criterion 'l2': choose one of l1, group_lasso",
        "grouping='unit'": r"HGSR\(grouping='unit'\): 'feature', 'neuron' or 'coupled'",
        "l1_ratio=1.5": r"HGSR\(l1_ratio=1.5\): the share of plain L1 must be a number in \[0, 1\]",
        "strength=-1.0": "a strength of -1.0 at step 0: expected a number of at least 0",
        "roles=['norm']": r"HGSR\(roles=\['norm'\]\): expected a list of 'convolution', 'linear', 'short",
        "roles='linear'": "HGSR\\(roles='linear'\\): expected a list of",
        "include='conv*'": r"pattern 'conv\*' matches no module with parameters in Everything",
        "roles=['shortcut']": "no layer of Everything takes part. Its layers:\nweight",
    }.items():
        with pytest.raises(InputError, match=message):
            eval(f"HGSR(net, x, {arguments})", {"HGSR": HGSR, "net": net, "x": x})
    with pytest.raises(InputError, match=r"HGSRScore\(grouping='unit'\): 'feature', 'neuron' or 'coupled'"):
        HGSRScore(grouping="unit")  # type: ignore[arg-type]


def test_layers_of_attention_and_of_weights_kept_the_other_way_round() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention = nn.MultiheadAttention(8, 2, batch_first=True)  # uses its weight in slices
            self.inward = nn.Parameter(torch.randn(8, 6))  # (in, out)
            self.last = nn.Linear(6, 3)

        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            last: Tensor = self.last(self.attention(x, y, y, need_weights=False)[0] @ self.inward)
            return last

    net = Net()
    found = layers(netsurgery.trace(net, (torch.zeros(1, 3, 8), torch.zeros(1, 5, 8))))
    assert [(layer.name, layer.role, layer.inputs.outer, layer.outputs.outer) for layer in found] == [
        ("inward", "linear", (0,), (1,)),
        ("attention.in_proj_weight", "linear", (1,), (0,)),
        ("attention.out_proj.weight", "linear", (1,), (0,)),
        ("last.weight", "classifier", (1,), (0,)),
    ]


def test_scores_by_neuron() -> None:
    net = nn.Sequential(nn.Conv2d(1, 3, 3, bias=False), nn.ReLU(), nn.Conv2d(3, 2, 1))
    scores = HGSRScore("group_lasso", "neuron").run(netsurgery.trace(net, torch.zeros(1, 1, 4, 4))).scores
    torch.testing.assert_close(scores["0"], net[0].weight.detach().flatten(1).norm(dim=1))


class Views(nn.Module):
    """Weights used otherwise than they are kept: by einsum, merged, with more axes, and turned round."""

    def __init__(self) -> None:
        super().__init__()
        self.inward = nn.Linear(4, 6)
        self.heads = nn.Parameter(torch.randn(2, 6, 3))  # (heads, in, head_dim)
        self.kernel = nn.Parameter(torch.randn(5, 6))
        self.code = nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.inward(x).relu()  # (b, 3, 6)
        heads = torch.einsum("btd,hdk->bhtk", x, self.heads).flatten(1)[:, :1]
        x = torch.nn.functional.conv2d(x.transpose(1, 2)[..., None], self.kernel[..., None, None]).mean((2, 3))
        code = self.code(x.relu()).relu()
        return heads + torch.nn.functional.linear(code, self.code.weight.t()).sum(1, keepdim=True)


def test_weights_used_otherwise_than_they_are_kept() -> None:
    torch.manual_seed(0)
    net, x = Views(), torch.zeros(2, 3, 4)
    network = netsurgery.trace(net, x)
    penalty = HGSR(net, x, criterion="group_lasso", grouping="coupled", strength=1.0, l1_ratio=0.0)
    assert set(penalty.layers) == {"heads", "kernel", "inward.weight", "code.weight"}
    units = [
        own_terms([net.heads[:, i].reshape(-1, 1), net.kernel[:, i].reshape(-1, 1)], "group_lasso") for i in range(6)
    ]
    scores = HGSRScore("group_lasso", "coupled").run(network).scores
    torch.testing.assert_close(scores["inward"], torch.stack(units).detach())
    weight = net.code.weight.detach()  # it reads the units of `kernel` along axis 1, and its own along axis 0
    torch.testing.assert_close(scores["code"], weight.norm(dim=1))
    torch.testing.assert_close(scores["kernel"], weight.norm(dim=0))
    in_l1 = HGSR(net, x, grouping="coupled", strength=1.0, l1_ratio=1.0)
    torch.testing.assert_close(in_l1(), sum(net.get_parameter(name).abs().sum() for name in in_l1.layers))


def test_computed_weights_are_listed_and_scored_but_not_penalised() -> None:
    net = nn.Sequential(
        nn.Linear(3, 4), nn.ReLU(), nn.utils.parametrizations.weight_norm(nn.Linear(4, 5)), nn.ReLU(), nn.Linear(5, 2)
    )
    penalty = HGSR(net, torch.zeros(1, 3), roles=["linear", "classifier"])
    assert penalty.layers == ("0.weight", "4.weight")
    assert "2.parametrizations.weight.original1  5x4    computed               -" in str(penalty)
    scores = HGSRScore("group_lasso").run(netsurgery.trace(net, torch.zeros(1, 3))).scores
    torch.testing.assert_close(scores["0"], net[2].parametrizations.weight.original1.detach().norm(dim=0))


class Pyramid(nn.Module):
    """Two levels of features, joined as in a feature pyramid: its lateral layers are no shortcuts."""

    def __init__(self) -> None:
        super().__init__()
        self.low, self.high, self.top = nn.Conv2d(3, 4, 3, 2, 1), nn.Conv2d(4, 4, 3, 2, 1), nn.Conv2d(4, 4, 3, 2, 1)
        self.lateral, self.inner = nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 1)
        self.out, self.other = nn.Conv2d(4, 2, 3), nn.Conv2d(4, 2, 1)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        low = self.low(x).relu()
        high = self.inner(self.top(self.high(low).relu()).relu())
        joined = self.lateral(low) + torch.nn.functional.interpolate(high, scale_factor=4.0)
        return self.out(joined), self.other(high)


def test_lateral_layers_are_no_shortcuts() -> None:
    found = layers(netsurgery.trace(Pyramid(), torch.zeros(1, 3, 32, 32)))
    assert [layer.role for layer in found if layer.module == "lateral"] == ["convolution"]


def test_what_changes_afterwards() -> None:
    net, x = everything()
    penalty = HGSR(net, x, strength=1.0, l1_ratio=0.0)
    whole = penalty()
    penalty.strength = 0.25
    torch.testing.assert_close(penalty(), 0.25 * whole)
    assert "strength 0.25" in str(penalty)
    with pytest.raises(AttributeError):
        penalty.l1_ratio = 0.5  # type: ignore[misc]
    net.one = nn.Conv2d(4, 4, 3, padding=1).double()
    with torch.no_grad():
        net.one.weight.zero_()
    assert penalty() < 0.25 * whole
    penalty.add_gradient()
    assert net.one.weight.grad is not None
    net.one = nn.Conv2d(8, 8, 3).double()
    with pytest.raises(InputError, match=r"one.weight had shape \(4, 4, 3, 3\) and has \(8, 8, 3, 3\) now: build the"):
        penalty()


def test_a_step_of_the_schedule_before_backward() -> None:
    net, x = everything()
    penalty = HGSR(net, x, strength=lambda step: 1.0 + step)
    value = penalty()
    penalty.step()
    value.backward()
    found = net.one.weight.grad
    assert found is not None
    torch.testing.assert_close(torch.autograd.grad(penalty(), net.one.weight)[0], 2 * found)


def test_inference_mode_spoils_nothing() -> None:
    net, x = everything()
    with torch.inference_mode():
        penalty = HGSR(net, x, strength=1.0)
        net.float()
        value = penalty()
        with pytest.raises(InputError, match="gradients made in inference mode are of no use: call it outside"):
            penalty.add_gradient()
    net = net.double().float()
    assert penalty.strength == 1.0
    penalty.step()
    torch.testing.assert_close(penalty().detach(), value.clone())


def test_coupled_needs_a_group_to_prune() -> None:
    net = nn.Sequential(nn.Linear(3, 4))
    with pytest.raises(InputError, match="no layer that takes part reads a group of Sequential that can be pruned"):
        HGSR(net, torch.zeros(1, 3), grouping="coupled")


class Reshaped(nn.Module):
    """A weight whose axes are cut otherwise when it is used."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(3, 16)
        self.weight = nn.Parameter(torch.randn(12, 4))
        self.last = nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        last: Tensor = self.last(torch.nn.functional.linear(self.first(x).relu(), self.weight.view(3, 16)).relu())
        return last


def test_what_cannot_take_part_is_listed() -> None:
    penalty = HGSR(Reshaped(), torch.zeros(1, 3))
    assert penalty.layers == ("first.weight",)
    assert "\nweight        12x4   unknown                -" in str(penalty)


class Joined(nn.Module):
    """Two branches side by side, one of them twice."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.last = nn.Linear(2, 3), nn.Linear(2, 5), nn.Linear(11, 4)

    def forward(self, x: Tensor) -> Tensor:
        a, b = self.a(x).relu(), self.b(x).relu()
        last: Tensor = self.last(torch.cat([a, b, a], 1))
        return last


def test_each_part_of_a_concatenation_has_its_own_units() -> None:
    net, x = Joined(), torch.zeros(1, 2)
    scores = HGSRScore("group_lasso", "coupled").run(netsurgery.trace(net, x)).scores
    weight = net.last.weight.detach()
    torch.testing.assert_close(scores["a"], torch.cat([weight[:, :3], weight[:, 8:]]).norm(dim=0))
    torch.testing.assert_close(scores["b"], weight[:, 3:8].norm(dim=0))
    by_layer = HGSRScore("group_lasso").run(netsurgery.trace(net, x)).scores
    torch.testing.assert_close(by_layer["a"], weight[:, :3].norm(dim=0) + weight[:, 8:].norm(dim=0))


def in_l1(kind: str) -> tuple[nn.Module, HGSR]:
    """A model, and a penalty whose strength is 10 to the number of steps."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    return model, HGSR(model, grouping=kind, strength=lambda step: 10.0**step)  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", ["feature", "coupled"])
@pytest.mark.parametrize("when", ["before the first call", "between calls", "twice", "back again"])
def test_steps_go_on_after_the_model_has_moved(kind: str, when: str) -> None:
    """What is kept beside the weights is made anew for another device or type; the count of the steps is not."""
    model, penalty = in_l1(kind)
    twin, reference = in_l1(kind)
    one = reference().item()
    if when == "before the first call":
        model.double()
    else:
        assert penalty().item() == one
    for _ in range(3):
        penalty.step()
    model.double()
    if when == "twice":
        penalty(), model.float()
        penalty(), model.double()
    elif when == "back again":
        penalty(), model.float()
    assert penalty().item() == pytest.approx(1000 * one, rel=1e-5)
    assert (penalty.steps, penalty.now, penalty.state_dict()) == (3, 1000.0, {"steps": 3})
    penalty.step()
    assert penalty.add_gradient().item() == pytest.approx(10_000 * one, rel=1e-5)
    penalty.load_state_dict({"steps": 1})
    assert penalty().item() == pytest.approx(10 * one, rel=1e-5)
    twin.double()
    reference.load_state_dict({"steps": 4})  # loaded before it has moved
    reference.step()
    assert reference().item() == pytest.approx(100_000 * one, rel=1e-5)
    reference.strength = lambda step: 2.0 * step
    assert reference().item() == pytest.approx(10 * one, rel=1e-5)

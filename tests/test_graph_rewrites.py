"""Passes that rewrite modules: the function stays, and what comes after them finds an ordinary network."""

import copy
from collections.abc import Callable

import pytest
import timm
import torch
import torchvision
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.utils.parametrizations import weight_norm

import netsurgery
from netsurgery.errors import InputError
from netsurgery.passes import FoldBatchNorm, MagnitudeScore, PlantChannels, PruneChannels
from netsurgery.rewriting.stages import read


def lived_in(model: nn.Module, seed: int = 0) -> nn.Module:
    """A model in float64 and eval mode, with statistics and affine weights as after training."""
    draw = torch.Generator().manual_seed(seed)
    for module in model.modules():
        if isinstance(module, _BatchNorm):
            if module.running_mean is not None and module.running_var is not None:
                module.running_mean.normal_(generator=draw)
                module.running_var.uniform_(0.3, 3.0, generator=draw)
            if module.affine:
                module.weight.data.uniform_(-1.5, 1.5, generator=draw)
                module.bias.data.normal_(generator=draw)
    return model.double().eval()


def inputs(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def check(model: nn.Module, x: Tensor, *passes: netsurgery.Pass, tolerance: float = 1e-12) -> nn.Module:
    """Carry passes out: outputs stay, the edit is what it says, and pruning and growing after them are exact."""
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    edit = netsurgery.plan(model, passes, x)
    new = netsurgery.rewrite(model, edit)
    wanted, found = model(x), new(x)
    assert (wanted - found).abs().max() <= tolerance * wanted.abs().max() and wanted.std() > 0
    assert netsurgery.verify(model, new, edit, x) <= tolerance
    assert sum(p.numel() for p in new.parameters()) == edit.after.params
    assert netsurgery.cost(new, x).macs == edit.after.macs
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    again = netsurgery.rewrite(model, read(edit.to_json(), netsurgery.trace(model, x)))
    assert all(torch.equal(tensor, new.state_dict()[name]) for name, tensor in again.state_dict().items())
    assert type(new) is type(model) and [m.training for m in new.modules()] == [False] * len(list(new.modules()))
    check_after(model, x, passes, tolerance)
    return new


def check_after(model: nn.Module, x: Tensor, passes: tuple[netsurgery.Pass, ...], tolerance: float) -> None:
    prune = [MagnitudeScore(), PruneChannels(0.4)]
    for series in ([*passes, *prune], [*passes, PlantChannels(2)], [*prune, *passes]):
        edit = netsurgery.plan(model, series, x)
        assert any(stage.keep for stage in edit.stages) and any(stage.modules for stage in edit.stages)
        assert netsurgery.verify(model, netsurgery.rewrite(model, edit), edit, x) <= tolerance


def said(model: nn.Module, x: Tensor, *passes: netsurgery.Pass) -> str:
    return netsurgery.plan(model, passes, x).summary()


# FoldBatchNorm

LAYERS: dict[str, tuple[nn.Module, nn.Module, tuple[int, ...]]] = {
    "1d": (nn.Conv1d(4, 6, 3, bias=False), nn.BatchNorm1d(6), (2, 4, 9)),
    "2d, grouped": (nn.Conv2d(4, 6, 3, groups=2), nn.BatchNorm2d(6), (2, 4, 9, 9)),
    "2d, depthwise, dilated": (nn.Conv2d(4, 4, 3, groups=4, dilation=2, stride=2), nn.BatchNorm2d(4), (2, 4, 9, 9)),
    "3d": (nn.Conv3d(4, 6, 2), nn.BatchNorm3d(6, affine=False), (2, 4, 5, 5, 5)),
    "reflected": (nn.Conv2d(4, 6, 3, padding=1, padding_mode="reflect"), nn.BatchNorm2d(6), (2, 4, 5, 5)),
    "1d, transposed": (nn.ConvTranspose1d(4, 6, 3), nn.BatchNorm1d(6), (2, 4, 9)),
    "2d, transposed, grouped": (nn.ConvTranspose2d(4, 6, 3, groups=2, bias=False), nn.BatchNorm2d(6), (2, 4, 5, 5)),
    "3d, transposed": (nn.ConvTranspose3d(4, 6, 2, stride=2), nn.BatchNorm3d(6, eps=0.1), (2, 4, 3, 3, 3)),
    "linear": (nn.Linear(4, 6), nn.BatchNorm1d(6), (5, 4)),
    "linear, no bias": (nn.Linear(4, 6, bias=False), nn.BatchNorm1d(6, momentum=None), (5, 4)),
    "synchronised": (nn.Conv2d(4, 6, 3), nn.SyncBatchNorm(6), (2, 4, 9, 9)),
}  # fmt: skip


@pytest.mark.parametrize("name", LAYERS)
def test_layers_of_every_kind_fold(name: str) -> None:
    layer, norm, shape = copy.deepcopy(LAYERS[name])
    last = nn.Linear(6, 3) if len(shape) == 2 else nn.Flatten()
    model = lived_in(nn.Sequential(nn.Sequential(layer, norm), nn.Hardswish(), last))
    new = netsurgery.apply(model, [FoldBatchNorm()], inputs(*shape), verify=1e-13)
    x = inputs(*shape)
    assert torch.allclose(new(x), model(x), rtol=1e-12, atol=1e-13) and not torch.allclose(model[0][0](x), model[0](x))
    assert type(new[0][0]) is type(layer) and isinstance(new[0][1], nn.Identity) and new[0][0].bias is not None
    assert list(new.state_dict())[:2] == ["0.0.weight", "0.0.bias"]


class Own(nn.Module):
    """Layers with something that stands in the way of folding, and one without."""

    def __init__(self, what: str) -> None:
        super().__init__()
        self.what = what
        self.free, self.free_norm = nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)
        self.conv, self.norm = nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)
        if what == "weight norm":
            weight_norm(self.conv)
        if what == "statistics":
            self.norm = nn.BatchNorm2d(4, track_running_stats=False)
        if what == "tied":
            self.other = nn.Conv2d(4, 4, 1)
            self.other.weight = self.conv.weight
        if what == "hook":
            self.conv.register_forward_hook(lambda module, args, out: None)
        if what == "hook of the norm":
            self.norm.register_forward_pre_hook(lambda module, args: None)
        if what == "features":
            self.conv, self.norm = nn.Linear(4, 4), nn.BatchNorm1d(4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.free_norm(self.free(x)).relu()
        if self.what == "features":  # the norm is of positions
            return self.norm(self.conv(x.flatten(2)[..., :4])).flatten(1)
        y = self.conv(x)
        x = self.norm(y)
        if self.what == "read in training" and self.training:
            x = x + y
        if self.what == "read twice":
            x = x + y
        if self.what == "called twice":
            x = self.norm(self.conv(x.relu()))
        if self.what == "norm called twice":
            x = self.norm(x)
        if self.what == "tied":
            x = self.other(x.relu())
        return x.flatten(1)


LEFT = {
    "weight norm": "the weight of 'conv', a ParametrizedConv2d, is shared, or computed from others",
    "statistics": "it takes the statistics of each batch",
    "tied": "the weight of 'conv', a Conv2d, is shared, or computed from others",
    "hook": "'conv' has hooks, which would see something else",
    "hook of the norm": "'norm' has hooks, which would see something else",
    "features": "it does not normalise the features of 'conv'",
    "read twice": "it does not read a convolution or linear layer that nothing else reads",
    "read in training": "in training mode it does not read this layer alone",
    "called twice": "'conv' or the norm runs several times",
    "norm called twice": "'conv' or the norm runs several times",
}


@pytest.mark.parametrize("what", LEFT)
def test_norms_that_cannot_fold_are_left_and_named(what: str) -> None:
    model, x = lived_in(Own(what)), inputs(2, 3, 2, 2)
    edit = netsurgery.plan(model, [FoldBatchNorm()], x)
    new = netsurgery.rewrite(model, edit)
    assert netsurgery.verify(model, new, edit, x) < 1e-13
    assert isinstance(new.free_norm, nn.Identity) and isinstance(new.norm, _BatchNorm)
    assert edit.summary() == f"asked to fold 2 batch norms, folded 1; short: norm: {LEFT[what]}\n  norm: {LEFT[what]}"


class WithScale(nn.Conv2d):
    """A class of its own, whose code does not add its bias."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.conv2d(x, self.weight, None, self.stride, self.padding, self.dilation, self.groups)


class Twofold(nn.BatchNorm2d):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


def test_classes_of_ones_own() -> None:
    model = lived_in(
        nn.Sequential(WithScale(3, 4, 1, bias=False), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 1), Twofold(4), nn.Flatten())
    )
    with pytest.raises(InputError) as refused:
        netsurgery.plan(model, [FoldBatchNorm()], inputs(2, 3, 2, 2))
    assert str(refused.value) == (
        "FoldBatchNorm: Sequential has no batch norm that can be folded: "
        "3: its class Twofold does something else than to normalise; "
        "1: the code of '0', a WithScale, adds no bias"
    )
    more = lived_in(nn.Sequential(model[:4], nn.Conv2d(4, 5, 1), nn.BatchNorm2d(5), nn.Flatten()))
    new = netsurgery.apply(more, [FoldBatchNorm()], inputs(2, 3, 2, 2), verify=1e-13)
    assert isinstance(new[2], nn.Identity) and new[0][0].bias is None


def test_folding_some_and_what_is_refused() -> None:
    model, x = lived_in(torchvision.models.resnet18(num_classes=4)), inputs(1, 3, 32, 32)
    for include in ("layer1.*", ["layer1.0.bn?", "layer1.1.conv?"], [model.layer1]):
        new = netsurgery.apply(model, [FoldBatchNorm(include=include, exclude="*.1.bn2")], x, verify=True)
        folded = [path for path, module in new.named_modules() if isinstance(module, nn.Identity)]
        assert folded == ["layer1.0.bn1", "layer1.0.bn2", "layer1.1.bn1"]
    refused: list[tuple[nn.Module, FoldBatchNorm, str]] = [
        (
            copy.deepcopy(model).train(),
            FoldBatchNorm(),
            "'bn1' of ResNet is in training mode, in which a batc",
        ),
        (model, FoldBatchNorm(include="layer9"), "pattern 'layer9' matches no module"),
        (model, FoldBatchNorm(include="fc"), "ResNet has no batch norm that can be folded: there is none"),
        (
            lived_in(nn.Sequential(nn.Conv2d(3, 2, 1))),
            FoldBatchNorm(),
            "no batch norm that can be folded: there is none",
        ),
    ]
    for net, fold, why in refused:
        with pytest.raises(InputError, match=why):
            netsurgery.plan(net, [fold], x)
    mixed = copy.deepcopy(model)
    mixed.layer1.train()
    netsurgery.plan(mixed, [FoldBatchNorm(exclude="layer1.*")], x)


def test_folded_weights_train_where_the_old_ones_did() -> None:
    model = lived_in(
        nn.Sequential(nn.Conv2d(3, 4, 1, bias=False), nn.BatchNorm2d(4), nn.Conv2d(4, 2, 1), nn.BatchNorm2d(2))
    )
    model[0].weight.requires_grad_(False)
    model[2:].requires_grad_(False)
    new = netsurgery.apply(model, [FoldBatchNorm()], inputs(2, 3, 2, 2))
    assert [p.requires_grad for p in new.parameters()] == [False, False, False, False]
    model[0].weight.requires_grad_(True)
    new = netsurgery.apply(model, [FoldBatchNorm()], inputs(2, 3, 2, 2))
    assert [p.requires_grad for p in new.parameters()] == [True, True, False, False]


# Known networks, last since they take long

ZOO: dict[str, Callable[[], nn.Module]] = {
    "resnet18": torchvision.models.resnet18,
    "mobilenet_v2": torchvision.models.mobilenet_v2,
    "densenet": lambda: torchvision.models.DenseNet(8, (2, 3), 16, num_classes=5),
    "shufflenet_v2_x0_5": torchvision.models.shufflenet_v2_x0_5,
    "tf_efficientnet_lite0": lambda: timm.create_model("tf_efficientnet_lite0"),
}


@pytest.mark.parametrize("name", ZOO)
def test_norms_fold_in_known_networks(name: str) -> None:
    torch.manual_seed(0)
    model = lived_in(ZOO[name]())
    new = check(model, inputs(2, 3, 64, 64), FoldBatchNorm(), tolerance=1e-11)
    left = sum(isinstance(module, _BatchNorm) for module in new.modules())
    assert left == (7 if name == "densenet" else 0)
    single = copy.deepcopy(model).float()
    x = inputs(2, 3, 64, 64).float()
    folded = netsurgery.apply(single, [FoldBatchNorm()], x, verify=True)
    assert (folded(x) - single(x)).abs().max() <= 2e-5 * single(x).abs().max()

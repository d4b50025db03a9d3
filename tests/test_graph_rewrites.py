"""Passes that rewrite modules: the function stays, and what comes after them finds an ordinary network."""

import copy
import dataclasses
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import timm
import torch
import torchvision
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.utils.parametrizations import weight_norm

import netsurgery
from netsurgery.errors import InputError, RewriteError
from netsurgery.passes import (
    BranchConv,
    Factorise,
    FoldBatchNorm,
    InsertLayer,
    MagnitudeScore,
    PlantChannels,
    PruneChannels,
)
from netsurgery.rewriting.stages import read
from small_network import Small


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
        if what == "tied, not run":
            self.other = nn.Conv2d(4, 4, 1)
            self.other.bias = self.conv.bias
        if what == "in a list":
            self.trained = [self.conv.weight]
        if what == "by another name":
            self.kernel = self.conv.weight
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
        if self.what == "bias":
            x = x * self.conv.bias[:, None, None]
        if self.what == "tied":
            x = self.other(x.relu())
        return x.flatten(1)


LEFT = {
    "weight norm": "a weight of 'conv', a ParametrizedConv2d, is shared, or computed from others",
    "statistics": "it takes the statistics of each batch",
    "tied": "a weight of 'conv', a Conv2d, is shared, or computed from others",
    "tied, not run": "a weight of 'conv', a Conv2d, is shared, or computed from others",
    "in a list": "a weight of 'conv', a Conv2d, is shared, or computed from others",
    "by another name": "a weight of 'conv', a Conv2d, is shared, or computed from others",
    "bias": "a weight of 'conv', a Conv2d, is shared, or computed from others",
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


# InsertLayer


NEW: dict[tuple[str, str], str] = {
    ("stem", "identity"): "BatchNorm2d ReLU Conv2d BatchNorm2d",
    ("inner", "identity"): "BatchNorm2d ReLU6 Conv2d BatchNorm2d",
    ("outer", "identity"): "BatchNorm2d Conv2d BatchNorm2d",
    ("grouped", "identity"): "Conv2d Conv2d",
    ("depthwise", "identity"): "Conv2d ReLU6 Conv2d",
    ("mix", "identity"): "Conv2d Conv2d",  # not only a ReLU reads it
    ("up", "identity"): "ConvTranspose2d Conv2d",
    ("hidden", "identity"): "Linear Linear",
    ("head", "identity"): "Linear Linear",
    ("stem", "shortcut"): "BatchNorm2d Shortcut",
    ("depthwise", "shortcut"): "Conv2d Shortcut",
    ("up", "shortcut"): "ConvTranspose2d Shortcut",
    ("back", "shortcut"): "Linear Shortcut",
}


@pytest.mark.parametrize(("path", "kind"), NEW)
def test_layers_are_inserted(path: str, kind: str) -> None:
    torch.manual_seed(0)
    model, x = lived_in(Small()), inputs(2, 3, 8, 8)
    new = check(model, x, InsertLayer(path, kind), tolerance=1e-13)
    place = f"{path}_norm" if hasattr(model, f"{path}_norm") else path
    series = new.get_submodule(place)
    assert " ".join(type(module).__name__ for module in series) == NEW[path, kind]
    assert type(series) is nn.Sequential and type(series[0]) is type(model.get_submodule(place))
    single = copy.deepcopy(model).float()
    found = netsurgery.apply(single, [InsertLayer(path, kind)], x.float(), verify=1e-6)(x.float())
    assert (found - single(x.float())).abs().max() <= 1e-6 * found.abs().max()


@pytest.mark.parametrize("path", ["stem", "inner", "outer", "dense", "up", "hidden"])
def test_new_channels_are_made_of_the_old_ones(path: str) -> None:
    torch.manual_seed(0)
    model, x = lived_in(Small()), inputs(2, 3, 8, 8)
    if path == "up":
        with pytest.raises(InputError, match=r"\('up', 'dense'\): new channels would change outputs: .*norm"):
            netsurgery.plan(model, [InsertLayer(path, "dense")], x)
        return
    new = check(model, x, InsertLayer(path, "dense", channels=2, seed=3), tolerance=1e-13)
    layer = new.get_submodule(path)
    assert torch.equal(layer.layer.weight, model.get_submodule(path).weight) and layer.new.weight.std() > 0
    width = len(model.get_submodule(path).weight)
    assert layer.new.weight.shape[:2] == (2, width)
    readers = {"stem": "inner", "outer": "mix", "inner": "outer", "dense": "up", "hidden": "back"}
    before, after = (net.get_submodule(readers[path]).weight for net in (model, new))
    assert after.numel() > before.numel() and after.count_nonzero() == before.count_nonzero()


def test_an_identity_without_an_activation_is_said() -> None:
    x = torch.randn(2, 4)
    for activation, said in ((nn.GELU(), True), (nn.ReLU(), False)):
        model = nn.Sequential(nn.Linear(4, 6), activation, nn.Linear(6, 2))
        summary = netsurgery.plan(model, [InsertLayer("0")], x).summary()
        assert ("no activation is beside the new layer" in summary) == said


def test_inserted_layers_learn() -> None:
    for kind in ("identity", "shortcut", "dense"):
        torch.manual_seed(0)
        model, x = lived_in(Small()), inputs(4, 3, 8, 8)
        optimizer = torch.optim.SGD(model.parameters(), 1e-3, momentum=0.9)
        new = netsurgery.apply(model, [InsertLayer("inner", kind)], x, optimizer=optimizer)
        before = {name: parameter.detach().clone() for name, parameter in new.named_parameters()}
        for _ in range(2):
            optimizer.zero_grad()
            new(x).square().sum().backward()
            optimizer.step()
        assert all(not torch.equal(parameter, before[name]) for name, parameter in new.named_parameters())


def test_several_layers_and_equal_ones() -> None:
    torch.manual_seed(0)
    model, x = lived_in(Small()), inputs(2, 3, 8, 8)
    series = [InsertLayer("inner", "shortcut"), InsertLayer("outer", "shortcut"), InsertLayer("inner"), FoldBatchNorm()]
    new = check(model, x, *series, tolerance=1e-12)
    weights = [new.get_submodule(f"{path}_norm") for path in ("inner", "outer")]
    assert not torch.equal(weights[0][1].branch[0].weight, weights[1][1].branch[0].weight[:, :, 1:4, 1:4])
    again = netsurgery.apply(model, series, x)
    assert all(torch.equal(tensor, again.state_dict()[name]) for name, tensor in new.state_dict().items())


def test_a_layer_that_runs_twice_gets_one_layer_more() -> None:
    torch.manual_seed(0)
    layer, act = nn.Linear(4, 4), nn.ReLU()
    model = lived_in(nn.Sequential(layer, act, layer, act, nn.Linear(4, 2)))
    new = netsurgery.apply(model, [InsertLayer("0")], inputs(2, 4), verify=1e-13)
    assert new[0] is new[2] and len(new[0]) == 2


def test_layers_that_cannot_be_inserted() -> None:
    model, x = lived_in(Small()), inputs(2, 3, 8, 8)
    model.dense.register_forward_hook(lambda *_: None)
    refused: list[tuple[Callable[[], netsurgery.Pass], str]] = [
        (lambda: InsertLayer("stem", "copy"), r"InsertLayer\(kind='copy'\): one of 'identity', 'shortcut', 'dense'"),
        (
            lambda: InsertLayer("stem", channels=3),
            "InsertLayer.channels=3.: of kind 'dense', a whole",
        ),
        (lambda: InsertLayer("stem", "dense", channels=0), "of kind 'dense', a whole number of at least 1"),
        (lambda: InsertLayer("sten"), "that runs; this one is none of Small; did you mean stem?"),
        (
            lambda: InsertLayer("norm"),
            "of a convolution or a linear layer that runs; this one is a LayerNorm",
        ),
        (lambda: InsertLayer("head", "dense"), r"\('head', 'dense'\): its channels are locked: the network output"),
        (lambda: InsertLayer("grouped", "dense"), "a grouped convolution keeps its groups"),
        (lambda: InsertLayer("mix", "dense"), "its channels are in groups, or grow with others"),
        (lambda: InsertLayer("dense", "dense"), r"\('dense', 'dense'\): 'dense' has hooks, which would see something"),
    ]
    for made, why in refused:
        with pytest.raises(InputError, match=why):
            netsurgery.plan(model, [made()], x)
    model.unused = nn.Linear(2, 2)
    with pytest.raises(InputError, match="that runs; this one does not run"):
        netsurgery.plan(model, [InsertLayer("unused")], x)


def test_saved_rewrites_load_in_another_process(tmp_path: Path) -> None:
    model, x = lived_in(Small()), inputs(1, 3, 8, 8)
    passes = [FoldBatchNorm(), MagnitudeScore(), PruneChannels(0.4), InsertLayer("hidden", "dense")]
    edit = netsurgery.plan(model, passes, x)
    small = netsurgery.rewrite(model, edit)
    netsurgery.save(tmp_path, small, edit)
    code = f"""
import sys, netsurgery
assert "netsurgery.passes" not in sys.modules
sys.path.insert(0, {str(Path(__file__).parent)!r})
from small_network import Small
print(type(netsurgery.load({str(tmp_path)!r}, Small().double().eval()).hidden).__name__)
"""
    ran = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, check=False)
    assert ran.stdout.split() == ["Dense"], ran.stderr[-2000:]


# BranchConv

BRANCHED: dict[str, tuple[nn.Module, tuple[int, ...], int, list[int]]] = {
    "1d": (nn.Conv1d(4, 7, 3), (2, 4, 9), 2, [4, 3]),
    "2d, strided": (nn.Conv2d(4, 9, 3, stride=2, padding=1, bias=False), (2, 4, 9, 9), 3, [3, 3, 3]),
    "2d, reflected": (nn.Conv2d(4, 6, 3, padding=1, padding_mode="circular"), (2, 4, 9, 9), 2, [3, 3]),
    "3d, dilated": (nn.Conv3d(4, 10, 2, dilation=2), (2, 4, 5, 5, 5), 3, [4, 3, 3]),
    "transposed": (nn.ConvTranspose2d(4, 6, 2, stride=2), (2, 4, 3, 3), 2, [3, 3]),
}


@pytest.mark.parametrize("name", BRANCHED)
def test_convolutions_branch(name: str) -> None:
    torch.manual_seed(0)
    layer, shape, parts, filters = BRANCHED[name]
    kind = {3: nn.Conv1d, 4: nn.Conv2d, 5: nn.Conv3d}[len(shape)]
    model = lived_in(nn.Sequential(copy.deepcopy(layer), nn.ReLU(), kind(layer.out_channels, 3, 1), nn.Flatten()))
    x = inputs(*shape)
    new = check(model, x, BranchConv("0", parts=parts), tolerance=1e-13)
    assert [branch.out_channels for branch in new[0]] == filters and {type(one) for one in new[0]} == {type(layer)}
    new[0][0].register_forward_hook(lambda *_: None)
    assert not new[0][1]._forward_hooks
    alone = netsurgery.apply(model, [BranchConv("0"), MagnitudeScore(), PruneChannels({"0.1": 0.5})], x, verify=1e-13)
    assert alone[0][0].out_channels > alone[0][1].out_channels  # a group of the concatenation


def test_branches_in_a_known_network() -> None:
    torch.manual_seed(0)
    model = lived_in(torchvision.models.resnet18(num_classes=5))
    passes = [
        BranchConv("layer1.0.conv1"),
        InsertLayer("layer1.0.conv1.1"),
        BranchConv("conv1", parts=3),
        FoldBatchNorm(),
    ]
    new = check(model, inputs(2, 3, 32, 32), *passes)
    assert [one.out_channels for one in new.conv1] == [22, 21, 21]


# Factorise


def net_of_matrices() -> nn.Module:
    torch.manual_seed(0)
    convolutions = nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Conv2d(16, 12, 1, stride=2, padding=1), nn.ReLU()
    return lived_in(nn.Sequential(*convolutions, nn.Flatten(), nn.Linear(12 * 16, 20), nn.ReLU(), nn.Linear(20, 4)))


def transformer() -> nn.Module:
    torch.manual_seed(0)
    return lived_in(timm.create_model("vit_tiny_patch16_224", img_size=32, patch_size=8, depth=1, embed_dim=48))


@pytest.mark.parametrize("made", [net_of_matrices, transformer])
def test_full_rank_is_exact(made: Callable[[], nn.Module]) -> None:
    model, x = made(), inputs(2, 3, 8, 8) if made is net_of_matrices else inputs(2, 3, 32, 32)
    passes = [Factorise(ratio=0, always=True)]
    edit = netsurgery.plan(model, passes, x)
    assert edit.exact and len(edit.modules) >= 3
    check(model, x, *passes)


def test_errors_are_stated_and_right() -> None:
    model, x = net_of_matrices(), inputs(2, 3, 8, 8)
    edit = netsurgery.plan(model, [Factorise(rank=4)], x)
    assert not edit.exact and [*edit.modules] == ["2", "5"]
    small = netsurgery.rewrite(model, edit)
    assert netsurgery.verify(model, small, edit, x) == 0 and edit.after.params < edit.before.params
    lines = edit.summary().splitlines()
    assert lines[0] == "asked to factorise 3 layers, factorised 2; short: 7: at rank 4 it has no fewer parameters"
    for path, line in zip(edit.modules, lines[2:], strict=True):
        old, (first, second) = model.get_submodule(path).weight.detach().flatten(1), small.get_submodule(path)
        product = second.weight.detach().flatten(1) @ first.weight.detach().flatten(1)
        error = float((product - old).norm() / old.norm())
        nearest = float(torch.linalg.svdvals(old)[4:].norm() / old.norm())
        assert (
            abs(error - nearest) < 1e-9 and line == f"  {path}: rank 4 of {min(old.shape)}, relative error {error:.2g}"
        )
        assert second.bias.equal(model.get_submodule(path).bias) and first.bias is None
        assert torch.allclose(first.weight.norm(), second.weight.norm())
    wide = nn.Linear(6, 6).double()
    wide.weight.data = torch.randn(6, 2, dtype=torch.float64) @ torch.randn(2, 6, dtype=torch.float64)
    low = nn.Sequential(wide, nn.Linear(6, 2).double())
    found = netsurgery.apply(low, [Factorise(rank=2, include="0")], inputs(3, 6))  # a matrix of that rank
    assert torch.allclose(found(inputs(3, 6)), low(inputs(3, 6)), rtol=1e-10)


def test_what_is_factorised() -> None:
    model, x = net_of_matrices(), inputs(2, 3, 8, 8)
    assert [*netsurgery.plan(model, [Factorise(ratio=0.5, include="5")], x).modules] == ["5"]
    assert [*netsurgery.plan(model, [Factorise(ratio=0.75, exclude=nn.Linear)], x).modules] == ["2"]
    edit = netsurgery.plan(model, [Factorise(ratio=0.75), MagnitudeScore(), PruneChannels({"5.0": 0.5})], x)
    small = netsurgery.rewrite(model, edit)
    assert netsurgery.verify(model, small, edit, x) < 1e-12 and small[5][0].out_features < 5
    model[5].weight.data[0, 0] = float("nan")
    model[2].register_forward_hook(lambda *_: None)
    refused: list[tuple[Callable[[], netsurgery.Pass], str]] = [
        (lambda: Factorise(), "Factorise takes a rank or a ratio, one of both"),
        (lambda: Factorise(3, 0.5), "Factorise takes a rank or a ratio, one of both"),
        (lambda: Factorise(0), r"Factorise\(rank=0\): a whole number of at least 1"),
        (lambda: Factorise(-2), r"Factorise\(rank=-2\): a whole number of at least 1"),
        (lambda: Factorise(ratio=1), r"Factorise\(ratio=1\): the share of the rank that goes is in \[0, 1\)"),
        (lambda: Factorise(2, include="9"), "pattern '9' matches no module"),
        (
            lambda: Factorise(2, exclude="7"),
            "can be factorised: 2: '2' has hooks.*; 5: its weight has entries that are no",
        ),
        (lambda: Factorise(9, include="7"), r"can be factorised: 7: its full rank is 4"),
        (lambda: Factorise(2, include="0"), "can be factorised: there is none"),
        (lambda: BranchConv("0", parts=1), r"BranchConv\(parts=1\): a whole number of at least 2"),
        (lambda: BranchConv("5"), "takes the path of a convolution; this one is a Linear"),
        (lambda: BranchConv("12"), "takes the path of a convolution; this one is none of Sequential; did you mean 2?"),
        (lambda: BranchConv("0", parts=17), "it has 16 filters for 17 parts"),
        (lambda: BranchConv("2"), "'2' has hooks, which would see something else"),
    ]
    for made, why in refused:
        with pytest.raises(InputError, match=why):
            netsurgery.plan(model, [made()], x)
    grouped = lived_in(nn.Sequential(nn.Conv2d(4, 4, 1, groups=2), nn.Conv2d(4, 2, 1)))
    with pytest.raises(InputError, match="it has 2 groups, whose filters read different inputs"):
        netsurgery.plan(grouped, [BranchConv("0")], inputs(1, 4, 2, 2))


# Known networks, last since they take long

ZOO: dict[str, Callable[[], nn.Module]] = {
    "resnet18": torchvision.models.resnet18,
    "mobilenet_v2": torchvision.models.mobilenet_v2,
    "densenet": lambda: torchvision.models.DenseNet(8, (2, 3), 16, num_classes=5),
    "shufflenet_v2_x0_5": torchvision.models.shufflenet_v2_x0_5,
    "tf_efficientnet_lite0": lambda: timm.create_model("tf_efficientnet_lite0"),
}


@pytest.mark.parametrize("name", [pytest.param(n, marks=pytest.mark.slow) if "net_" in n else n for n in ZOO])
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


PLACES: dict[str, tuple[Callable[[], nn.Module], int, list[tuple[str, str]]]] = {
    "resnet18": (
        lambda: torchvision.models.resnet18(num_classes=5),
        32,
        [("conv1", "identity"), ("layer1.0.conv2", "shortcut"), ("layer2.0.downsample.0", "dense")],
    ),
    "mobilenet_v2": (
        lambda: torchvision.models.mobilenet_v2(num_classes=5),
        32,
        [("features.2.conv.1.0", "identity"), ("features.3.conv.0.0", "shortcut"), ("features.4.conv.2", "dense")],
    ),
    "densenet": (
        ZOO["densenet"],
        32,
        [("features.conv0", "identity"), ("features.denseblock1.denselayer1.conv2", "dense")],
    ),
    "vit": (
        lambda: timm.create_model(
            "vit_tiny_patch16_224", img_size=32, patch_size=8, depth=2, embed_dim=48, num_heads=3
        ),
        32,
        [("blocks.0.mlp.fc1", "shortcut"), ("blocks.1.mlp.fc2", "identity"), ("blocks.1.mlp.fc1", "dense")],
    ),
    "efficientnet_lite0": (
        lambda: timm.create_model("tf_efficientnet_lite0", num_classes=4),
        32,
        [("blocks.1.0.conv_pw", "identity"), ("conv_stem", "shortcut")],
    ),
}


@pytest.mark.parametrize("name", [pytest.param(n, marks=pytest.mark.slow) if "net_" in n else n for n in PLACES])
def test_layers_are_inserted_in_known_networks(name: str) -> None:
    torch.manual_seed(0)
    make, size, places = PLACES[name]
    model = lived_in(make())
    check(model, inputs(2, 3, size, size), *[InsertLayer(path, kind) for path, kind in places], tolerance=1e-12)


# Modules that torch's fused encoder layer reads without running them


class Fused(nn.Module):
    """A fused encoder, a layer that is not fused, and one of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), 2)
        self.other = nn.TransformerEncoderLayer(8, 2, 16)
        self.own = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.own(self.other(self.encoder(x)))


def test_layers_of_a_fused_encoder_are_left_and_named() -> None:
    model, x = lived_in(Fused()), inputs(2, 4, 8)
    edit = netsurgery.plan(model, [Factorise(rank=8, always=True)], x)
    new = netsurgery.rewrite(model, edit)
    changed = [path for path, module in new.named_modules() if type(module) is nn.Sequential]
    assert changed == ["other.linear1", "other.linear2", "own"]
    short = edit.outcomes[0].short
    assert list(short) == [f"encoder.layers.{i}.linear{j}" for i in range(2) for j in (1, 2)]
    assert short["encoder.layers.1.linear2"] == (
        "in eval mode torch's fast path of 'encoder.layers.1', a TransformerEncoderLayer, reads "
        "'encoder.layers.1.linear2' without running it"
    )
    for grad in (True, False):
        with torch.set_grad_enabled(grad):
            assert torch.allclose(new(x), model(x), rtol=1e-12, atol=1e-13)


@dataclasses.dataclass(frozen=True)
class Become(netsurgery.ModuleRewrite):
    """A module of another class."""

    kind: type[nn.Module]
    args: tuple[int, ...] = ()
    exact = False

    def build(self, module: nn.Module) -> nn.Module:
        return self.kind(*self.args)


@pytest.mark.parametrize(
    ("part", "become"), [("norm1", Become(nn.BatchNorm1d, (8,))), ("activation", Become(nn.Tanh))], ids=str
)
def test_modules_of_a_fused_encoder_keep_their_class(part: str, become: Become) -> None:
    model = lived_in(nn.Sequential(nn.TransformerEncoderLayer(8, 2, 16, activation=nn.ReLU(), batch_first=True)))
    network = netsurgery.trace(model, inputs(2, 8, 8))
    with pytest.raises(RewriteError, match=rf"'0.{part}' of Sequential cannot become a \w+: in eval mode torch's fast"):
        netsurgery.rewrite(model, netsurgery.Edit(network, {}, modules={f"0.{part}": become}))
    for kind in ("identity", "shortcut", "dense"):
        with pytest.raises((RewriteError, InputError), match="fast path of '0'"):
            netsurgery.apply(model, [InsertLayer("0.linear1", kind)], inputs(2, 4, 8))
    eager = nn.Sequential(nn.TransformerEncoderLayer(8, 2, 16, activation=nn.ELU(), batch_first=True))
    netsurgery.apply(lived_in(eager), [InsertLayer("0.linear1", "shortcut")], inputs(2, 4, 8), verify=True)


def test_a_tied_layer_that_does_not_run_is_left_by_every_pass() -> None:
    model, x = lived_in(Own("tied, not run")), inputs(2, 3, 2, 2)
    edit = netsurgery.plan(model, [Factorise(rank=1)], x)
    assert list(edit.modules) == ["free"] and "is shared" in edit.outcomes[0].short["conv"]
    for one in (BranchConv("conv", parts=2), InsertLayer("conv", "dense")):
        with pytest.raises(InputError, match="a weight of 'conv', a Conv2d, is shared"):
            netsurgery.plan(model, [one], x)


class Looked(nn.Module):
    """Layers of which the code reads attributes."""

    def __init__(self, looks: tuple[str, ...]) -> None:
        super().__init__()
        self.looks = looks
        self.a, self.b, self.c, self.d, self.e = (nn.Linear(8, 8) for _ in range(5))
        self.last = nn.Conv2d(8, 8, 1)

    def forward(self, x: Tensor) -> Tensor:
        for name in "abcde":
            layer = getattr(self, name)
            if f"{name}.dtype" in self.looks:
                x = x.to(layer.weight.dtype)
            if f"{name}.size in training" in self.looks and self.training:
                x = 2 * x[..., : layer.out_features]
            if f"{name}.size" in self.looks:
                x = x[..., : layer.out_features]
            if f"{name}.kind" in self.looks and not isinstance(layer, nn.Linear):
                raise ValueError("no linear layer")
            x = layer(x).relu()
        if "last.padding" in self.looks and self.last.padding[0]:
            return x
        return self.last(x[..., None, None])


@pytest.mark.parametrize(
    "looks",
    [
        ("a.dtype",),
        ("e.size",),
        ("b.kind", "d.size"),
        ("last.padding", "a.dtype", "b.size"),
        ("c.size in training",),
        tuple("abcde"),
    ],
    ids=str,
)
def test_layers_of_which_the_code_reads_attributes_are_left_and_named(looks: tuple[str, ...]) -> None:
    looks = tuple(f"{one}.size" if len(one) == 1 else one for one in looks)
    model, x = lived_in(Looked(looks)), inputs(2, 8)
    edit = netsurgery.plan(model, [Factorise(rank=2)], x)
    left = [one.partition(".")[0] for one in looks]
    assert sorted(edit.outcomes[0].short) == sorted(left)
    assert sorted(edit.modules) == sorted({*"abcde", "last"} - {*left}) == sorted(edit.outcomes[0].notes)
    assert all("the model's code needs it as it is: " in why for why in edit.outcomes[0].short.values())
    assert netsurgery.rewrite(model, edit)(x).shape == (2, 8, 1, 1)
    with pytest.raises(InputError, match=rf"has no layer that can be factorised: {left[0]}: the model's code needs it"):
        netsurgery.plan(model, [Factorise(rank=2, include=left[0])], x)


class TwoModes(nn.Module):
    """What a layer gives is read once in eval mode."""

    def __init__(self, training: str, norm: bool) -> None:
        super().__init__()
        self.layer, self.head, self.aux = nn.Linear(4, 6), nn.Linear(6, 2), nn.Linear(6, 2)
        self.norm = nn.BatchNorm1d(6) if norm else nn.Identity()
        self.mode = training

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        y = self.norm(self.layer(x))
        if not self.training or self.mode == "the same":
            return self.head(y.relu())
        if self.mode == "read twice":
            return self.head(y.relu()), self.aux(y)
        if self.mode == "another activation":
            return self.head(torch.tanh(y)), y.sum()
        if self.mode == "returned":
            return self.head(y.relu()), y
        return self.head(y.relu()), self.aux(x.new_ones(3, 6))


@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize("mode", ["read twice", "another activation", "returned", "the same", "read once"])
def test_an_identity_is_one_in_training_too(mode: str, norm: bool) -> None:
    model, x = lived_in(TwoModes(mode, norm)), inputs(3, 4)
    new = netsurgery.apply(model, [InsertLayer("layer")], x, verify=True)
    clamped = any(isinstance(module, nn.ReLU) for module in new.modules())
    assert clamped == (mode in ("the same", "read once"))
    for one in (model, new):
        one.train()
        for module in one.modules():
            if isinstance(module, _BatchNorm):
                module.eval()
    for wanted, found in zip(model(x), new(x), strict=True):
        assert torch.allclose(wanted, found, rtol=1e-10, atol=1e-12)

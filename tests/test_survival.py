"""A pruned model is still a model: it trains, compiles, exports, is copied, changes precision, and takes other inputs.

Every check compares a pruned model with itself, run as it is, or with the original in which what went is silent.
"""

from __future__ import annotations

import copy
import functools
import importlib
import pickle
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import torchvision
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, fx, nn
from torch.export import Dim
from torch.nn.utils import parametrize
from torchvision.models.mobilenetv3 import InvertedResidualConfig, MobileNetV3

import netsurgery
import oracles
import zoo
from netsurgery.axes import Axis
from netsurgery.models import DigitsResNet
from netsurgery.passes import PruneChannels, RandomScore

ROOT = Path(__file__).resolve().parent.parent

# The models --------------------------------------------------------------------------------------------------------


class UNet(nn.Module):
    """Two scales, brought together by interpolation to the size of the larger one."""

    def __init__(self) -> None:
        super().__init__()
        self.down1, self.down2 = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 16, 3, 2, 1)
        self.norm, self.middle = nn.GroupNorm(4, 16), nn.Conv2d(16, 16, 3, padding=1)
        self.up, self.last = nn.Conv2d(24, 8, 3, padding=1), nn.Conv2d(8, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        fine = F.relu(self.down1(x))
        coarse = F.relu(self.middle(F.relu(self.norm(self.down2(fine)))))
        coarse = F.interpolate(coarse, size=fine.shape[-2:], mode="bilinear", align_corners=False)
        return F.interpolate(self.last(F.relu(self.up(torch.cat([fine, coarse], 1)))), scale_factor=2.0)


class GroupedQueries(nn.Module):
    """Attention whose keys and values serve two heads each, with every size written into the code."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = nn.Linear(16, 24), nn.Linear(16, 12), nn.Linear(16, 12)
        self.out = nn.Linear(24, 16)
        self.rate = 0.1

    def forward(self, x: Tensor) -> Tensor:
        b, n, _ = x.shape
        q = self.q(x).view(b, n, 4, 6).transpose(1, 2)
        k, v = (one(x).view(b, n, 2, 6).transpose(1, 2).repeat_interleave(2, 1) for one in (self.k, self.v))
        y = F.scaled_dot_product_attention(q, k, v, dropout_p=self.rate if self.training else 0.0, is_causal=True)
        return x + self.out(y.transpose(1, 2).reshape(b, n, 24))


class Logits(nn.Module):
    """A model of transformers, from tokens to logits."""

    def __init__(self, kind: str, **options: Any) -> None:
        super().__init__()
        # It looks for an optional package `kernels`; from the root of this repository it would find ours.
        sys.modules.setdefault("kernels", None)  # type: ignore[arg-type]
        hf: Any = importlib.import_module("transformers")
        sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
        config = getattr(hf, f"{kind}Config")(vocab_size=50, **sizes, **options)
        self.model = getattr(hf, f"{kind}Model")(config)
        self.head = nn.Linear(32, 7)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.model(tokens).last_hidden_state)


def mobilenet() -> nn.Module:
    settings = (
        (16, 3, 16, 16, True, "RE", 2, 1, 1.0),
        (16, 5, 48, 24, True, "HS", 2, 1, 1.0),
        (24, 3, 48, 24, False, "HS", 1, 1, 1.0),
    )
    return MobileNetV3([InvertedResidualConfig(*one) for one in settings], 64, num_classes=7)


def vit(**options: Any) -> nn.Module:
    return VisionTransformer(
        img_size=32, patch_size=8, embed_dim=48, depth=2, num_heads=4, mlp_ratio=2, num_classes=7, **options
    )


def encoder() -> nn.Module:
    return nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 4, 24, batch_first=True), 2, enable_nested_tensor=False)


@dataclass(frozen=True)
class Subject:
    """A model, the shape of one of its inputs, and another shape that it takes just as well, if it does."""

    build: Callable[[], nn.Module]
    shape: tuple[int, ...]
    other: tuple[int, ...] = ()
    tokens: bool = False

    def inputs(self, batch: int = 2, shape: tuple[int, ...] = ()) -> Tensor:
        generator = torch.Generator().manual_seed(batch)
        shape = (batch, *(shape or self.shape))
        return torch.randint(50, shape, generator=generator) if self.tokens else torch.randn(shape, generator=generator)


SUBJECTS = {
    "resnet": Subject(lambda: DigitsResNet((8, 16, 32)), (1, 8, 8), (1, 12, 11)),
    "mobilenet": Subject(mobilenet, (3, 32, 32), (3, 45, 48)),
    "unet": Subject(UNet, (3, 16, 16), (3, 23, 20)),
    "vit": Subject(lambda: torchvision.models.VisionTransformer(32, 8, 2, 4, 48, 96, num_classes=7), (3, 32, 32)),
    "timm vit": Subject(vit, (3, 32, 32)),
    "timm vit of any size": Subject(lambda: vit(dynamic_img_size=True), (3, 32, 32), (3, 40, 48)),
    "swin": Subject(
        lambda: torchvision.models.SwinTransformer([4, 4], 24, [1, 1], [2, 4], [4, 4], num_classes=7),
        (3, 48, 48),
        (3, 56, 72),
    ),
    "encoder": Subject(encoder, (5, 16), (9, 16)),
    "grouped queries": Subject(
        lambda: nn.Sequential(nn.Linear(8, 16), GroupedQueries(), nn.Linear(16, 3)), (5, 8), (7, 8)
    ),
    "llama": Subject(lambda: Logits("Llama", num_key_value_heads=2, use_cache=False), (5,), (9,), tokens=True),
    "bert": Subject(lambda: Logits("Bert", max_position_embeddings=16), (5,), (9,), tokens=True),
}


@dataclass(frozen=True)
class Pruned:
    """A model, and what is left of it when half of every group goes."""

    subject: Subject
    original: nn.Module
    small: nn.Module
    edit: netsurgery.Edit


@functools.cache
def pruned(name: str) -> Pruned:
    subject = SUBJECTS[name]
    torch.manual_seed(0)
    model = subject.build().eval()
    x = subject.inputs(8)
    zoo.randomise(model, x if subject.tokens else x / 4)  # what comes in is large: it reaches the end
    edit = netsurgery.plan(model, [RandomScore(), PruneChannels(0.5)], (subject.inputs(),))
    small = netsurgery.rewrite(model, edit)
    assert netsurgery.verify(model, small, edit, (subject.inputs(),)) < 1e-4
    return Pruned(subject, model, small, edit)


REWRITTEN = {"vit", "timm vit", "timm vit of any size", "swin", "encoder", "grouped queries"}


@pytest.mark.parametrize("name", SUBJECTS)
def test_the_subjects_are_alive(name: str) -> None:
    """Outputs tell inputs apart, most of the parameters went, and forwards were rewritten where they should be."""
    it = pruned(name)
    one, other = it.small(it.subject.inputs())
    assert (one - other).std() > 0.05 * one.std() > 1e-3
    assert it.edit.after.params < 0.6 * it.edit.before.params
    assert bool(it.edit.replaced) == (name in REWRITTEN)


# The checks --------------------------------------------------------------------------------------------------------

Check = Callable[[nn.Module, Pruned], None]


def close(found: Tensor, wanted: Tensor, tolerance: float = 1e-4) -> None:
    assert found.shape == wanted.shape
    assert (found.double() - wanted.double()).abs().max() <= tolerance * wanted.abs().max()


def at_rest(model: nn.Module) -> nn.Module:
    """The model without random numbers: what is set after surgery counts."""
    for module in model.modules():
        for name in ("p", "rate", "dropout"):
            if isinstance(getattr(module, name, None), float):
                setattr(module, name, 0.0)
    return model


def gradients(model: nn.Module, x: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    model(x).square().mean().backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def trains(model: nn.Module, it: Pruned) -> None:
    """One step, dropout and all: what had a gradient in the original has one, and the loss goes down."""
    x = it.subject.inputs(4)
    model.train()
    torch.manual_seed(0)
    found = gradients(model, x)
    assert found.keys() == gradients(copy.deepcopy(it.original).train(), x).keys()
    assert all(gradient.isfinite().all() for gradient in found.values())
    assert sum(gradient.any().item() for gradient in found.values()) > 0.9 * len(found)

    def loss() -> Tensor:
        torch.manual_seed(0)
        return model(x).square().mean()

    before = loss().detach()
    step = 1e-2 * before / sum(gradient.square().sum() for gradient in found.values())
    torch.optim.SGD(model.parameters(), step.item()).step()
    assert loss() < before


def stays(axis: Axis, edit: netsurgery.Edit) -> Tensor:
    """Ones at the positions along an axis that stay, zeros elsewhere."""
    parts = [stays(term, edit) for term in axis.terms]
    if axis.op:
        return torch.cat(parts) if axis.op == "concat" else functools.reduce(torch.kron, parts)
    group = edit.network.by_channel.get(axis)
    ones = torch.ones(axis.size)
    if group is not None and group.name in edit.keep:
        ones = torch.zeros(axis.size)
        ones[list(edit.keep[group.name])] = 1
    return ones


def has_the_gradients_of_the_silenced(model: nn.Module, it: Pruned) -> None:
    """Where no norm looks at them, units whose parameters are zero are silent: all else has the gradients it had."""
    network, x = it.edit.network, it.subject.inputs()
    norms = {path for path, m in it.original.named_modules() if re.search("(Layer|Group|RMS)Norm", type(m).__name__)}
    free = [g.name for g in network.groups if not any(m.module in norms for m in g.members)]
    edit = netsurgery.Edit(network, {name: units for name, units in it.edit.keep.items() if name in free})
    assert edit.keep
    silenced = copy.deepcopy(it.original)
    for name, parameter in silenced.named_parameters():
        for dim, axis in enumerate(network.axes[name]):
            ones = stays(axis, edit)
            parameter.data.mul_(ones.reshape([-1 if i == dim else 1 for i in range(parameter.dim())]))
    gradients(silenced, x)
    small = netsurgery.rewrite(silenced, edit)  # gradients are cut along
    wanted = {name: p.grad.clone() for name, p in small.named_parameters() if p.grad is not None}
    found = gradients(small, x)
    assert found.keys() == wanted.keys()
    scale = max(gradient.abs().max() for gradient in wanted.values())
    assert all((found[name] - wanted[name]).abs().max() < 1e-5 * scale for name in wanted)


def in_training_without_dropout(model: nn.Module, it: Pruned) -> None:
    """Rates that are set to zero after surgery are zero: all that is left of training mode are batch statistics."""
    x = it.subject.inputs(4)
    usual = model(x)
    at_rest(model).train()
    for module in model.modules():
        module.training = module.training and not isinstance(module, nn.modules.batchnorm._BatchNorm)
    close(model(x), usual, 1e-5)


def as_double(model: nn.Module, it: Pruned) -> None:
    in_precision(model, it, torch.float64, 1e-4)


def as_bfloat16(model: nn.Module, it: Pruned) -> None:
    in_precision(model, it, torch.bfloat16, 0.1)


def as_float16(model: nn.Module, it: Pruned) -> None:
    in_precision(model, it, torch.float16, 0.02)


def in_precision(model: nn.Module, it: Pruned, dtype: torch.dtype, tolerance: float) -> None:
    x = it.subject.inputs()
    usual = model(x)
    found = model.to(dtype)(x.to(dtype) if x.is_floating_point() else x)
    assert found.dtype == dtype
    close(found, usual, tolerance)


def under_autocast(model: nn.Module, it: Pruned) -> None:
    x = it.subject.inputs()
    usual = model(x)
    with torch.autocast("cpu", torch.bfloat16):
        found = model(x)
        wanted = it.original(x)
    assert found.dtype == wanted.dtype
    close(found, usual, 0.1)
    assert not torch.equal(found.float(), usual)
    found.float().square().mean().backward()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)


def in_channels_last(model: nn.Module, it: Pruned) -> None:
    x = it.subject.inputs().to(memory_format=torch.channels_last)
    usual = model(x)
    close(model.to(memory_format=torch.channels_last)(x), usual)
    original = copy.deepcopy(it.original).to(memory_format=torch.channels_last)
    small = netsurgery.rewrite(original, it.edit)  # the format stays through the surgery, too
    kernels = [p for p in small.parameters() if p.dim() == 4]
    assert all(kernel.is_contiguous(memory_format=torch.channels_last) for kernel in kernels)
    assert any(not kernel.is_contiguous() for kernel in kernels)
    close(small(x), usual)


def copied(model: nn.Module, it: Pruned) -> None:
    x = it.subject.inputs()
    usual = model(x)
    other = copy.deepcopy(model)
    assert [type(module) for module in other.modules()] == [type(module) for module in model.modules()]
    assert torch.equal(other(x), usual)
    for parameter in other.parameters():
        parameter.data.zero_()
    assert torch.equal(model(x), usual) and not torch.equal(other(x), usual)


def pickled(model: nn.Module, it: Pruned) -> None:
    x = it.subject.inputs()
    other = pickle.loads(pickle.dumps(model))
    assert [type(module) for module in other.modules()] == [type(module) for module in model.modules()]
    assert torch.equal(other(x), model(x))


def state_is_loaded(model: nn.Module, it: Pruned) -> None:
    """Into a second model, made by the same edit from an original with other weights."""
    x = it.subject.inputs()
    other = copy.deepcopy(it.original)
    for parameter in other.parameters():
        parameter.data.normal_()
    second = netsurgery.rewrite(other, it.edit)
    assert not torch.equal(second(x), model(x))
    second.load_state_dict(model.state_dict())
    assert torch.equal(second(x), model(x))


def takes_another_batch(model: nn.Module, it: Pruned) -> None:
    x = it.subject.inputs(5)
    close(model(x), torch.cat([model(one[None]) for one in x]))


def places(network: netsurgery.Network) -> dict[Any, str]:
    """The name of each group by where it occurs, the how-manieth of those."""
    found: dict[Any, str] = {}
    for group in network.groups:
        where = tuple((member.parameter, member.axis) for member in group.members)
        found[where, sum(1 for other, _ in found if other == where)] = group.name
    return found


def takes_another_size(model: nn.Module, it: Pruned) -> None:
    """The same edit, found again at the other size, silences what is gone."""
    x = it.subject.inputs(3, it.subject.other)
    network = netsurgery.trace(it.original, (x,))
    here, there = places(it.edit.network), places(network)
    keep = {there[key]: it.edit.keep[name] for key, name in here.items() if name in it.edit.keep}
    assert netsurgery.verify(it.original, model, netsurgery.Edit(network, keep), (x,)) < 1e-4


def compiles(model: nn.Module, it: Pruned) -> None:
    """As one graph, twice for four batch sizes: the second time for any."""
    graphs = []

    def backend(graph: fx.GraphModule, inputs: list[Any]) -> Callable[..., Any]:
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(model, backend=backend, fullgraph=True)
    for batch in (2, 3, 5, 6):
        x = it.subject.inputs(batch)
        close(compiled(x), model(x), 1e-6)
    assert len(graphs) == 2


def compiles_to_train(model: nn.Module, it: Pruned) -> None:
    x = it.subject.inputs(3)
    usual = gradients(at_rest(model).train(), x)
    found = gradients(torch.compile(copy.deepcopy(model), backend="aot_eager", fullgraph=True), x)
    for name, gradient in usual.items():
        close(found[f"_orig_mod.{name}"], gradient, 1e-3)


def compiles_to_machine_code(model: nn.Module, it: Pruned) -> None:
    compiled = torch.compile(model, fullgraph=True, dynamic=True)
    with torch.no_grad():
        for batch in (2, 5):
            close(compiled(it.subject.inputs(batch)), model(it.subject.inputs(batch)))


def exports(model: nn.Module, it: Pruned) -> None:
    program = torch.export.export(model, (it.subject.inputs(3),), dynamic_shapes=({0: Dim("batch")},))
    close(program.module()(it.subject.inputs(5)), model(it.subject.inputs(5)))


def exports_strictly(model: nn.Module, it: Pruned) -> None:
    program = torch.export.export(model, (it.subject.inputs(3),), dynamic_shapes=({0: Dim("batch")},), strict=True)
    close(program.module()(it.subject.inputs(5)), model(it.subject.inputs(5)))


def exports_for_any_size(model: nn.Module, it: Pruned) -> None:
    free = [dim for dim, (a, b) in enumerate(zip(it.subject.shape, it.subject.other, strict=True), 1) if a != b]
    dims = dict.fromkeys((0, *free), Dim.DYNAMIC)
    program = torch.export.export(model, (it.subject.inputs(3),), dynamic_shapes=(dims,))
    x = it.subject.inputs(5, it.subject.other)
    close(program.module()(x), model(x))


def runs_in_onnxruntime(model: nn.Module, it: Pruned) -> None:
    import onnxruntime

    program = torch.onnx.export(
        model, (it.subject.inputs(3),), dynamo=True, dynamic_shapes=({0: Dim("batch")},), verbose=False
    )
    session = onnxruntime.InferenceSession(program.model_proto.SerializeToString())
    x = it.subject.inputs(5)
    (found,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    close(torch.from_numpy(found), model(x))


def quantises_weights(model: nn.Module, it: Pruned) -> None:
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    usual, x = model(it.subject.inputs()), it.subject.inputs()
    quantize_(model, Int8WeightOnlyConfig())
    plain = [type(m.weight) is nn.Parameter for m in model.modules() if type(m) is nn.Linear]
    assert plain and not any(plain)
    close(model(x), usual, 0.1)


def quantises_an_export(model: nn.Module, it: Pruned) -> None:
    from torchao.quantization.pt2e import quantize_pt2e
    from torchao.quantization.pt2e.quantizer import x86_inductor_quantizer as x86

    quantizer = x86.X86InductorQuantizer().set_global(x86.get_default_x86_inductor_quantization_config())
    x = it.subject.inputs()
    prepared = quantize_pt2e.prepare_pt2e(torch.export.export(model, (x,)).module(), quantizer)
    close(prepared(x), model(x))
    converted = quantize_pt2e.convert_pt2e(prepared)
    assert any("dequantize" in str(node.target) for node in converted.graph.nodes)
    close(converted(x), model(x), 0.1)


def quantises_a_graph(model: nn.Module, it: Pruned) -> None:
    from torch.ao.quantization import get_default_qconfig_mapping
    from torch.ao.quantization.quantize_fx import convert_fx, prepare_fx

    x = it.subject.inputs()
    prepared = prepare_fx(copy.deepcopy(model), get_default_qconfig_mapping("x86"), (x,))
    close(prepared(x), model(x))
    close(convert_fx(prepared)(x), model(x), 0.1)


EAGER: tuple[Check, ...] = (
    trains,
    has_the_gradients_of_the_silenced,
    in_training_without_dropout,
    as_double,
    as_bfloat16,
    as_float16,
    under_autocast,
    in_channels_last,
    copied,
    pickled,
    state_is_loaded,
    takes_another_batch,
    takes_another_size,
    quantises_weights,
)
COMPILERS: tuple[Check, ...] = (
    compiles,
    compiles_to_train,
    compiles_to_machine_code,
    exports,
    exports_strictly,
    exports_for_any_size,
    runs_in_onnxruntime,
    quantises_an_export,
    quantises_a_graph,
)
#: of what takes seconds, what the default run has
QUICK = {
    ("grouped queries", compiles),
    ("encoder", exports),
    ("unet", exports_for_any_size),
    ("grouped queries", runs_in_onnxruntime),
    ("unet", quantises_an_export),
    ("unet", quantises_a_graph),
}
#: what the original cannot do, and what it says
CANNOT = {("swin", exports_for_any_size): "Guard failed"}
OF_CNNS = (quantises_an_export, quantises_a_graph)


def cases() -> Iterator[Any]:
    for check in (*EAGER, *COMPILERS):
        for name, subject in SUBJECTS.items():
            if check in (takes_another_size, exports_for_any_size) and not subject.other:
                continue
            if check is in_channels_last and len(subject.shape) < 3:
                continue
            if check is quantises_weights and name == "unet":  # it has no matrix
                continue
            if check in OF_CNNS and name not in ("resnet", "mobilenet", "unet"):
                continue
            marks = [pytest.mark.slow] if check in COMPILERS and (name, check) not in QUICK else []
            yield pytest.param(name, check, marks=marks, id=f"{name} {check.__name__}")


@pytest.mark.parametrize(("name", "check"), list(cases()))
@pytest.mark.filterwarnings("ignore:torch.ao.quantization is deprecated", "ignore:Please use quant_min and quant_max")
@pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor, torch", "ignore:All inputs of this cat")
@pytest.mark.filterwarnings("ignore:While compiling, we found certain side effects")  # of transformers' own
def test_survives(name: str, check: Check, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    torch.compiler.reset()
    it = pruned(name)
    torch.manual_seed(0)
    if (name, check) in CANNOT:
        with pytest.raises(AssertionError, match=CANNOT[name, check]):
            check(copy.deepcopy(it.original), it)
    else:
        check(copy.deepcopy(it.small), it)


@pytest.mark.parametrize("name", ["vit", "timm vit"])
def test_what_the_original_refuses_is_refused_alike(name: str) -> None:
    it = pruned(name)
    said = []
    for model in (it.original, it.small):
        with pytest.raises(AssertionError, match="height") as refused:
            model(torch.randn(1, 3, 40, 40))
        said.append(str(refused.value))
    assert said[0] == said[1]


# Rewritten forwards ------------------------------------------------------------------------------------------------


class Heads(nn.Module):
    """Attention with its sizes in the code, between two linear layers; ``before`` and ``weights`` are part of it."""

    def __init__(self, before: Callable[[Tensor], Tensor] = torch.relu, softmax: Any = torch.softmax) -> None:
        super().__init__()
        self.before, self.softmax = before, softmax
        self.qkv, self.out = nn.Linear(16, 72), nn.Linear(24, 16)
        self.register_buffer("code", torch.ones(16))
        self.register_buffer("own", torch.ones(16))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(self.before(x * self.code)).view(-1, 5, 3, 4, 6).permute(2, 0, 3, 1, 4)
        weights = self.softmax(q @ k.transpose(-2, -1) / 6**0.5, -1)
        return x + self.own * self.out((weights @ v).transpose(1, 2).reshape(-1, 5, 24))


def halved(inside: nn.Module, dtype: torch.dtype = torch.float64) -> tuple[nn.Module, netsurgery.Edit, Tensor]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 16), inside, nn.Linear(16, 3)).to(dtype).eval()
    x = torch.randn(2, 5, 8, dtype=dtype)
    edit = netsurgery.plan(model, [RandomScore(), PruneChannels(0.5)], (x,))
    return netsurgery.rewrite(model, edit), edit, x


class Rounded(torch.autograd.Function):
    """Rounds; its gradient is that of the identity."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.round()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient


def rounded(x: Tensor) -> Tensor:
    found: Tensor = Rounded.apply(8 * x) / 8
    return found


def without_gradient(x: Tensor) -> Tensor:
    with torch.no_grad():
        return x * 2


@torch.no_grad()
def never_with_gradient(x: Tensor) -> Tensor:
    return x * 2


def with_a_hook(x: Tensor) -> Tensor:
    x = x * 2
    if x.requires_grad:
        x.register_hook(lambda gradient: gradient * 3)
    return x


@pytest.mark.parametrize("before", [rounded, without_gradient, never_with_gradient, with_a_hook])
def test_gradients_of_its_own_are_not_lost(before: Callable[[Tensor], Tensor]) -> None:
    """A graph of the forward knows nothing of them, so the code stays as it is, and what it does not let is locked."""
    small, edit, x = halved(Heads(before))
    assert not edit.replaced and edit.keep
    why = re.compile(
        r"\(the code of 1 (uses|runs the torch.autograd.Function|asks for requires_grad).* at tests/test_sur"
    )
    assert all(why.search(g.locked or "") for g in edit.network.groups if g.unit == "head_dim")
    assert small(x).shape == (2, 5, 3)


def test_plain_code_is_rewritten() -> None:
    _, edit, _ = halved(Heads())
    assert list(edit.replaced) == ["1"]
    assert all(g.locked is None for g in edit.network.groups if g.unit == "head_dim")


def in_double(x: Tensor, dim: int) -> Tensor:
    """Softmax in float64, whatever the input; then back to its dtype."""
    dtype = x.dtype
    assert dtype in (torch.float64, torch.float32)
    return torch.softmax(x * 1e3, dim, dtype=torch.float64).log1p().to(dtype)


def test_a_dtype_that_the_code_names_stays() -> None:
    small, edit, x = halved(Heads(softmax=in_double))
    assert list(edit.replaced) == ["1"]
    small = small.float()
    code = edit.adaptation.code["1"] if edit.adaptation else ""
    assert code.count("dtype = torch.float64") == 1 and code.count("torch.float64") == 1
    assert small(x.float()).dtype == torch.float32
    seen: list[torch.dtype] = []

    class Watch(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            out = func(*args, **(kwargs or {}))
            if func is torch.softmax:
                seen.append(out.dtype)
            return out

    with Watch():
        small(x.float())
    assert seen == [torch.float64]


class Guarded(Heads):
    """Says itself what is pickled."""

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "cache": None}


def test_it_says_itself_what_is_pickled() -> None:
    small, _, x = halved(Guarded())
    small[1].cache = lambda: None  # cannot be pickled
    other = pickle.loads(pickle.dumps(small))
    assert other[1].cache is None and torch.equal(other(x), small(x))
    assert copy.deepcopy(small)[1].cache is None


def test_parametrised_after_surgery() -> None:
    small, _, x = halved(nn.Sequential(Own()))
    parametrize.register_parametrization(small[1][0].attention, "in_proj_weight", nn.Tanh())
    smaller, edit = oracles.check(small, (x,), 1e-9, share=0.5)
    assert parametrize.is_parametrized(smaller[1][0].attention) and list(edit.replaced) == ["1.0.attention"]
    assert torch.equal(copy.deepcopy(smaller)(x), smaller(x))


class Own(nn.Module):
    """Attention of one input with itself."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(16, 4, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.attention(x, x, x, need_weights=False)[0]
        return x + found


@pytest.mark.slow
@pytest.mark.parametrize("name", ["timm vit", "encoder"])
def test_unpickled_in_another_process(name: str, tmp_path: Path) -> None:
    it = pruned(name)
    torch.save(it.small, tmp_path / "model.pt")
    torch.save((it.subject.inputs(), it.small(it.subject.inputs())), tmp_path / "run.pt")
    code = (
        "import sys, torch\n"
        "model = torch.load(sys.argv[1], weights_only=False)\n"
        "x, wanted = torch.load(sys.argv[2])\n"
        "assert (model(x) - wanted).abs().max() < 1e-5 * wanted.abs().max()\n"
    )
    subprocess.run([sys.executable, "-c", code, tmp_path / "model.pt", tmp_path / "run.pt"], check=True, cwd=ROOT)


class Positions(nn.Module):
    """Has room for twelve positions: learned, looked up, and masked."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(8, 16), nn.Linear(16, 3)
        self.learned, self.table = nn.Parameter(torch.randn(1, 12, 16)), nn.Embedding(12, 16)
        self.register_buffer("ids", torch.arange(12)[None])
        self.register_buffer("mask", torch.ones(12, 12).tril())

    def forward(self, x: Tensor) -> Tensor:
        n = x.shape[1]
        x = self.first(x) + self.learned[:, :n] + self.table(self.ids[:, :n])
        weights = (x @ x.transpose(1, 2)).masked_fill(self.mask[:n, :n] == 0, float("-inf"))
        return self.last(torch.softmax(weights, -1) @ x)


def test_what_longer_inputs_need_stays() -> None:
    torch.manual_seed(0)
    model = Positions().eval()
    network = netsurgery.trace(model, torch.randn(2, 5, 8))
    rest = [g for g in network.groups if g.locked == "the recorded run does not use this part of the tensor"]
    assert [g.name for g in rest] == ["learned:2", "ids", "mask", "mask:2"] and {g.size for g in rest} == {7}
    edit = netsurgery.plan(model, [RandomScore(), PruneChannels(0.5)], torch.randn(2, 5, 8))
    assert list(edit.keep) == ["first"]
    x = torch.randn(3, 12, 8)
    longer = netsurgery.Edit(netsurgery.trace(model, x), edit.keep)
    assert netsurgery.verify(model, netsurgery.rewrite(model, edit), longer, x) < 1e-5

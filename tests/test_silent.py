"""Nothing silent: where other tools prune wrongly without a word, the result is exact or a named operation locks."""

import re
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import netsurgery
from netsurgery.errors import InputError, NetsurgeryError, TraceError
from netsurgery.passes import HGSRScore, MagnitudeScore, PruneChannels, RandomScore
from oracles import RandomKeep, check, snapshot

Run = Callable[["Between", Tensor], Tensor]


class Between(nn.Module):
    """A convolution to 8 channels, what a test does to them, and a convolution of the result."""

    def __init__(self, run: Run, after: int = 8, **layers: nn.Module | nn.Parameter | Tensor):
        super().__init__()
        self.run = run
        self.a = nn.Conv2d(3, 8, 3, padding=1)
        self.b = nn.Conv2d(after, 4, 1)
        for name, layer in layers.items():
            if isinstance(layer, Tensor) and not isinstance(layer, nn.Parameter):
                self.register_buffer(name, layer)
            else:
                setattr(self, name, layer)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.run(self, x))


X = torch.randn(2, 3, 4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def between(run: Run, after: int = 8, **layers: nn.Module | nn.Parameter | Tensor) -> Between:
    torch.manual_seed(0)
    return Between(run, after, **layers).double().eval()


def pruned(model: nn.Module, inputs: tuple[Tensor, ...] = (X,)) -> set[tuple[str, int]]:
    """The parameters, and their axes, that some of five random removals made smaller; each of these was exact."""
    edits = [check(model, inputs, 1e-10, seed)[1] for seed in range(4)]
    edits.append(check(model, inputs, 1e-10, share=7 / 8)[1])  # one unit of eight: rounding may hide a wrong size
    groups = [edit.network[name] for edit in edits for name in edit.keep]
    return {(member.parameter, member.axis) for group in groups for member in group.members}


#: The channels that every test below is about.
MIDDLE = ("a.weight", 0)


# Exact, and not by refusing to prune -------------------------------------------------------------------------


def parts_in_turn(first: int, second: int) -> Run:
    def run(net: Between, x: Tensor) -> Tensor:
        parts = net.a(x).chunk(2, 1)
        done = {}
        for i in (first, second):  # the order in which they are consumed is not their order
            done[i] = (net.one if i == 0 else net.two)(parts[i])
        return torch.cat([done[1], done[0]], 1)

    return run


def through_a_shared_layer(net: Between, x: Tensor) -> Tensor:
    x = net.a(x)
    return net.one(net.one(x).relu()) + x


def detached(net: Between, x: Tensor) -> Tensor:
    return net.a(x).detach()


def without_gradients(net: Between, x: Tensor) -> Tensor:
    with torch.no_grad():
        x = net.a(x)
    return net.one(x)


def shuffled(net: Between, x: Tensor) -> Tensor:
    b, c, h, w = net.a(x).shape
    return net.a(x).view(b, 2, c // 2, h, w).transpose(1, 2).reshape(b, c, h, w)


def temporal_shift(net: Between, x: Tensor) -> Tensor:
    """Two channels from the next image, two from the last: written into zeros slice by slice."""
    x = net.a(x)
    out = torch.zeros_like(x)
    out[:-1, :2], out[1:, 2:4], out[:, 4:] = x[1:, :2], x[:-1, 2:4], x[:, 4:]
    return out


def in_place(net: Between, x: Tensor) -> Tensor:
    x = net.a(x)
    first, second = x.chunk(2, 1)
    first.mul_(2)
    second.relu_()
    return x.add_(1)


EXACT = {
    "split, parts in order": between(parts_in_turn(0, 1), one=nn.Conv2d(4, 4, 1), two=nn.Conv2d(4, 4, 1)),
    "split, parts consumed in another order": between(
        parts_in_turn(1, 0), one=nn.Conv2d(4, 4, 1), two=nn.Conv2d(4, 4, 1)
    ),
    "cat with the input": between(lambda net, x: torch.cat([x, net.a(x)], 1), 11),
    "cat with the input, last": between(lambda net, x: torch.cat([net.a(x), x], 1), 11),
    "cat with itself": between(lambda net, x: torch.cat([y := net.a(x), y], 1), 16),
    "cat with zeros": between(lambda net, x: torch.cat([y := net.a(x), torch.zeros_like(y)], 1), 16),
    "zero padded channels": between(lambda net, x: F.pad(net.a(x)[:, :, ::2, ::2], (0, 0, 0, 0, 2, 2)), 12),
    "channel shuffle": between(shuffled),
    "nn.ChannelShuffle": between(lambda net, x: net.shuffle(net.a(x)), shuffle=nn.ChannelShuffle(2)),
    "NCHW flatten": between(lambda net, x: net.one(net.a(x).flatten(1))[..., None, None], 6, one=nn.Linear(128, 6)),
    "NHWC flatten": between(
        lambda net, x: net.one(net.a(x).permute(0, 2, 3, 1).flatten(1))[..., None, None], 6, one=nn.Linear(128, 6)
    ),
    "HCW flatten": between(
        lambda net, x: net.one(net.a(x).transpose(1, 2).flatten(1))[..., None, None], 6, one=nn.Linear(128, 6)
    ),
    "flip over space": between(lambda net, x: net.a(x).flip(3)),
    "grouped convolution": between(lambda net, x: net.one(net.a(x)), 6, one=nn.Conv2d(8, 6, 3, padding=1, groups=2)),
    "grouped convolutions of different groups": between(
        lambda net, x: net.two(net.one(net.a(x))), one=nn.Conv2d(8, 8, 1, groups=4), two=nn.Conv2d(8, 8, 1, groups=2)
    ),
    "grouped convolution, flattened": between(
        lambda net, x: net.two(net.one(net.a(x)).flatten(1))[..., None, None],
        one=nn.Conv2d(8, 8, 1, groups=4),
        two=nn.Linear(128, 8),
    ),
    "transposed, grouped": between(lambda net, x: net.one(net.a(x)), 12, one=nn.ConvTranspose2d(8, 12, 2, 2, groups=4)),
    "group norm of a cat": between(
        lambda net, x: net.one(torch.cat([y := net.a(x), y.square()], 1)), 16, one=nn.GroupNorm(4, 16)
    ),
    "GLU": between(lambda net, x: F.glu(net.a(x), 1), 4),
    "shared layer": between(through_a_shared_layer, one=nn.Conv2d(8, 8, 3, padding=1)),
    "detached": between(detached),
    "without gradients": between(without_gradients, one=nn.Conv2d(8, 8, 1)),
    "in place, through views": between(in_place),
    "a weight and its transpose": between(
        lambda net, x: F.conv2d(F.conv2d(net.a(x), net.w), net.w.transpose(0, 1)),
        w=nn.Parameter(torch.randn(6, 8, 1, 1)),
    ),
    "a slice of a larger weight": between(
        lambda net, x: F.conv2d(y := net.a(x), net.w[:, : y.shape[1]]), w=nn.Parameter(torch.randn(8, 10, 1, 1))
    ),
    "a buffer per channel": between(lambda net, x: net.a(x) * net.mask, mask=torch.rand(8, 1, 1)),
    "batch statistics": between(lambda net, x: F.batch_norm(net.a(x), None, None, training=True)),
    "mean over everything": between(lambda net, x: (y := net.a(x)) - y.mean()),
    "root mean square": between(lambda net, x: (y := net.a(x)) * torch.rsqrt(y.square().mean(1, keepdim=True) + 0.1)),
    "unfold": between(lambda net, x: F.unfold(net.a(x), 1).view(2, -1, 4, 4)),
    "bilinear": between(
        lambda net, x: net.one(net.a(x).mean((2, 3)), net.a(x).amax((2, 3)))[..., None, None], one=nn.Bilinear(8, 8, 8)
    ),
    "parts of a written size": between(lambda net, x: torch.cat(net.a(x).split(4, 1)[::-1], 1)),
    "parts of written sizes": between(lambda net, x: torch.cat(net.a(x).split([3, 5], 1)[::-1], 1)),
    "blocks of written sizes": between(lambda net, x: net.a(x).view(2, 2, 4, 4, 4).sum(1), 4),
    "a strided slice": between(lambda net, x: net.a(x)[:, ::2], 4),
}  # fmt: skip


@pytest.mark.parametrize("name", EXACT)
def test_exact(name):
    assert MIDDLE in pruned(EXACT[name])


# Locked, by an operation that is named -----------------------------------------------------------------------


def halves_by_size(net: Between, x: Tensor) -> Tensor:
    x = net.a(x)
    half = x.shape[1] // 2
    return torch.cat([x[:, half:], x[:, :half]], 1)


def quiet(run):
    """The same with its gradients, said explicitly: such code is not rewritten."""

    def forward(net: Between, x: Tensor) -> Tensor:
        with torch.enable_grad():
            return run(net, x)

    return forward


LOCKED = {
    "aten.flip": between(lambda net, x: net.a(x).flip(1)),
    "aten.roll": between(lambda net, x: net.a(x).roll(1, 1)),
    "aten.index": between(lambda net, x: net.a(x)[:, net.order], order=torch.randperm(8)),
    "aten.index, a list": between(lambda net, x: net.a(x)[:, [2, 0, 1]], 3),
    "aten.index_select": between(lambda net, x: net.a(x).index_select(1, net.order), order=torch.randperm(8)),
    "aten.cumsum": between(lambda net, x: net.a(x).cumsum(1)),
    "aten.sort": between(lambda net, x: net.a(x).sort(1)[0]),
    "aten.topk": between(lambda net, x: net.a(x).topk(3, dim=1)[0], 3),
    "aten.argmax": between(lambda net, x: net.a(x) * net.a(x).argmax(1, keepdim=True)),
    "aten.unbind": between(lambda net, x: torch.stack([t * i for i, t in enumerate(net.a(x).unbind(1))], 1)),
    "aten.select": between(lambda net, x: torch.stack([net.a(x)[:, i] * i for i in range(8)], 1)),
    "aten.slice": between(lambda net, x: net.a(x)[:, ::3], 3),
    "aten.split": between(quiet(lambda net, x: torch.cat(net.a(x).split(4, 1)[::-1], 1))),
    "aten.split_with_sizes": between(quiet(lambda net, x: torch.cat(net.a(x).split([3, 5], 1)[::-1], 1))),
    "aten.view": between(quiet(lambda net, x: net.a(x).view(2, 2, 4, 4, 4).sum(1)), 4),
    "aten.view, across": between(quiet(lambda net, x: net.a(x).reshape(2, 4, 8, 4)), 4),
    "aten.div": between(lambda net, x: (y := net.a(x)) / y.shape[1]),
    "aten.constant_pad_nd": between(lambda net, x: F.pad(y := net.a(x), (0, 0, 0, 0, 0, 12 - y.shape[1])), 12),
    "aten.linspace": between(
        lambda net, x: (y := net.a(x)) * torch.linspace(0, 1, y.shape[1], dtype=x.dtype)[:, None, None]
    ),
    "aten.convolution": between(lambda net, x: net.a(x).transpose(1, 2), 4),
    "aten.avg_pool3d": between(lambda net, x: F.local_response_norm(net.a(x), 3)),
    "aten.masked_scatter": between(lambda net, x: (y := net.a(x)).masked_scatter(y > 0, y)),
    "aten.mean": between(
        lambda net, x: F.conv2d(net.a(x), net.w - net.w.mean((1, 2, 3), keepdim=True)),
        w=nn.Parameter(torch.randn(8, 8, 1, 1)),
    ),
    "aten.as_strided": between(lambda net, x: net.a(x).as_strided((2, 4, 4, 4), (128, 16, 4, 1)), 4),
}  # fmt: skip


@pytest.mark.parametrize("name", LOCKED)
def test_locked_by_a_named_operation(name):
    model = LOCKED[name]
    network = netsurgery.trace(model, (X,))
    reasons = [g.locked or "" for g in network.groups if any((m.parameter, m.axis) == MIDDLE for m in g.members)]
    assert all(re.search(r"aten\.\w+.* at tests/test_silent.py:\d+", reason) for reason in reasons)
    operation = re.escape(name.partition(",")[0])
    assert any(re.search(rf"{operation}\b", reason) for reason in reasons)
    assert MIDDLE not in pruned(model)


def test_size_read_by_the_code_is_exact_or_refused():
    model = between(quiet(halves_by_size))
    network = netsurgery.trace(model, (X,))
    for seed in range(4):  # halves of other sizes than half: planned, it is exact; carried out by hand, it is refused
        check(model, (X,), 1e-10, seed)
        edit = RandomKeep(seed).run(network)
        first, second = (len(edit.keep.get(name, range(4))) for name in ("a", "a:2"))
        if first != (first + second) // 2:
            with pytest.raises(NetsurgeryError, match=r"aten\.slice"):
                netsurgery.rewrite(model, edit)


def test_branch_on_a_size_is_locked():
    model = between(lambda net, x: y.relu() if (y := net.a(x)).shape[1] == 8 else y)
    assert not pruned(model)
    assert "aten.relu" in netsurgery.trace(model, (X,))["a"].locked


# Attention ---------------------------------------------------------------------------------------------------


class Attends(nn.Module):
    def __init__(self, **options: bool):
        super().__init__()
        self.embed = nn.Linear(5, 8)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True, **options)
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        return self.head(self.attention(x, x, x, need_weights=False)[0])


@pytest.mark.parametrize("options", [{}, {"bias": False}, {"add_bias_kv": True}, {"add_zero_attn": True}])
def test_attention_within_a_model(options):
    torch.manual_seed(0)
    model = Attends(**options).double().eval()
    x = torch.randn(2, 6, 5, dtype=torch.float64)
    pruned(model, (x,))
    network = netsurgery.trace(model, (x,))
    for group in network.groups:
        assert group.locked is None or re.search(r"network (in|out)put|a single unit| in attention\b", group.locked)


def test_bare_attention():
    torch.manual_seed(0)
    model = nn.MultiheadAttention(8, 2, batch_first=True).double().eval()
    x = torch.randn(2, 6, 8, dtype=torch.float64)
    pruned(model, (x, x, x))
    assert netsurgery.trace(model, (x, x, x)).groups


# What the rewritten model keeps ------------------------------------------------------------------------------


def test_tied_weights_stay_tied():
    model = between(lambda net, x: net.two(net.one(net.a(x)).relu()), one=nn.Conv2d(8, 8, 1), two=nn.Conv2d(8, 8, 1))
    model.two.weight = model.one.weight
    small, edit = check(model, (X,), 1e-10, share=0.5)
    assert edit.keep
    assert small.two.weight is small.one.weight
    assert small.two.weight is not model.two.weight


def test_frozen_weights_stay_frozen_and_are_pruned():
    model = between(lambda net, x: net.one(net.a(x)) + net.a(x), one=nn.Conv2d(8, 8, 1)).requires_grad_(False)
    model.one.bias.requires_grad_(True)
    small, edit = check(model, (X,), 1e-10, share=0.5)
    assert edit.keep
    assert [name for name, p in small.named_parameters() if p.requires_grad] == ["one.bias"]


@pytest.mark.parametrize("inplace", [True, False])
def test_gradients_are_cut_like_their_weights(inplace):
    model = between(lambda net, x: net.one(net.a(x)), one=nn.BatchNorm2d(8))
    for parameter in model.parameters():
        parameter.grad = 3 * parameter.detach()
    model.b.bias.grad = None
    network = netsurgery.trace(model, (X,))
    small = netsurgery.rewrite(model, netsurgery.Edit(network, {"a": (1, 4, 6)}), inplace=inplace)
    assert small.b.bias.grad is None
    small.b.bias.grad = 3 * small.b.bias.detach()
    for parameter in small.parameters():
        torch.testing.assert_close(parameter.grad, 3 * parameter.detach())


@pytest.mark.parametrize("training", [True, False])
def test_mode_and_hooks_stay(training):
    model = between(lambda net, x: net.one(net.a(x)), one=nn.Sequential(nn.BatchNorm2d(8), nn.Dropout(0.5))).train(
        training
    )
    model.one[1].eval()
    model.a.register_forward_hook(lambda *_: None)
    before = snapshot(model)
    small = netsurgery.apply(model, [RandomScore(), PruneChannels(0.5)], (X,))
    for net in (model, small):
        assert (net.training, net.one[0].training, net.one[1].training) == (training, training, False)
        assert len(net.a._forward_hooks) == 1
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def fails(net: Between, x: Tensor) -> Tensor:
    raise ValueError("not today")


@pytest.mark.parametrize("call", [netsurgery.trace, netsurgery.cost])
def test_a_failed_trace_leaves_no_trace(call):
    model = between(fails).train()
    before = snapshot(model)
    attributes = {path: set(vars(module)) for path, module in model.named_modules()}
    with pytest.raises(TraceError, match=r"not today.*at tests/test_silent.py:\d+"):
        call(model, (X,))
    assert all(module.training for module in model.modules())
    assert {path: set(vars(module)) for path, module in model.named_modules()} == attributes
    for module in model.modules():
        assert not module._forward_hooks
        assert not module._forward_pre_hooks
        assert not module._backward_hooks
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


# What is refused ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("units", "message"),
    [
        ((0, 8), r"0\.\.7"),
        ((-1, 2), r"0\.\.7"),
        ((1, 1), "distinct"),
        ((), "at least one must stay"),
    ],
)
def test_impossible_units_are_refused(units, message):
    network = netsurgery.trace(between(lambda net, x: net.a(x)), (X,))
    with pytest.raises(InputError, match=message):
        netsurgery.Edit(network, {"a": units})


@pytest.mark.parametrize("group", ["a:in", "b"])
def test_inputs_and_outputs_are_refused(group):
    network = netsurgery.trace(between(lambda net, x: net.a(x)), (X,))
    with pytest.raises(InputError, match=r"locked: the network (in|out)put"):
        netsurgery.Edit(network, {group: (0, 1)})


def test_unequal_halves_of_a_chunk_are_refused():
    network = netsurgery.trace(EXACT["split, parts in order"], (X,))
    with pytest.raises(InputError, match="equally many"):
        netsurgery.Edit(network, {"a": (0, 1), "a:2": (0, 1, 2)})


# Scores ------------------------------------------------------------------------------------------------------


def test_grouped_inputs_are_scored_by_the_outputs_that_read_them():
    """Each input channel of a grouped convolution feeds the outputs of its own group, no others."""
    model = between(lambda net, x: net.one(net.a(x)), 6, one=nn.Conv2d(8, 6, 3, padding=1, groups=2))
    network = netsurgery.trace(model, (X,))
    scores = HGSRScore().run(network).scores
    kernels = model.one.weight.detach().abs().sum((2, 3)).sqrt()  # (outputs, inputs of a group)
    terms = torch.cat([kernels[:3].sum(0), kernels[3:].sum(0)]) ** 2  # one for each of the 8 input channels
    torch.testing.assert_close(scores["a:2"], terms[:4] + terms[4:])
    outputs = model.b.weight.detach().abs().sum((2, 3)).sqrt().sum(0) ** 2  # the groups' outputs, as b reads them
    want = [terms[:4].sum() + outputs[:3].sum(), terms[4:].sum() + outputs[3:].sum()]
    torch.testing.assert_close(scores["a"], torch.stack(want))


def test_a_strong_group_is_not_mixed_with_a_weak_one():
    model = between(lambda net, x: net.one(net.a(x)), 6, one=nn.Conv2d(8, 6, 3, padding=1, groups=2))
    with torch.no_grad():
        model.one.weight[3:] *= 100  # the second group
        model.a.weight[4:] *= 100
    network = netsurgery.trace(model, (X,))
    for score in (HGSRScore(), MagnitudeScore()):
        weak, strong = score.run(network).scores["a"]
        assert strong > 10 * weak

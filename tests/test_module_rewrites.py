"""Modules that an edit replaces or wraps: stages, names, hooks, optimizers, JSON, and what is refused."""

import copy
import types
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import netsurgery
from netsurgery import Edit, ModuleRewrite
from netsurgery.errors import InputError, NetsurgeryError, PassError, RewriteError
from netsurgery.module_rewrites import register_rewrite
from netsurgery.passes import Compensate, MagnitudeScore, PlantChannels, Planting, PruneChannels, RemoveBlocks
from netsurgery.rewriting.stages import left, read

X = torch.randn(3, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
HALF = (MagnitudeScore(), PruneChannels(0.5))


@register_rewrite
@dataclass(frozen=True)
class Followed(ModuleRewrite):
    """The module, and a linear layer that passes on what it gives."""

    scale: float = 1.0

    def build(self, module: nn.Linear) -> nn.Module:
        new = nn.Linear(module.out_features, module.out_features)
        nn.init.eye_(new.weight).data.mul_(self.scale)
        nn.init.zeros_(new.bias)
        return nn.Sequential(module, new)


@register_rewrite
@dataclass(frozen=True)
class Smooth(ModuleRewrite):
    beta: float
    exact = False

    def build(self, module: nn.Module) -> nn.Module:
        return nn.Softplus(self.beta)


@dataclass(frozen=True)
class Unregistered(ModuleRewrite):
    def build(self, module: nn.Module) -> nn.Module:
        return module


@register_rewrite
@dataclass(frozen=True)
class Of(ModuleRewrite):
    """Whatever a function gives."""

    function: Any
    other: tuple[str, ...] = ()

    @property
    def reads(self) -> tuple[str, ...]:
        return self.other

    def build(self, module: nn.Module, *others: nn.Module) -> nn.Module:
        found: nn.Module = self.function(module, *others)
        return found


@dataclass(frozen=True)
class Rewrite(netsurgery.Pass):
    kind: type[nn.Module]
    rewrite: ModuleRewrite
    gives = frozenset({"edit"})

    def run(self, network: netsurgery.Network) -> Edit:
        paths = [path for path, one in network.model.named_modules() if path and isinstance(one, self.kind)]
        return Edit(network, {}, modules=dict.fromkeys(paths, self.rewrite))


def net(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 2)).double()


def edit_of(model: nn.Module, **modules: ModuleRewrite) -> Edit:
    return Edit(netsurgery.trace(model, X), {}, modules={p.replace("_", "."): r for p, r in modules.items()})


def state(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


FOLLOWED, SMOOTH = Rewrite(nn.Linear, Followed()), Rewrite(nn.ReLU, Smooth(0.3))
SERIES: dict[str, list[netsurgery.Pass]] = {
    "rewritten": [FOLLOWED],
    "rewritten twice": [FOLLOWED, FOLLOWED],
    "rewritten, pruned": [FOLLOWED, *HALF],
    "pruned, rewritten": [*HALF, FOLLOWED],
    "pruned twice, rewritten, grown and pruned": [*HALF, *HALF, FOLLOWED, PlantChannels(3), *HALF],
    "scored, in other ways, pruned": [MagnitudeScore(), SMOOTH, PruneChannels(0.25)],
    "in other ways, pruned": [*HALF, SMOOTH, FOLLOWED, *HALF],
}


@pytest.mark.parametrize("name", SERIES)
def test_passes_compose(name: str, tmp_path: Any) -> None:
    model, passes = net(), SERIES[name]
    before = state(model)
    edit = netsurgery.plan(model, passes, X)
    small = netsurgery.rewrite(model, edit)
    assert netsurgery.verify(model, small, edit, X) < 1e-12
    assert sum(p.numel() for p in small.parameters()) == edit.after.params == netsurgery.cost(small, X).params
    assert edit.before.params == sum(tensor.numel() for tensor in before.values())
    assert edit.after.macs == netsurgery.cost(small, X).macs
    assert all(torch.equal(tensor, before[key]) for key, tensor in model.state_dict().items())
    again = read(edit.to_json(), netsurgery.trace(model, X))
    assert again.stages == edit.stages and again == edit
    assert torch.equal(netsurgery.rewrite(model, again)(X), small(X))
    assert torch.equal(netsurgery.apply(model, passes, X, verify=True)(X), small(X))
    netsurgery.save(tmp_path, small, edit)
    assert torch.equal(netsurgery.load(tmp_path, net(1), X)(X), small(X))
    assert "asked to" in edit.summary() or all(stage.modules for stage in edit.stages)
    inplace = copy.deepcopy(model)
    assert netsurgery.rewrite(inplace, edit, inplace=True) is inplace
    assert torch.equal(inplace(X), small(X))


def test_scores_stay_with_their_units() -> None:
    model = net()
    model[0].weight.data[3].mul_(0.01)
    edit = netsurgery.plan(model, [MagnitudeScore(), SMOOTH, PruneChannels({"0": 0.125})], X)
    assert edit.keep == {"0": (0, 1, 2, 4, 5, 6, 7)}
    with pytest.raises(InputError, match=r"group '0.1' has no scores, which other groups have"):
        netsurgery.plan(model, [MagnitudeScore(), FOLLOWED, PruneChannels(0.25)], X)


def test_edits_made_by_hand_follow_one_another() -> None:
    model = net()
    first = Edit(netsurgery.trace(model, X), {"0": (0, 2, 5)})
    second = Edit(left(first), {}, modules={"0": Followed()})
    third = Edit(left(second), {"0.1": (1, 2)})
    both = first.then(second).then(third)
    assert [bool(stage.modules) for stage in both.stages] == [False, True, False]
    assert both == first.then(second.then(third)) and both.before == first.before and both.after == third.after
    small = netsurgery.rewrite(model, both)
    assert small[0][1].weight.shape == (2, 3) and netsurgery.verify(model, small, both, X) < 1e-12
    with pytest.raises(InputError, match=r"another network than the one that this edit leads to: '0.weight' has shape"):
        first.then(edit_of(model, **{"0": Followed()}))
    with pytest.raises(InputError, match=r"'0.0.weight' has shape"):
        second.then(Edit(netsurgery.trace(model, X), {"0": (0,)}))
    with pytest.raises(InputError, match=r"pass the text and the network to netsurgery.rewriting.stages.read"):
        Edit.from_json(both.to_json(), first.network)
    alone = edit_of(model, **{"0": Followed()})
    assert Edit.from_json(alone.to_json(), alone.network) == alone


def test_the_text_of_an_edit() -> None:
    assert edit_of(net(), **{"2": Followed(), "1": Smooth(0.3)}).diff() == (
        "1 becomes Smooth(beta=0.3)\n2 becomes Followed(scale=1.0)\n2.weight is 2.0.weight\n2.bias is 2.0.bias\n"
        "2.1.weight 6x6 is new\n2.1.bias 6 is new\nparameters 108 -> 150 (138.9%)\nMACs 276 -> 384 (139.1%)"
    )
    edit = edit_of(net(), **{"1": Smooth(0.3)})
    assert "1 modules rewritten" in repr(edit) and edit.summary() == "rewrote 1 modules" and not edit.exact


def test_what_the_old_module_had_stays() -> None:
    model = net().train()
    model[0].eval()
    model[2].requires_grad_(False)
    seen: list[str] = []
    model[1].register_forward_hook(lambda *_: seen.append("activation"))
    handle = model[1].register_forward_pre_hook(lambda *_: seen.append("before"))
    model[0].register_forward_hook(lambda *_: seen.append("linear"))
    model(X).sum().backward()
    grad = model[0].weight.grad.clone()
    edit = edit_of(model, **{"0": Followed(), "1": Smooth(0.3), "2": Followed(), "4": Followed()})
    for inplace in (False, True):
        seen.clear()
        small = netsurgery.rewrite(model, edit, inplace=inplace)
        small(X)
        assert seen == ["linear", "before", "activation"]
        assert not any(one.training for one in (small[0][0], small[0][1])) and small[2][1].training
        assert small[1].training and small[4].training and small[0][1].weight.dtype == torch.float64
        assert [p.requires_grad for p in small[2].parameters()] == [False] * 4
        assert [p.requires_grad for p in small[4].parameters()] == [True] * 4
        assert torch.equal(small[0][0].weight.grad, grad) and small[0][1].weight.grad is None
        assert (small is model) == inplace
    handle.remove()
    seen.clear()
    model(X)
    assert seen == ["linear", "activation"]


class Twice(nn.Module):
    """One linear layer under two names, and called three times."""

    def __init__(self) -> None:
        super().__init__()
        self.one = self.other = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.other(self.one(self.one(x)).relu())


def test_a_module_with_two_names_is_one() -> None:
    model = Twice().double()
    edit = edit_of(model, other=Followed())
    assert [*edit.modules] == ["one"]
    small = netsurgery.rewrite(model, edit)
    assert small.one is small.other and netsurgery.verify(model, small, edit, X) < 1e-12
    assert torch.allclose(small(X), model(X), atol=1e-14)
    with pytest.raises(InputError, match="'other' and 'one' are one module of Twice: name it once"):
        edit_of(model, one=Followed(), other=Followed())


class Hidden(nn.Module):
    """Calls a layer by a list that is no ModuleList."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)
        self.layers = [self.layer]

    def forward(self, x: Tensor) -> Tensor:
        return self.layers[0](x)


class Looks(nn.Module):
    """Asks a layer for its weight."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x.to(self.layer.weight.dtype))


REFUSED: dict[str, tuple[type[NetsurgeryError], nn.Module, dict[str, Any], str]] = {
    "unknown": (InputError, net(), {"5": Followed()}, r"'5' is no module of Sequential; model.named_modules\(\) lists"),
    "near": (InputError, Looks(), {"layr": Followed()}, "'layr' is no module of Looks; did you mean layer?"),
    "no rewrite": (InputError, net(), {"0": nn.Linear(2, 2)}, "which is no netsurgery.ModuleRewrite"),
    "the model": (InputError, net(), {"": Followed()}, "Sequential itself cannot be replaced, only modules in it"),
    "nested": (
        InputError,
        nn.Sequential(net()),
        {"0": Of(lambda m: m), "0.1": Smooth(0.1)},
        "'0.1' is in '0', which is rewritten, too: carry one out after the other",
    ),
    "reads": (InputError, net(), {"0": Of(lambda *m: m[0], ("9",))}, "'9' is no module of Sequential"),
    "fails": (
        RewriteError,
        net(),
        {"1": Followed()},
        r"Followed\(scale=1.0\) cannot rebuild '1', a ReLU: 'ReLU' object",
    ),
    "no module": (RewriteError, net(), {"1": Of(lambda m: 3)}, "build gave a int for '1', not a torch.nn.Module"),
    "shape": (
        RewriteError,
        net(),
        {"0": Of(lambda m: nn.Linear(4, 7))},
        "Sequential does not run once 0 is another module: .*7",
    ),
    "asked for its weight": (RewriteError, Looks(), {"layer": Followed()}, "does not run once layer is another module"),
    "hidden": (RewriteError, Hidden(), {"layer": Followed()}, "goes on running the old module of 'layer'"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_rewritten_is_refused(name: str) -> None:
    kind, model, modules, said = REFUSED[name]
    model = model.double()
    before, network = state(model), netsurgery.trace(model, X)
    with pytest.raises(kind, match=said):
        Edit(network, {}, modules=modules)
    assert all(torch.equal(tensor, before[key]) for key, tensor in model.state_dict().items())


def test_one_stage_does_one_thing() -> None:
    with pytest.raises(InputError, match="an edit rewrites modules, or changes units and blocks: make two edits"):
        Edit(netsurgery.trace(net(), X), {"0": (0,)}, modules={"0": Followed()})
    with pytest.raises(
        PassError, match="changes the units that an edit keeps, but the edit before it rewrites modules"
    ):
        netsurgery.plan(net(), [FOLLOWED, Compensate("bias", X)], X)
    with pytest.raises(InputError, match="Planting: the edit rewrites modules: carry it out"):
        Planting(net(), X, edit=netsurgery.plan(net(), [FOLLOWED, PlantChannels(2)], X))
    with pytest.raises(InputError, match=r"PruneChannels\(of=...\): the edit rewrites modules"):
        netsurgery.plan(net(), [MagnitudeScore(), PruneChannels(0.5, of=edit_of(net(), **{"0": Followed()}))], X)


def test_a_build_that_writes_to_its_module_leaves_the_model() -> None:
    def doubled(module: nn.Linear) -> nn.Module:
        module.weight.data.mul_(2)
        return module

    model = net()
    before = state(model)
    edit = edit_of(model, **{"0": Of(doubled)})
    assert all(torch.equal(tensor, before[key]) for key, tensor in model.state_dict().items())
    small = netsurgery.rewrite(model, edit)
    assert torch.equal(small[0].weight, 2 * model[0].weight)


def test_outputs_that_change_are_found() -> None:
    model = net()
    edit = edit_of(model, **{"0": Followed(1.001)})
    found = netsurgery.verify(model, netsurgery.rewrite(model, edit), edit, X)
    assert 1e-5 < found < 1e-2
    wrong = Rewrite(nn.Linear, Followed(1.001))
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    held = list(optimizer.param_groups[0]["params"])
    with pytest.raises(
        RewriteError, match=r"outputs differ by .* at most 1e-08 is allowed. A rewrite of modules that is"
    ):
        netsurgery.apply(model, [wrong], X, optimizer=optimizer, verify=True)
    with pytest.raises(RewriteError, match="outputs differ by"):
        netsurgery.apply(model, [*HALF, wrong, *HALF], X, inplace=True, verify=1e-6)
    assert [*map(id, optimizer.param_groups[0]["params"])] == [*map(id, held)] and model[0].weight.shape == (8, 4)
    netsurgery.apply(model, [wrong], X, verify=0.1)
    lossy = edit_of(model, **{"1": Smooth(0.3)})
    small = netsurgery.rewrite(model, lossy)
    assert not torch.allclose(small(X), model(X)) and netsurgery.verify(model, small, lossy, X) == 0
    assert netsurgery.verify(model, model, lossy, X) > 1e-3  # it is not what the rewrite makes


def test_json_says_what_it_cannot_keep() -> None:
    model = net()
    with pytest.raises(
        InputError, match=r"put @register_rewrite \(of netsurgery.module_rewrites\) before the class Unr"
    ):
        edit_of(model, **{"1": Unregistered()}).to_json()
    with pytest.raises(InputError, match="its field 'function' is a function, neither a number, a text nor a list"):
        edit_of(model, **{"1": Of(lambda m: m)}).to_json()
    text, network = edit_of(model, **{"1": Smooth(0.3)}).to_json(), netsurgery.trace(model, X)
    with pytest.raises(InputError, match=r"by 'Smoothe', which is not registered here; did you mean Smooth\?: import"):
        Edit.from_json(text.replace("Smooth", "Smoothe"), network)
    with pytest.raises(InputError, match=r"the edit is of another version of 'Smooth': .*'bet'"):
        Edit.from_json(text.replace("beta", "bet"), network)
    with pytest.raises(InputError, match="the text is no edit"):
        Edit.from_json(text.replace('"kind"', '"king"'), network)
    with pytest.raises(InputError, match="another 'Smooth': choose another name"):
        register_rewrite(dataclass(frozen=True)(type("Smooth", (ModuleRewrite,), {"__module__": "elsewhere"})))
    with pytest.raises(InputError, match="takes a frozen dataclass that derives ModuleRewrite"):
        register_rewrite(nn.ReLU)  # type: ignore[type-var]


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int = 3) -> None:
    for _ in range(steps):
        optimizer.zero_grad()
        model(X).square().sum().backward()
        optimizer.step()


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("kind", ["SGD", "AdamW", "Adagrad", "Rprop", "RMSprop"])
def test_optimizers_follow(kind: str, inplace: bool) -> None:
    model = net()
    weights, biases = ([p for n, p in model.named_parameters() if n.endswith(end)] for end in ("weight", "bias"))
    settings = {"momentum": 0.9} if kind == "SGD" else {}
    groups = [{"params": weights, "lr": 0.01}, {"params": biases, "lr": 0.02}]
    optimizer = getattr(torch.optim, kind)(groups, lr=0.1, **settings)
    train(model, optimizer)
    held = {name: optimizer.state[p] for name, p in model.named_parameters()}
    edit = edit_of(model, **{"0": Followed(), "2": Of(lambda m: nn.Linear(8, 6))})
    small = netsurgery.rewrite(model, edit, inplace=inplace, optimizer=optimizer)
    named = dict(small.named_parameters())
    for group, end in zip(optimizer.param_groups, ("weight", "bias"), strict=True):
        assert [*map(id, group["params"])] == [id(p) for n, p in named.items() if n.endswith(end)]
    assert (
        optimizer.state[named["0.0.weight"]] is held["0.weight"] and optimizer.state[named["4.bias"]] is held["4.bias"]
    )
    assert (named["2.weight"] in optimizer.state) == (kind == "Adagrad") == (named["0.1.bias"] in optimizer.state)
    assert len(optimizer.state) == (8 if kind == "Adagrad" else 4)
    before = state(small)
    train(small, optimizer)
    assert all(not torch.equal(tensor, before[key]) for key, tensor in small.state_dict().items())


def test_optimizers_with_names_and_frozen_parts() -> None:
    model = net()
    model[0].requires_grad_(False)
    optimizer = torch.optim.AdamW([(n, p) for n, p in model.named_parameters() if p.requires_grad], 0.1)
    small = netsurgery.rewrite(model, edit_of(model, **{"0": Followed(), "2": Followed()}), optimizer=optimizer)
    names = optimizer.param_groups[0]["param_names"]
    assert names == ["2.0.weight", "2.0.bias", "2.1.weight", "2.1.bias", "4.weight", "4.bias"]
    named = dict(small.named_parameters())
    assert [*map(id, optimizer.param_groups[0]["params"])] == [id(named[name]) for name in names]


def test_parameters_that_come_from_none_need_one_group() -> None:
    model = net()
    slopes = edit_of(model, **{"1": Of(lambda m: nn.PReLU(init=0.0))})
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    small = netsurgery.rewrite(model, slopes, optimizer=optimizer)
    assert optimizer.param_groups[0]["params"][2] is small[1].weight
    two = torch.optim.SGD([{"params": model[0].parameters()}, {"params": model[2].parameters()}], 0.1)
    before = [*map(id, two.param_groups[0]["params"])]
    with pytest.raises(
        RewriteError, match="the new parameters of '1' come from a module that has none, and it is not cl"
    ):
        netsurgery.rewrite(model, slopes, optimizer=two, inplace=True)
    assert isinstance(model[1], nn.ReLU) and [*map(id, two.param_groups[0]["params"])] == before


def test_averages_follow() -> None:
    model = net()
    average = torch.optim.swa_utils.AveragedModel(model)
    average.module[0].weight.data.mul_(0.9)
    wanted = average(X)
    small = netsurgery.apply(model, [FOLLOWED, *HALF], X, ema=average)
    assert list(average.module.state_dict()) == list(small.state_dict())
    average = torch.optim.swa_utils.AveragedModel(model)
    average.module[0].weight.data.mul_(0.9)
    small = netsurgery.apply(model, [FOLLOWED], X, ema=average)
    assert torch.allclose(average(X), wanted, rtol=1e-12)
    average.update_parameters(small)

    @dataclass(frozen=True)
    class Drawn(Followed):
        averages = False

    with pytest.raises(RewriteError, match=r"an average cannot go on after .*Drawn\(scale=1.0\).*: what that makes of"):
        netsurgery.apply(model, [Rewrite(nn.Linear, Drawn())], X, ema=torch.optim.swa_utils.AveragedModel(model))


def test_all_stages_or_none() -> None:
    """The first stages can be carried out, the last one not: the weights are others then."""
    model = net()
    data = torch.randn(64, 4, dtype=torch.float64)
    edit = netsurgery.plan(
        model, [*HALF, FOLLOWED, MagnitudeScore(), PruneChannels({"2": 0.5}), Compensate("bias", data)], X
    )
    assert edit.values and len(edit.stages) == 3
    other = net(1)
    optimizer, average = (
        torch.optim.SGD(other.parameters(), 0.1, momentum=0.9),
        torch.optim.swa_utils.AveragedModel(other),
    )
    train(other, optimizer)
    before, grads = state(other), [p.grad.clone() for p in other.parameters()]
    held = {id(p): optimizer.state[p]["momentum_buffer"] for p in other.parameters()}
    for inplace in (True, False):
        with pytest.raises(RewriteError, match="has new values, which are for a model with other weights"):
            netsurgery.rewrite(other, edit, inplace=inplace, optimizer=optimizer, ema=average)
        assert (
            list(other.state_dict()) == list(before) == list(average.module.state_dict()) and other[0].in_features == 4
        )
        assert all(torch.equal(tensor, before[key]) for key, tensor in other.state_dict().items())
        assert all(torch.equal(p.grad, g) for p, g in zip(other.parameters(), grads, strict=True))
        assert [*map(id, optimizer.param_groups[0]["params"])] == [id(p) for p in other.parameters()]
        assert all(optimizer.state[p]["momentum_buffer"] is held[id(p)] for p in other.parameters())
    train(other, optimizer)
    average.update_parameters(other)


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.layer(x).relu()


@pytest.mark.parametrize("first", ["blocks", "modules"])
def test_blocks_and_modules(first: str) -> None:
    model = nn.Sequential(*(Residual() for _ in range(4)), nn.Linear(4, 2)).double()
    passes = [RemoveBlocks(blocks=["1"]), Rewrite(nn.Linear, Followed())]
    edit = netsurgery.plan(model, passes if first == "blocks" else passes[::-1], X)
    small = netsurgery.rewrite(model, edit)
    assert netsurgery.verify(model, small, edit, X) < 1e-12
    wanted = model[4](model[3](model[2](model[0](X))))
    assert torch.allclose(small(X), wanted, rtol=1e-12)
    assert torch.equal(netsurgery.rewrite(model, read(edit.to_json(), netsurgery.trace(model, X)))(X), small(X))
    short = Edit(netsurgery.trace(model, X), {}, dropped=("1",))
    closed = left(short, close=True)
    assert len(closed.model) == 4
    both = short.then(Edit(closed, {}, modules={"3": Followed()}))
    again = read(both.to_json(), short.network)
    for one in (both, again):
        assert torch.allclose(netsurgery.rewrite(model, one)(X), wanted, rtol=1e-12)


class Counted(nn.Module):
    """Blocks that know their places, or a configuration that knows how many there are."""

    def __init__(self, what: str) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Residual() for _ in range(3))
        self.first, self.head = nn.Linear(4, 4), nn.Linear(4, 2)
        if what == "config":
            self.config = types.SimpleNamespace(num_hidden_layers=3)
        for index, layer in enumerate(self.layers):
            if what == "index":
                layer.layer_idx = index
            if what == "index of a part":
                layer.layer.layer_idx = index

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        for layer in self.layers:
            x = layer(x)
        return self.head(x)


@pytest.mark.parametrize("what", ["config", "index", "index of a part", "neither"])
@pytest.mark.parametrize("between", [(), HALF])
def test_blocks_that_are_counted_go_after_modules_are_rewritten(
    what: str, between: tuple[netsurgery.Pass, ...]
) -> None:
    model = Counted(what).double()
    blocks, modules = RemoveBlocks(blocks=["layers.1"]), Rewrite(nn.Linear, Followed())
    if what == "neither":
        netsurgery.apply(model, [blocks, *between, modules], X)
    else:
        why = (
            "the config says how many layers 'layers' has" if what == "config" else "layers of 'layers' know their pla"
        )
        with pytest.raises(PassError, match=f"after layers.1 of this model goes in the same plan, since {why}"):
            netsurgery.plan(model, [blocks, *between, modules], X)
    last = netsurgery.apply(model, [modules, *between, blocks], X)
    assert len(last.layers) == 2 and (what != "config" or last.config.num_hidden_layers == 2)
    assert what != "index" or [layer.layer_idx for layer in last.layers] == [0, 1]
    two = netsurgery.apply(netsurgery.apply(model, [blocks], X), [modules], X)
    assert torch.allclose(two(X), model.head(model.layers[2](model.layers[0](model.first(X)))), rtol=1e-12)


def test_patterns_name_modules_before_and_after() -> None:
    model = net()
    for which in ("2", model[2], "2.1"):
        cut = netsurgery.apply(model, [FOLLOWED, MagnitudeScore(), PruneChannels(0.5, include=[which])], X)
        assert cut[2][1].out_features == 3 and cut[0][1].out_features == 8
    assert netsurgery.apply(model, [FOLLOWED, MagnitudeScore(), PruneChannels({"0.0": 0.5})], X)[0][1].in_features == 4

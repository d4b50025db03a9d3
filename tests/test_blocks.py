"""Residual blocks: which are found, that a network without them is the recorded one without them, and their scores."""

from __future__ import annotations

import copy
import importlib
import itertools
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import netsurgery
from netsurgery import Edit
from netsurgery.errors import InputError, NetsurgeryError, PassError
from netsurgery.passes import BlockInfluenceScore, Compensate, MagnitudeScore, PruneChannels, RemoveBlocks, Skipped
from oracles import parameters, snapshot

IDS = torch.randint(1, 64, (2, 8), generator=torch.Generator().manual_seed(0))
SIZES = {"hidden_size": 16, "intermediate_size": 12, "num_attention_heads": 4, "vocab_size": 64}
TOKENS = {"input_ids": IDS}


def transformer(kind: str, model: str, **options: Any) -> nn.Module:
    sys.modules.setdefault("kernels", None)  # type: ignore[arg-type]  # as in test_survival
    pytest.importorskip("transformers")
    hf: Any = importlib.import_module("transformers")
    torch.manual_seed(0)
    return getattr(hf, model)(getattr(hf, f"{kind}Config")(**options)).double().eval()


def llama(layers: int = 4) -> Any:
    return transformer("Llama", "LlamaForCausalLM", **SIZES, num_key_value_heads=2, num_hidden_layers=layers)


def bert() -> nn.Module:
    options = {"num_hidden_layers": 3, "max_position_embeddings": 32, "num_labels": 3}
    return transformer("Bert", "BertForSequenceClassification", **SIZES, **options)


def resnet() -> nn.Module:
    models = pytest.importorskip("torchvision").models
    torch.manual_seed(0)
    return models.resnet18(num_classes=10).double().eval()  # type: ignore[no-any-return]


def vit() -> nn.Module:
    timm = pytest.importorskip("timm")
    torch.manual_seed(0)
    return timm.create_model("vit_tiny_patch16_224", depth=4, img_size=32).double().eval()  # type: ignore[no-any-return]


class Mix(nn.Module):
    """One half of a mixer: over tokens, or over channels."""

    def __init__(self, width: int, inner: int, tokens: bool):
        super().__init__()
        self.norm = nn.LayerNorm(8)
        kind: Any = (lambda a, b: nn.Conv1d(a, b, 1)) if tokens else nn.Linear
        self.mix = nn.Sequential(kind(width, inner), nn.GELU(), kind(inner, width))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.mix(self.norm(x))


def mixer() -> nn.Module:
    """Blocks of two residual halves that are not alike, in a Sequential."""
    torch.manual_seed(0)
    blocks = [nn.Sequential(Mix(6, 5, True), Mix(8, 7, False)) for _ in range(3)]
    return nn.Sequential(nn.Linear(4, 8), *blocks, nn.LayerNorm(8), nn.Linear(8, 2)).double().eval()


class Residual(nn.Module):
    def __init__(self, width: int = 6, inner: int = 5):
        super().__init__()
        self.up, self.down = nn.Linear(width, inner), nn.Linear(inner, width)

    def branch(self, x: Tensor) -> Tensor:
        return self.down(F.relu(self.up(x)))  # type: ignore[no-any-return]

    def forward(self, x: Tensor) -> Any:
        return x + self.branch(x)


class Net(nn.Module):
    """Blocks in a list between two layers; derived classes run them in their own ways."""

    def __init__(self, kind: Callable[[], nn.Module] = Residual, count: int = 4):
        super().__init__()
        torch.manual_seed(0)
        self.stem, self.layers, self.head = (
            nn.Linear(4, 6),
            nn.ModuleList(kind() for _ in range(count)),
            nn.Linear(6, 2),
        )
        self.double().eval()

    def forward(self, x: Tensor) -> Any:
        x = self.stem(x)
        for layer in self.layers:
            x = layer(x)
        return self.head(x)


X = torch.randn(3, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
IMAGE = torch.randn(2, 3, 32, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
MIXED = torch.randn(2, 6, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(3))

FOUND: dict[str, tuple[Callable[[], nn.Module], Any, list[str]]] = {
    "resnet18": (resnet, IMAGE, ["layer1.0", "layer1.1", "layer2.1", "layer3.1", "layer4.1"]),
    "vit": (vit, IMAGE, [f"blocks.{i}" for i in range(4)]),
    "llama": (llama, TOKENS, [f"model.layers.{i}" for i in range(4)]),
    "bert": (bert, TOKENS, [f"bert.encoder.layer.{i}" for i in range(3)]),
    "mixer": (mixer, MIXED, ["1", "2", "3"]),
    "list": (Net, X, [f"layers.{i}" for i in range(4)]),
}


def blocks_of(model: nn.Module, inputs: Any) -> list[str]:
    return [block.path for block in netsurgery.trace(model, inputs).blocks]


def shorter(model: nn.Module, inputs: Any, *paths: str, **options: Any) -> Any:
    """A model without some blocks, held to all that must be true of it."""
    before = snapshot(model)
    edit = Edit(netsurgery.trace(model, inputs), {}, dropped=paths)
    small = netsurgery.rewrite(model, edit, **options)
    if not options.get("inplace"):
        assert netsurgery.verify(model, small, edit, inputs) < 1e-12
        assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert parameters(small) == edit.after.params
    assert netsurgery.cost(small, inputs).macs == edit.after.macs
    assert Edit.from_json(edit.to_json(), edit.network) == edit
    return small


@pytest.mark.parametrize("name", FOUND)
def test_the_blocks_that_are_found(name: str) -> None:
    build, inputs, paths = FOUND[name]
    assert blocks_of(build(), inputs) == paths


@pytest.mark.parametrize("name", FOUND)
def test_a_network_without_blocks_is_the_recorded_one_without_them(name: str) -> None:
    build, inputs, paths = FOUND[name]
    model = build()
    for some in ([paths[0]], [paths[-1]], paths[1:3], paths):
        small = shorter(model, inputs, *some)
        assert not any(isinstance(module, Skipped) for module in small.modules())
        assert type(small) is type(model)


def test_verify_sees_another_block_gone() -> None:
    model = Net()
    network = netsurgery.trace(model, X)
    small = netsurgery.rewrite(model, Edit(network, {}, dropped=("layers.1",)))
    assert netsurgery.verify(model, small, Edit(network, {}, dropped=("layers.2",)), X) > 1e-3
    assert netsurgery.verify(model, model, Edit(network, {}, dropped=("layers.2",)), X) > 1e-3


def test_keys_of_what_stays_are_renumbered() -> None:
    model = Net()
    small = shorter(model, X, "layers.0", "layers.2")
    expected = {"layers.1": "layers.0", "layers.3": "layers.1"}
    for old, new in expected.items():
        for key, value in model.get_submodule(old).state_dict().items():
            assert torch.equal(small.state_dict()[f"{new}.{key}"], value)
    assert [name for name, _ in small.named_children()] == ["stem", "layers", "head"]
    assert list(small.layers._modules) == ["0", "1"]


def test_a_sequential_with_names_keeps_them() -> None:
    torch.manual_seed(0)
    model = nn.Sequential()
    for name, module in (("stem", nn.Linear(4, 6)), ("a", Residual()), ("b", Residual()), ("head", nn.Linear(6, 2))):
        model.add_module(name, module)
    small = shorter(model.double(), X, "a")
    assert [name for name, _ in small.named_children()] == ["stem", "b", "head"]


# Where a list cannot close the gap


class ByNumber(Net):
    def forward(self, x: Tensor) -> Any:
        x = self.layers[1](self.layers[0](self.stem(x)))
        return self.head(self.layers[3](self.layers[2](x)))


class Scaled(Net):
    def forward(self, x: Tensor) -> Any:
        x = self.stem(x)
        for index, layer in enumerate(self.layers):
            x = layer(x) * (1 + index)
        return self.head(x)


class Backwards(Net):
    """Takes the blocks in an order that another number of them changes."""

    def forward(self, x: Tensor) -> Any:
        x = self.stem(x)
        for index in range(4):
            x = self.layers[index * 3 % len(self.layers)](x)
        return self.head(x)


class Told(Residual):
    def forward(self, x: Tensor, index: int = 0) -> Any:
        return x + (1 + index) * self.branch(x)


class Telling(Net):
    """Tells each block which it is: the same operations would run with other numbers."""

    def __init__(self) -> None:
        super().__init__(Told)

    def forward(self, x: Tensor) -> Any:
        x = self.stem(x)
        for index, layer in enumerate(self.layers):
            x = layer(x, index)
        return self.head(x)


class Attributes(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.stem, self.first, self.second, self.head = nn.Linear(4, 6), Residual(), Residual(), nn.Linear(6, 2)
        self.first.kind = "narrow"
        self.double()

    def forward(self, x: Tensor) -> Any:
        x = self.first(self.stem(x))
        return self.head(self.second(x) if self.first.kind == "narrow" else x)


@pytest.mark.parametrize("kind", [ByNumber, Scaled, Backwards, Telling])
def test_a_block_is_skipped_where_code_counts(kind: Any) -> None:
    small = shorter(kind(), X, "layers.1", "layers.2")
    assert [type(layer) for layer in small.layers] == [type(small.layers[0]), Skipped, Skipped, type(small.layers[3])]
    assert not isinstance(small.layers[0], Skipped) and not isinstance(small.layers[3], Skipped)


def test_a_block_that_is_an_attribute_is_skipped_and_keeps_what_code_reads_of_it() -> None:
    small = shorter(Attributes(), X, "first")
    assert isinstance(small.first, Skipped) and small.first.kind == "narrow"
    again = copy.deepcopy(small)
    assert torch.equal(again(X), small(X))
    assert [name for name, _ in small.named_children()] == ["stem", "first", "second", "head"]


class Tupled(Residual):
    def forward(self, x: Tensor, mask: Any = None) -> Any:
        return {"mask": mask, "out": (x + self.branch(x), None, 3)}


class Unpacked(Net):
    def __init__(self) -> None:
        super().__init__(Tupled)

    def forward(self, x: Tensor) -> Any:
        x, mask = self.stem(x), x > 0
        for index in range(4):
            found = self.layers[index](x, mask=mask)
            x, none, three = found["out"]
            assert none is None and three == 3
            x = torch.where(found["mask"].any(), x, -x)
        return self.head(x)


def test_a_skipped_block_returns_what_the_block_did() -> None:
    small = shorter(Unpacked(), X, "layers.0", "layers.3")
    assert [type(layer) for layer in small.layers] == [Skipped, Tupled, Tupled, Skipped]


# What is no block


class Escapes(Net):
    """The second block hands an intermediate result to the head."""

    def forward(self, x: Tensor) -> Any:
        x = self.stem(x)
        seen = None
        for index, layer in enumerate(self.layers):
            x = layer(x)
            seen = layer.inner if index == 1 else seen
        return self.head(x + seen)


class Leaking(Residual):
    inner: Tensor

    def forward(self, x: Tensor) -> Any:
        self.inner = self.branch(x)
        return x + self.inner


class ReadBefore(Net):
    """Blocks write into the stream, and the head reads what came in, which the first has written to."""

    def forward(self, x: Tensor) -> Any:
        x = self.stem(x)
        view = x.view(-1, 6)
        for layer in self.layers:
            x = layer(x)
        return self.head(x * view.sum())


class InPlace(Residual):
    def forward(self, x: Tensor) -> Any:
        x += self.branch(x)
        return x


class Shared(Net):
    def forward(self, x: Tensor) -> Any:
        x = self.stem(x)
        for layer in (*self.layers, self.layers[1]):
            x = layer(x)
        return self.head(x)


class Other(Residual):
    """Forms of a sum, or what looks like one."""

    def __init__(self, form: str) -> None:
        super().__init__()
        self.form, self.table = form, nn.Parameter(torch.randn(6))

    def forward(self, x: Tensor) -> Any:
        found = {
            "activated": lambda: F.relu(x + self.branch(x)),
            "normed": lambda: F.layer_norm(self.branch(x) + 2 * x, [6], self.table),
            "twice": lambda: torch.tanh(x) + (x + self.branch(x)) + self.table,
            "no branch": lambda: x + self.table,
            "transposed": lambda: (x.T + self.branch(x).T).T,
            "product": lambda: x * torch.sigmoid(self.branch(x)),
            "no stream": lambda: self.branch(x) + self.branch(-x),
            "another type": lambda: (x + self.branch(x)).float(),
            "turned": lambda: (x + self.branch(x)).flip(0),
        }
        return found[self.form]()


@pytest.mark.parametrize(
    ("form", "block"),
    [
        *(
            ("activated", True),
            ("normed", True),
            ("twice", True),
            ("transposed", True),
            ("no branch", False),
            ("product", False),
        ),
        *(("no stream", False), ("another type", False), ("turned", False)),
    ],
)
def test_what_is_a_sum(form: str, block: bool) -> None:
    model = nn.Sequential(nn.Linear(4, 6), Other(form), nn.ReLU()).double()
    assert blocks_of(model, X) == (["1"] if block else [])
    if block:
        shorter(model, X, "1")


class Merge(Residual):
    def forward(self, x: Tensor, other: Tensor) -> Any:
        return x + self.branch(other)


class Merged(Net):
    """Adds what comes from elsewhere: the module is the only way for it."""

    def forward(self, x: Tensor) -> Any:
        stem = self.stem(x)
        x = torch.sin(stem)
        for layer in self.layers:
            x = layer(x, stem)
        return self.head(x)


def test_a_sum_with_something_from_elsewhere_is_no_block() -> None:
    assert blocks_of(Merged(Merge), X) == []


def test_a_block_with_an_intermediate_result_that_is_read_elsewhere_is_none() -> None:
    assert blocks_of(Escapes(Leaking), X) == ["layers.0", "layers.2", "layers.3"]


def test_a_block_that_writes_where_others_read_is_none() -> None:
    assert blocks_of(ReadBefore(InPlace), X) == []
    assert blocks_of(Net(InPlace), X) == [f"layers.{i}" for i in range(4)]
    shorter(Net(InPlace), X, "layers.0", "layers.2")


class Around(nn.Module):
    """Reads the input of a block after its output was written to, or the other way round."""

    def __init__(self, writes: str) -> None:
        super().__init__()
        self.stem, self.block, self.writes = nn.Linear(4, 6), Residual(), writes
        self.double()

    def forward(self, x: Tensor) -> Any:
        x = self.stem(x)
        y = self.block(x)
        if self.writes:
            (x if self.writes == "input" else y.view(-1)).mul_(2)
        return x - y


@pytest.mark.parametrize(("writes", "found"), [("", ["block"]), ("input", []), ("output", [])])
def test_input_and_output_become_one_tensor(writes: str, found: list[str]) -> None:
    assert blocks_of(Around(writes), X) == found


def test_shared_blocks_are_none() -> None:
    assert blocks_of(Shared(), X) == ["layers.0", "layers.2", "layers.3"]
    model = Net()
    model.layers[2].down.weight = model.layers[1].down.weight
    assert blocks_of(model, X) == ["layers.0", "layers.3"]
    albert = transformer("Albert", "AlbertModel", **SIZES, num_hidden_layers=4, embedding_size=16)
    assert blocks_of(albert, TOKENS) == []


def test_a_layer_that_differs_is_not_taken_apart() -> None:
    """The first block of T5 computes the position bias of all, and so no part of it is a block either."""
    options = {"d_model": 16, "d_kv": 4, "num_heads": 4, "d_ff": 12, "num_layers": 3, "vocab_size": 64}
    model = transformer("T5", "T5ForConditionalGeneration", **options)
    inputs = {**TOKENS, "decoder_input_ids": IDS}
    assert blocks_of(model, inputs) == [f"{side}.block.{i}" for side in ("encoder", "decoder") for i in (1, 2)]
    shorter(model, inputs, "encoder.block.1", "decoder.block.2")


def test_the_outermost_blocks_that_repeat() -> None:
    stages = nn.Sequential(*(nn.Sequential(Residual(), Residual()) for _ in range(2)))
    model = nn.Sequential(nn.Linear(4, 6), stages, nn.Linear(6, 2)).double()
    assert blocks_of(model, X) == ["1.0.0", "1.0.1", "1.1.0", "1.1.1"]
    shorter(model, X, "1.0.0", "1.1.0", "1.1.1")
    alone = nn.Sequential(nn.Linear(4, 6), nn.Sequential(Residual()), nn.Sequential(Residual())).double()
    assert blocks_of(alone, X) == ["1.0", "2.0"]
    assert blocks_of(Net(count=1), X) == ["layers.0"]


# Language models


def generated(model: Any, **options: Any) -> Tensor:
    found: Tensor = model.generate(
        IDS, max_new_tokens=6, do_sample=False, attention_mask=IDS > 0, pad_token_id=0, **options
    )
    return found


@pytest.mark.parametrize("inplace", [False, True])
def test_a_shorter_llama_generates_with_its_cache_and_is_saved(inplace: bool, tmp_path: Any) -> None:
    model = llama()
    config, other = model.config, llama()
    small = shorter(model, TOKENS, "model.layers.0", "model.layers.2", inplace=inplace)
    assert [layer.self_attn.layer_idx for layer in small.model.layers] == [0, 1]
    assert small.config.num_hidden_layers == small.model.config.num_hidden_layers == 2
    assert config.num_hidden_layers == 4 and other.config.num_hidden_layers == 4
    assert torch.equal(generated(small), generated(small, use_cache=False))
    small.save_pretrained(tmp_path)
    again = type(other).from_pretrained(tmp_path, dtype=torch.float64).eval()
    assert torch.equal(again(IDS).logits, small(IDS).logits)


def test_caches_of_windows_and_lists_by_layer_follow() -> None:
    options = {**SIZES, "num_key_value_heads": 2, "num_hidden_layers": 4, "head_dim": 4}
    small = shorter(transformer("Gemma2", "Gemma2ForCausalLM", **options), TOKENS, "model.layers.0", "model.layers.3")
    assert small.config.layer_types == ["full_attention", "sliding_attention"]
    assert torch.equal(generated(small), generated(small, use_cache=False))


def test_a_decoder_does_not_decide_how_deep_the_encoder_is() -> None:
    options = {f"{side}_{what}": n for side in ("encoder", "decoder") for what, n in (("layers", 3), ("ffn_dim", 12))}
    heads = {"encoder_attention_heads": 4, "decoder_attention_heads": 4, "max_position_embeddings": 32}
    model = transformer("Bart", "BartForConditionalGeneration", d_model=16, vocab_size=64, **options, **heads)
    small = shorter(model, {**TOKENS, "decoder_input_ids": IDS}, "model.decoder.layers.1")
    assert (small.config.encoder_layers, len(small.model.encoder.layers), len(small.model.decoder.layers)) == (3, 3, 2)


def test_experts_are_chosen_by_values() -> None:
    options = {**SIZES, "num_key_value_heads": 2, "num_hidden_layers": 3}
    model = transformer("Mixtral", "MixtralForCausalLM", **options).float()
    edit = Edit(netsurgery.trace(model, TOKENS), {}, dropped=("model.layers.1",))
    small = netsurgery.rewrite(model, edit)
    assert netsurgery.verify(model, small, edit, TOKENS) < 1e-5
    assert len(small.model.layers) == 2


# The edit as a value


def test_the_diff_and_the_line() -> None:
    model = Net()
    edit = Edit(netsurgery.trace(model, X), {"layers.0.up": (0, 1)}, dropped=("layers.2", "layers.1"))
    assert edit.dropped == ("layers.1", "layers.2")
    assert edit.diff() == "\n".join(
        [
            "layers.0.up.weight 5x6 -> 2x6",
            "layers.0.up.bias 5 -> 2",
            "layers.0.down.weight 6x5 -> 6x2",
            "layers.1 removed",
            "layers.2 removed",
            "parameters 328 -> 147 (44.8%)",
            "MACs 828 -> 360 (43.5%)",
        ]
    )
    assert repr(edit) == (
        "Edit(Net: 1 of 7 groups cut, 2 of 4 blocks removed, parameters 328 -> 147 (44.8%), MACs 828 -> 360 (43.5%))"
    )
    assert edit.summary() == "removed 3 units of 1 groups; removed 2 of 4 blocks"
    small = netsurgery.rewrite(model, edit)
    assert netsurgery.verify(model, small, edit, X) < 1e-12
    assert edit != Edit(edit.network, edit.keep)


@pytest.mark.parametrize("name", ["list", "vit", "llama"])
@pytest.mark.parametrize("cut_first", [False, True])
def test_blocks_and_channels_in_one_pipeline(name: str, cut_first: bool) -> None:
    build, inputs, paths = FOUND[name]
    model = build()
    passes = [
        [RemoveBlocks(blocks=[paths[1]])],
        [MagnitudeScore(), PruneChannels(0.5)],
        [RemoveBlocks(blocks=[paths[2]])],
    ]
    order = [passes[i] for i in ((1, 0, 2) if cut_first else (0, 1, 2))]
    edit = netsurgery.plan(model, list(itertools.chain(*order)), inputs)
    small = netsurgery.rewrite(model, edit)
    assert edit.dropped == tuple(paths[1:3])
    assert not {path for path in edit.replaced if path.startswith(edit.dropped)}
    assert netsurgery.verify(model, small, edit, inputs) < 1e-12
    assert parameters(small) == edit.after.params < parameters(model) / 2
    assert blocks_of(small, inputs) == [paths[0], *(paths[1:] if len(paths) == 3 else paths[1:2])]


def test_then_finds_what_was_renumbered() -> None:
    """Whether the later edit was made for the shorter list, or for one where the block is skipped."""
    model = Net()
    first = Edit(netsurgery.trace(model, X), {}, dropped=("layers.0",))
    small = netsurgery.rewrite(model, first)
    later = Edit(netsurgery.trace(small, X), {"layers.1.up": (0, 3)}, dropped=("layers.0",))
    both = first.then(later)
    assert (both.dropped, both.keep) == (("layers.0", "layers.1"), {"layers.2.up": (0, 3)})
    done = netsurgery.rewrite(model, both)
    assert torch.equal(done(X), netsurgery.rewrite(small, later)(X))
    assert list(done.state_dict()) == list(netsurgery.rewrite(small, later).state_dict())
    with pytest.raises(InputError, match=r"'layers' has other tensors than the removal of layers\.0 leaves"):
        first.then(Edit(netsurgery.trace(Net(count=2), X), {"layers.1.up": (0, 3)}))


def test_saved_and_loaded(tmp_path: Any) -> None:
    model = Net()
    edit = Edit(netsurgery.trace(model, X), {"layers.3.up": (1, 2)}, dropped=("layers.1",))
    small = netsurgery.rewrite(model, edit)
    netsurgery.save(tmp_path, small, edit)
    assert torch.equal(netsurgery.load(tmp_path, model)(X), small(X))
    with pytest.raises(InputError, match=r"takes the model that the edit leads to: 'layers\.1\.down\.bias'"):
        netsurgery.save(tmp_path, model, edit)


@pytest.mark.parametrize("inplace", [False, True])
def test_optimizers_and_averages_go_on_without_the_blocks(inplace: bool) -> None:
    model = Net()
    optimizer = torch.optim.AdamW(model.named_parameters(), lr=1e-2)
    average = torch.optim.swa_utils.AveragedModel(model)
    model(X).sum().backward()
    optimizer.step()
    average.update_parameters(model)
    state = {name: optimizer.state[p]["exp_avg"].clone() for name, p in model.named_parameters()}
    edit = Edit(netsurgery.trace(model, X), {"layers.3.up": (1, 2)}, dropped=("layers.1",))
    old = copy.deepcopy(average.module)
    small = netsurgery.rewrite(model, edit, inplace=inplace, optimizer=optimizer, ema=average)
    (group,) = optimizer.param_groups
    assert [id(p) for p in group["params"]] == [id(p) for p in small.parameters()]
    assert group["param_names"] == [name for name, _ in small.named_parameters()]
    assert optimizer.state.keys() == {*small.parameters()}
    moved = optimizer.state[dict(small.named_parameters())["layers.1.up.weight"]]["exp_avg"]
    assert torch.equal(moved, state["layers.2.up.weight"])
    assert netsurgery.verify(old, average.module, edit, X) < 1e-12
    small(X).sum().backward()
    optimizer.step()


def test_a_model_that_does_not_do_without_a_block_stays_as_it_is() -> None:
    class Needs(Net):
        def forward(self, x: Tensor) -> Any:
            return super().forward(x) * self.layers[1].up.weight.sum()

    model = Needs()
    before = snapshot(model)
    edit = Edit(netsurgery.trace(model, X), {}, dropped=("layers.1",))
    with pytest.raises(
        NetsurgeryError, match=r"the code of Needs does not work without layers\.1: .*'Skipped' object has"
    ):
        netsurgery.rewrite(model, edit, inplace=True)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    with pytest.raises(NetsurgeryError, match=r"does not work without layers\.1"):
        netsurgery.plan(model, [RemoveBlocks(blocks=["layers.1"])], X)


def test_a_forward_that_is_rewritten_for_new_sizes_does_not_run_what_is_gone() -> None:
    class Fixed(Net):
        def forward(self, x: Tensor) -> Any:
            x = self.stem(x)
            for layer in self.layers:
                x = layer(x)
            return self.head(x.view(-1, 3, 2).flip(0).reshape(-1, 6))

    model = Fixed()
    network = netsurgery.trace(model, X)
    stream = next(group for group in network.prunable if any(m.parameter == "stem.weight" for m in group.members))
    edit = Edit(network, {stream.name: (0, 1)}, dropped=("layers.1",))
    with pytest.raises(NetsurgeryError, match=r"rewritten for new sizes and runs 'layers\.1', which goes: remove the"):
        netsurgery.rewrite(model, edit)
    small = netsurgery.rewrite(model, Edit(network, {}, dropped=("layers.1",)))
    later = Edit(netsurgery.trace(small, X), {stream.name: (0, 1)})
    assert netsurgery.verify(small, netsurgery.rewrite(small, later), later, X) < 1e-12


def test_blocks_go_while_units_are_added() -> None:
    model = Net()
    more = (0, 1, 2, 3, 4, netsurgery.Copy(4), netsurgery.New())
    edit = Edit(netsurgery.trace(model, X), {"layers.0.up": more}, dropped=("layers.2",))
    small = netsurgery.rewrite(model, edit)
    assert netsurgery.verify(model, small, edit, X) < 1e-12
    short = netsurgery.rewrite(model, Edit(edit.network, {}, dropped=("layers.2",)))
    torch.testing.assert_close(small(X), short(X), rtol=1e-12, atol=1e-12)


# The passes


class Gated(nn.Module):
    """Adds a multiple of a rotated input: the cosine is known."""

    def __init__(self, tangent: float):
        super().__init__()
        self.turn = nn.Linear(2, 2, bias=False)
        self.turn.weight.data = torch.tensor([[0.0, -tangent], [tangent, 0.0]])

    def forward(self, x: Tensor) -> Tensor:
        return x + self.turn(x)


def test_the_influence_of_a_block_is_one_minus_the_cosine() -> None:
    tangents = [1.0, 0.0, 3.0]
    model = nn.Sequential(nn.Linear(2, 2), *map(Gated, tangents), nn.Linear(2, 1))
    x = torch.randn(20, 5, 2)
    network = BlockInfluenceScore(x, rows=3).run(netsurgery.trace(model, x[:1]))
    expected = {str(i + 1): 1 - (1 + t**2) ** -0.5 for i, t in enumerate(tangents)}
    assert network.block_scores == pytest.approx(expected, abs=1e-6)
    edit = netsurgery.plan(model, [BlockInfluenceScore(x), RemoveBlocks(count=2)], x[:1])
    assert edit.dropped == ("1", "2")
    assert str(edit.outcomes[0]) == "asked to remove 2 of 3 blocks, removed 2 of 3 blocks"
    assert edit.measured is not None and edit.measured.samples == 20


def test_positions_of_pictures_are_pixels_and_blocks_may_write_into_their_input() -> None:
    class Into(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 3, 1)

        def forward(self, x: Tensor) -> Tensor:
            x += self.conv(x)
            return x

    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(2, 3, 1), Into(), nn.Conv2d(3, 1, 1))
    x = torch.randn(6, 2, 4, 5)
    with torch.no_grad():
        stream = model[0](x)
        expected = 1 - F.cosine_similarity(stream, stream + model[1].conv(stream), dim=1).mean()
    network = netsurgery.trace(model, x[:1])
    assert BlockInfluenceScore(x).run(network).block_scores == pytest.approx({"1": float(expected)}, abs=1e-6)
    assert not model[1]._forward_hooks and not model[1]._forward_pre_hooks


def test_a_language_model_by_its_scores() -> None:
    model = llama()
    texts = {"input_ids": torch.randint(1, 64, (12, 8))}
    with torch.no_grad():
        model.model.layers[2].self_attn.o_proj.weight.zero_()
        model.model.layers[2].mlp.down_proj.weight.zero_()
    small = netsurgery.apply(model, [BlockInfluenceScore(texts), RemoveBlocks(ratio=0.25)], TOKENS)
    torch.testing.assert_close(small(IDS).logits, model(IDS).logits)
    assert len(small.model.layers) == 3


def test_a_second_round_sees_what_the_first_left() -> None:
    x = torch.randn(8, 4, dtype=torch.float64)
    rounds = [BlockInfluenceScore(x), RemoveBlocks(count=1), BlockInfluenceScore(x), RemoveBlocks(ratio=0.5)]
    edit = netsurgery.plan(Net(), rounds, x[:1])
    assert len(edit.dropped) == 3
    assert [str(one) for one in edit.outcomes] == [
        "asked to remove 1 of 4 blocks, removed 1 of 4 blocks",
        "asked to remove 50.0% of 3 blocks, removed 2 of 3 blocks",
    ]


PLAIN = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 2)).double()
BAD: dict[str, tuple[Callable[[], Any], type[Exception], str]] = {
    "no score": (lambda: [RemoveBlocks(count=1)], PassError, r"RemoveBlocks\(count=1\), needs block scores.*such as "
                 r"BlockInfluenceScore\(data\)"),
    "unit scores": (lambda: [MagnitudeScore(), RemoveBlocks(ratio=0.5)], PassError, r"needs block scores"),
    "many": (lambda: [BlockInfluenceScore(X), RemoveBlocks(count=5)], InputError,
             r"RemoveBlocks\(count=5\): Net has 4 blocks that can go: layers\.0, "),
    "no match": (lambda: [RemoveBlocks(blocks=["layers.4"])], InputError,
                 r"'layers\.4' matches no residual block of Net that can go: those are layers\.0"),
    "nothing": (lambda: [RemoveBlocks()], InputError, r"one of count, ratio and blocks, got none"),
    "two": (lambda: [RemoveBlocks(1, 0.5)], InputError, r"got count and ratio"),
    "share": (lambda: [RemoveBlocks(ratio=1.0)], InputError, r"ratio=1\.0\): the share of the blocks"),
    "half": (lambda: [RemoveBlocks(count=0.5)], InputError, r"count=0\.5\): a whole number"),  # type: ignore[arg-type]
    "empty": (lambda: [RemoveBlocks(blocks=[])], InputError, r"blocks=\[\]\): paths of blocks, such as"),
    "no data": (lambda: [BlockInfluenceScore(None)], InputError, r"data=None\): needs data"),
    "no samples": (lambda: [BlockInfluenceScore(X, samples=0)], InputError, r"samples=0\): a whole number"),
    "compensation": (lambda: [RemoveBlocks(blocks="layers.1"), Compensate("bias", X)], PassError,
                     r"changes the units that an edit keeps, but the edit before it drops blocks"),
    "not finite": (lambda: [BlockInfluenceScore(X * float("nan")), RemoveBlocks(count=1)], InputError,
                   r"the input or output of 'layers\.0' is not finite"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_bad_input(name: str) -> None:
    build, error, text = BAD[name]
    with pytest.raises(error, match=text):
        netsurgery.plan(Net(), build(), X)


def test_a_network_without_blocks() -> None:
    with pytest.raises(InputError, match=r"Sequential has no residual block that can go: no module that runs once"):
        netsurgery.plan(PLAIN, [RemoveBlocks(blocks=["1"])], X)
    with pytest.raises(InputError, match=r"Sequential has no residual blocks that can go, so there is nothing"):
        netsurgery.plan(PLAIN, [BlockInfluenceScore(X), RemoveBlocks(count=1)], X)
    network = netsurgery.trace(PLAIN, X)
    with pytest.raises(InputError, match=r"'1' is no residual block of Sequential that can go: it has none"):
        Edit(network, {}, dropped=("1",))
    with pytest.raises(InputError, match=r"the text is no edit"):
        Edit.from_json(Edit(network, {}).to_json().replace('"groups"', '"dropped": "1", "groups"'), network)


def test_numbers_follow_what_is_left_where_blocks_go_with_it() -> None:
    model, ids = llama(2), torch.arange(12).view(2, 6)
    passes = [
        RemoveBlocks(blocks=["model.layers.1"]), MagnitudeScore(), PruneChannels(0.5, include=["*.mlp.*"])
    ]  # fmt: skip
    whole = model.config.intermediate_size
    assert netsurgery.apply(model, passes, (ids,)).config.intermediate_size == whole // 2

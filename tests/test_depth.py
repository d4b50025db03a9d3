"""Deep models of layers that are alike: a lock is found once for their class, and each reason names its own layer."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import netsurgery
from netsurgery.adaptation.remedies import Remedies

X = torch.randn(2, 5, 16, generator=torch.Generator().manual_seed(0))


class Vague(nn.Module):
    """Its code takes another way at other sizes, does not say which groups it is about, and cannot be rewritten."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c, self.back = (nn.Linear(*n) for n in ((16, 8), (16, 6), (16, 10), (24, 16)))

    def forward(self, x: Tensor) -> Tensor:
        a, b, c = self.a(x), self.b(x), self.c(x)
        self.last = x.shape
        if b.shape[-1] == 6:
            b = b.relu()
        return x + self.back(torch.cat([a, b, c], -1))


class TwoOfThem(nn.Module):
    """Two vague modules, one in the other."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.outer = Vague(), Vague()

    def forward(self, x: Tensor) -> Tensor:
        return self.outer(self.inner(x))


class Mixed(nn.Module):
    """Layers of two classes by turns, the second of them with more than one vague way."""

    def __init__(self) -> None:
        super().__init__()
        self.d, self.e, self.back = nn.Linear(16, 12), nn.Linear(16, 12), nn.Linear(24, 16)

    def forward(self, x: Tensor) -> Tensor:
        d, e = self.d(x), self.e(x)
        self.last = x.shape
        d = d.tanh() if d.size(-1) % 4 == 0 and d.size(-1) > 8 else d
        e = e.sigmoid() if e.size(-1) > 7 else e
        return x + self.back(torch.cat([d, e], -1))


def stacked(kind: Any, depth: int) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(16, 16), *(kind() for _ in range(depth)), nn.Linear(16, 3))


def by_turns(depth: int) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(*((Vague, Mixed)[i % 2]() for i in range(depth)), nn.Linear(16, 3))


def tiny_llama(layers: int, heads: int = 4, keys: int = 2) -> nn.Module:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=layers, num_attention_heads=heads,
        num_key_value_heads=keys, max_position_embeddings=64, use_cache=False,
    )  # fmt: skip
    model: nn.Module = transformers.LlamaForCausalLM(config).eval()
    return model


TOKENS = {"input_ids": torch.arange(8)[None]}


def runs(model: nn.Module, inputs: Any, monkeypatch: pytest.MonkeyPatch) -> int:
    """How often the code of a model is tried while it is traced."""
    count = 0
    tried = Remedies.failures

    def counted(attempt: Any) -> Any:
        nonlocal count
        count += 1
        return tried(attempt)

    with monkeypatch.context() as patch:
        patch.setattr(Remedies, "failures", counted)
        netsurgery.trace(model, inputs)
    return count


@pytest.mark.parametrize("kind", [Vague, TwoOfThem, Mixed])
def test_tries_do_not_grow_with_depth(kind: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    counts = [runs(stacked(kind, depth), (X,), monkeypatch) for depth in (2, 4, 9)]
    assert counts[0] == counts[1] == counts[2]


def test_tries_of_layers_by_turns_do_not_grow_with_depth(monkeypatch: pytest.MonkeyPatch) -> None:
    counts = [runs(by_turns(depth), (X,), monkeypatch) for depth in (2, 4, 10)]
    assert counts[0] == counts[1] == counts[2]


@pytest.mark.parametrize("heads", [(4, 2), (4, 4), (8, 2)])
def test_tries_of_a_tiny_llama_do_not_grow_with_depth(heads: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    counts = [runs(tiny_llama(layers, *heads), TOKENS, monkeypatch) for layers in (2, 5)]
    assert counts[0] == counts[1]


def locked_by_code(network: netsurgery.Network) -> dict[str, str]:
    return {group.name: group.locked for group in network.groups if group.locked and "other sizes" in group.locked}


@pytest.mark.parametrize("model", [stacked(Vague, 5), by_turns(6)], ids=["alike", "by turns"])
def test_the_reason_names_the_layer(model: nn.Module) -> None:
    network = netsurgery.trace(model, (X,))
    found = locked_by_code(network)
    assert len(found) >= 5
    for name, why in found.items():
        layer = name.split(".")[0]
        assert f" in {layer} " in f"{why} " and all(
            f"code of {other}" not in why for other in range(9) if f"{other}" != layer
        )


def test_only_the_culprit_of_each_layer_is_locked() -> None:
    network = netsurgery.trace(stacked(Vague, 4), (X,))
    assert set(locked_by_code(network)) == {f"{i}.b" for i in range(1, 5)}
    open_ = {group.name for group in network.prunable}
    assert {f"{i}.{name}" for i in range(1, 5) for name in "ac"} <= open_


def test_a_layer_of_the_class_that_does_not_fail_stays_open() -> None:
    model = stacked(Vague, 3)
    model[2].b, model[2].back = nn.Linear(16, 7), nn.Linear(25, 16)  # not 6: the code takes the same way at any size
    assert set(locked_by_code(netsurgery.trace(model, (X,)))) == {"1.b", "3.b"}


def test_reasons_of_a_tiny_llama_name_their_layers() -> None:
    found = locked_by_code(netsurgery.trace(tiny_llama(6), TOKENS))
    assert len(found) == 6
    for name, why in found.items():
        assert f" in {'.'.join(name.split('.')[:4])}" in why


@pytest.mark.slow
def test_a_llama_of_28_layers_has_one_lock_a_layer() -> None:
    assert len(locked_by_code(netsurgery.trace(tiny_llama(28), TOKENS))) == 28  # its time: benchmarks/tracing.py

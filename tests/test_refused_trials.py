"""Trials that ``rewrite`` would refuse and whose group ``plan`` locks later: the rise is that of silenced units."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import netsurgery
from netsurgery.capture.copies import named_tensors
from netsurgery.errors import RewriteError
from netsurgery.passes import LossIncreaseScore, PruneChannels
from netsurgery.passes.ablation import Ablation
from netsurgery.passes.calibration import draw_samples
from netsurgery.verification.silencing import silenced
from test_language_models import IDS, built

TINY = {"hidden_size": 16, "intermediate_size": 6, "num_hidden_layers": 1, "use_cache": False}


class Grouped(nn.Module):
    """Attention with several queries to each key, the ratio written into the code."""

    def __init__(self, keys: int, ratio: int, decides: bool) -> None:
        super().__init__()
        self.keys, self.ratio, self.decides = keys, ratio, decides
        self.embed = nn.Embedding(64, 12)
        self.q, self.k, self.v = nn.Linear(12, keys * ratio * 4), nn.Linear(12, keys * 4), nn.Linear(12, keys * 4)
        self.out, self.head = nn.Linear(keys * ratio * 4, 12), nn.Linear(12, 64)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        if self.decides and float(x.sum()) > 1e9:  # only known where it is run
            x = -x
        q = self.q(x).view(*ids.shape, self.keys * self.ratio, 4).transpose(1, 2)
        k, v = (one(x).view(*ids.shape, self.keys, 4).transpose(1, 2) for one in (self.k, self.v))
        k, v = (one.repeat_interleave(self.ratio, 1) for one in (k, v))
        with torch.enable_grad():  # so that it is not rewritten
            attended = (q @ k.transpose(-2, -1) / 2).softmax(-1) @ v
        return self.head(x + self.out(attended.transpose(1, 2).flatten(2)))


def grouped(*sizes: Any) -> nn.Module:
    torch.manual_seed(0)
    return Grouped(*sizes).double().eval()


def of_logits(outputs: Any, ids: Tensor) -> Tensor:
    logits = outputs if isinstance(outputs, Tensor) else outputs.logits
    return F.cross_entropy(logits.transpose(1, 2), ids, reduction="none").mean(1)


MODELS: dict[str, Callable[[], nn.Module]] = {
    "llama, 2 queries": lambda: built(
        "Llama", "LlamaForCausalLM", **TINY, num_attention_heads=4, num_key_value_heads=2
    ),
    "llama, 4 queries": lambda: built(
        "Llama", "LlamaForCausalLM", **TINY, num_attention_heads=8, num_key_value_heads=2, head_dim=4
    ),
    "mistral": lambda: built("Mistral", "MistralForCausalLM", **TINY, num_attention_heads=6, num_key_value_heads=3,
                             head_dim=4),
    "qwen2, one key": lambda: built("Qwen2", "Qwen2ForCausalLM", **TINY, num_attention_heads=4, num_key_value_heads=1),
    "by hand": lambda: grouped(2, 2, False),
    "by hand, 3 queries": lambda: grouped(2, 3, False),
    "by hand, deciding": lambda: grouped(2, 2, True),
    "by hand, one key, deciding": lambda: grouped(1, 4, True),
}  # fmt: skip
REFUSED = {
    "llama, 2 queries": "model.layers.0.self_attn.q_proj:2",
    "mistral": "model.layers.0.self_attn.q_proj:2",
    "by hand, deciding": "q",
}
SLOW = ("llama, 4 queries", "mistral", "qwen2, one key")  # seconds each


def some_slow(names: Iterable[str]) -> list[Any]:
    return [pytest.param(name, marks=pytest.mark.slow) if name in SLOW else name for name in names]


def effects(model: nn.Module, network: netsurgery.Network, samples: Any) -> dict[str, list[float]]:
    """By the oracle: how much the loss changes where a unit is silenced in the recorded run of the whole network."""
    inputs, targets = samples.rows(slice(None), torch.device("cpu"))
    tensors = dict(named_tensors(model))

    def losses(keep: dict[Any, Tensor]) -> Tensor:
        logits = silenced(network.programs[0], tensors, inputs, keep)[0]
        return of_logits(logits, targets)

    base = losses({})
    return {
        group.name: [
            float(
                (losses({group.channel: torch.tensor([o for o in range(group.size) if o != unit])}) - base).abs().mean()
            )
            for unit in range(group.size)
        ]
        for group in network.prunable
    }


@pytest.mark.parametrize("parts", [True, False], ids=["in parts", "one after the other"])
@pytest.mark.parametrize("name", some_slow(MODELS))
def test_scores_are_the_effects_by_the_oracle(name: str, parts: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    model = MODELS[name]()
    samples = draw_samples((IDS, IDS), 12)
    network = netsurgery.trace(model, samples.inputs[0], try_sizes=False)  # as ``plan`` starts
    if not parts:
        monkeypatch.setattr(Ablation, "engine", lambda *_: None)
    scores = LossIncreaseScore((IDS, IDS), of_logits, samples=12).run(network).scores
    for group, wanted in effects(model, network, samples).items():
        assert scores[group].tolist() == pytest.approx(wanted, rel=1e-6, abs=1e-12), group
    assert any(abs(value) > 1e-6 for score in scores.values() for value in score.tolist())


@pytest.mark.parametrize("name", some_slow(REFUSED))
def test_there_are_trials_that_are_refused(name: str) -> None:
    """Else this file would test nothing."""
    model = MODELS[name]()
    network = netsurgery.trace(model, (IDS,), try_sizes=False)
    size = network[REFUSED[name]].size
    with pytest.raises(RewriteError):
        netsurgery.rewrite(model, netsurgery.Edit(network, {REFUSED[name]: tuple(range(size - 1))}))


SELECTIONS: list[tuple[str, dict[str, Any], dict[str, Any]]] = [
    ("half", {}, {"ratio": 0.5}), ("heads", {}, {"ratio": 0.5, "unit": "head"}),
    ("global", {}, {"ratio": 0.4, "scope": "global"}), ("budget", {}, {"params": 0.8}),
    ("racing", {"racing": True}, {"ratio": 0.5}),
    ("cumulative", {"mode": "cumulative", "tolerance": 0.02}, {"threshold": 0.02}),
    ("per group", {"mode": "per-group", "tolerance": 0.02}, {"threshold": 0.02}),
]  # fmt: skip
CASES = [
    pytest.param(name, settings, removal, id=f"{name}, {how}", marks=[pytest.mark.slow] if slow else [])
    for name in ("llama, 2 queries", "by hand, deciding")
    for how, settings, removal in SELECTIONS
    if (name, how) != ("by hand, deciding", "heads")  # there they are locked
    for slow in [name != "by hand, deciding" and how in ("global", "budget", "per group")]
]


@pytest.mark.parametrize(("name", "settings", "removal"), CASES)
def test_any_selection(name: str, settings: dict[str, Any], removal: dict[str, Any]) -> None:
    model = MODELS[name]()
    score = LossIncreaseScore((IDS, IDS), of_logits, samples=12, **settings)
    edit = netsurgery.plan(model, [score, PruneChannels(**removal)], (IDS,))
    small = netsurgery.rewrite(model, edit)
    assert netsurgery.verify(model, small, edit, (IDS,)) < 1e-9
    if settings.get("mode") == "cumulative":
        with torch.no_grad():
            assert float((of_logits(small(IDS), IDS) - of_logits(model(IDS), IDS)).mean()) <= 0.02
    assert edit.keep

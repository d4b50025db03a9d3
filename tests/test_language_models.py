"""Scores of language models with a padding mask: their code looks at the values of the mask, batch by batch."""

from __future__ import annotations

import importlib
import logging
import sys
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import netsurgery
from netsurgery.passes import FisherScore, LossIncreaseScore, PruneChannels, TaylorScore
from netsurgery.passes.ablation import Ablation, AblationSettings
from netsurgery.passes.calibration import draw_samples
from netsurgery.passes.gate_gradients import gate_slopes

IDS = torch.randint(1, 64, (12, 8), generator=torch.Generator().manual_seed(0))
MASK = (torch.arange(8) < torch.where(torch.arange(12) < 6, 8, 5)[:, None]).long()
MASKED = {"input_ids": IDS, "attention_mask": MASK}
SIZES = {"hidden_size": 16, "intermediate_size": 12, "num_hidden_layers": 1, "num_attention_heads": 4}


def built(kind: str, model: str, **options: Any) -> nn.Module:
    sys.modules.setdefault("kernels", None)  # type: ignore[arg-type]  # as in test_survival
    pytest.importorskip("transformers")
    hf: Any = importlib.import_module("transformers")
    torch.manual_seed(0)
    return getattr(hf, model)(getattr(hf, f"{kind}Config")(vocab_size=64, **options)).double().eval()


def of_tokens(outputs: Any, ids: Tensor) -> Tensor:
    return F.cross_entropy(outputs.logits.transpose(1, 2), ids, reduction="none").mean(1)


def of_texts(outputs: Any, labels: Tensor) -> Tensor:
    return F.cross_entropy(outputs.logits, labels, reduction="none")


LLAMA = {"num_key_value_heads": 2, **SIZES}
MODELS: dict[str, tuple[Any, Any, Tensor, str, list[str]]] = {
    "llama": (lambda: built("Llama", "LlamaForCausalLM", **LLAMA), of_tokens, IDS,
              "model.layers.0.mlp.gate_proj", ["model.layers.0.mlp.down_proj.weight"]),
    "gpt2": (lambda: built("GPT2", "GPT2LMHeadModel", n_embd=16, n_layer=1, n_head=4, n_positions=32, n_inner=12,
                           bos_token_id=0, eos_token_id=0), of_tokens, IDS,
             "transformer.h.0.mlp.c_fc", ["transformer.h.0.mlp.c_proj.weight"]),
    "bert": (lambda: built("Bert", "BertForSequenceClassification", max_position_embeddings=32, num_labels=3, **SIZES),
             of_texts, torch.arange(12) % 3,
             "bert.encoder.layer.0.intermediate.dense", ["bert.encoder.layer.0.output.dense.weight"]),
}  # fmt: skip


@pytest.mark.parametrize("rows", [None, 4])
@pytest.mark.parametrize("name", MODELS)
def test_slopes_are_those_of_the_weights_that_read_a_unit(name: str, rows: int | None) -> None:
    """Sample by sample, whether its batch is padded or not; though the network was traced without padding."""
    build, loss, targets, group, readers = MODELS[name]
    model, data = build(), (MASKED, targets)
    network = netsurgery.trace(model, {key: value[:2] for key, value in MASKED.items()})
    samples = draw_samples(data, 12)
    found = gate_slopes(Ablation(AblationSettings(loss, rows), network, samples))[group]
    axis = {m.parameter: m.axis for m in network[group].members}
    parameters = [dict(model.named_parameters())[reader] for reader in readers]
    for row in range(12):
        inputs, target = samples.rows(slice(row, row + 1), torch.device("cpu"))
        gradients = torch.autograd.grad(loss(model(**inputs[1]), target).sum(), parameters)
        expected = sum(
            (p * g).movedim(axis[reader], 0).flatten(1).sum(1)
            for reader, p, g in zip(readers, parameters, gradients, strict=True)
        )
        torch.testing.assert_close(found[row], expected, rtol=1e-6, atol=1e-12)


@pytest.mark.parametrize("name", MODELS)
def test_scores_and_pruning(name: str, caplog: pytest.LogCaptureFixture) -> None:
    build, loss, targets, group, _ = MODELS[name]
    model, example = build(), {key: value[:2] for key, value in MASKED.items()}
    for score in (TaylorScore, FisherScore, LossIncreaseScore):
        with caplog.at_level(logging.INFO, "netsurgery"):
            edit = netsurgery.plan(model, [score((MASKED, targets), loss, samples=12), PruneChannels(0.5)], example)
        assert not [message for message in caplog.messages if "slow" in message or "random" in message]
        assert edit.counts[group] == 6 or edit.network[group].size // 2 == edit.counts[group]
        assert netsurgery.verify(model, netsurgery.rewrite(model, edit), edit, example) < 1e-6


@pytest.mark.parametrize("name", MODELS)
def test_the_effect_on_the_loss_where_batches_are_padded_or_not(name: str) -> None:
    build, loss, targets, group, readers = MODELS[name]
    model = build()
    network = netsurgery.trace(model, {key: value[:2] for key, value in MASKED.items()})
    found = LossIncreaseScore((MASKED, targets), loss, samples=12, rows=4).run(network).scores[group]
    axis = {m.parameter: m.axis for m in network[group].members}
    with torch.no_grad():
        base = loss(model(**MASKED), targets)
        for unit in (0, 3):
            weights = [dict(model.named_parameters())[reader] for reader in readers]
            kept = [weight.clone() for weight in weights]
            for reader, weight in zip(readers, weights, strict=True):
                weight.select(axis[reader], unit).zero_()
            effect = (loss(model(**MASKED), targets) - base).abs().mean()
            for weight, old in zip(weights, kept, strict=True):
                weight.copy_(old)
            assert float(found[unit]) == pytest.approx(float(effect), rel=1e-4, abs=1e-10)

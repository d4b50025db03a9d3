"""Arguments of the wrong kind or in the wrong order: every public function says in one sentence what it takes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import netsurgery
from netsurgery import Edit, apply, cost, load, plan, rewrite, save, trace, verify
from netsurgery.errors import InputError, NetsurgeryError, PassError
from netsurgery.passes import (
    BlockInfluenceScore,
    Distillation,
    FisherScore,
    LossIncreaseScore,
    MagnitudeScore,
    PlantChannels,
    PruneChannels,
    ReconstructionScore,
    RemoveBlocks,
    TaylorScore,
    WidenChannels,
)

X = torch.randn(3, 4, generator=torch.Generator().manual_seed(0))
HALF = [MagnitudeScore(), PruneChannels(0.5)]


class Made:
    """A model, what a plan for it is made of, and what comes of it."""

    def __init__(self, folder: Path):
        self.model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
        self.network = trace(self.model, X)
        self.edit = plan(self.model, HALF, X)
        self.small = rewrite(self.model, self.edit)
        self.optimizer = torch.optim.SGD(self.model.parameters(), 0.1)
        self.text = self.edit.to_json()
        self.folder = folder / "small"
        save(self.folder, self.small, self.edit)


REWRITE = r"^rewrite\(model, edit\) takes a torch.nn.Module and its Edit, got "
SAVE = r"^save\(folder, small, edit\) takes a path, the smaller model and its Edit, got "
LOAD = r"^load\(folder, model\) takes a path and the full-size model, got "
EDIT = r"^Edit\(network, keep\) takes a Network and a dictionary of the units that stay by group, got "
JSON = r"^Edit.from_json\(text, network\) takes the JSON of an edit and the Network of its model, got "
PASSES = r"^expected a list of passes, got "

CASES: list[tuple[Callable[[Made], Any], str]] = [
    (lambda m: trace(X, m.model), r"^expected a torch.nn.Module, got Tensor$"),  # type: ignore[arg-type]
    (lambda m: trace(m.model, m.model), "hold no tensor .*: pass tensors"),
    (lambda m: trace(m.model, (1, 4)), "Sequential does not run on example_inputs that hold no tensor"),
    (lambda m: trace(m.model, torch.Size([1, 4])), "hold no tensor"),
    (lambda m: trace(m.model, "x"), "hold no tensor"),
    (lambda m: cost(X, m.model), r"^expected a torch.nn.Module, got Tensor$"),  # type: ignore[arg-type]
    (lambda m: cost(m.edit), r"^expected a torch.nn.Module, got Edit$"),
    (lambda m: plan(HALF, m.model), PASSES + r"a model, which comes first: plan\(model, passes\)$"),  # type: ignore[arg-type]
    (lambda m: plan(m.model, X, HALF), PASSES + "Tensor: for example "),  # type: ignore[arg-type]
    (lambda m: plan(m.model, m.edit), PASSES + "Edit: for example "),  # type: ignore[arg-type]
    (lambda m: plan(m.model, 0.5), PASSES + "float: for example "),  # type: ignore[arg-type]
    (lambda m: plan(m.model, "magnitude"), PASSES + "str: for example "),  # type: ignore[arg-type]
    (lambda m: plan(m.model, None), "^no passes given"),  # type: ignore[arg-type]
    (lambda m: plan(m.model, [MagnitudeScore]), "not a netsurgery.Pass: passes are instances"),  # type: ignore[list-item]
    (lambda m: apply(HALF, m.model), PASSES + "a model, which comes first"),  # type: ignore[arg-type, type-var]
    (lambda m: apply(m.model, m.edit), PASSES + "Edit"),  # type: ignore[arg-type]
    (
        lambda m: apply(m.model, HALF, X, optimizer=m.model),
        r"takes a torch Optimizer or a list of them, got Sequential$",
    ),  # type: ignore[arg-type]
    (lambda m: apply(m.model, HALF, X, ema=m.optimizer), r"takes a torch Module or a list of them, got SGD$"),  # type: ignore[arg-type]
    (lambda m: rewrite(m.edit, m.model), REWRITE + "Edit, Sequential$"),  # type: ignore[type-var]
    (lambda m: rewrite(m.model, m.network), REWRITE + "Sequential, Network$"),  # type: ignore[arg-type]
    (lambda m: rewrite(m.model, HALF), REWRITE + "Sequential, list$"),  # type: ignore[arg-type]
    (lambda m: rewrite(m.model, m.text), REWRITE + "Sequential, str$"),  # type: ignore[arg-type]
    (lambda m: rewrite(m.model, None), REWRITE + "Sequential, NoneType$"),  # type: ignore[arg-type]
    (lambda m: rewrite(nn.Linear, m.edit), REWRITE + "the class Linear, Edit$"),  # type: ignore[type-var]
    (lambda m: verify(m.small, m.model, m.edit), "the original comes first"),
    (lambda m: verify(m.model, m.edit, m.small), "got Sequential, Edit, Sequential$"),  # type: ignore[arg-type]
    (lambda m: verify(m.model, m.small, X), "got Sequential, Sequential, Tensor$"),  # type: ignore[arg-type]
    (lambda m: save(m.small, m.edit, m.folder), SAVE + r"Sequential, Edit, \w*Path$"),  # type: ignore[arg-type]
    (lambda m: save(m.folder, m.edit, m.small), SAVE + r"\w*Path, Edit, Sequential$"),  # type: ignore[arg-type]
    (lambda m: save(m.edit, m.small, m.folder), SAVE + r"Edit, Sequential, \w*Path$"),  # type: ignore[arg-type]
    (lambda m: save(str(m.folder), m.small.state_dict(), m.edit), SAVE + "str, OrderedDict, Edit$"),  # type: ignore[arg-type]
    (lambda m: save(m.folder, m.small, None), SAVE + r"\w*Path, Sequential, NoneType$"),  # type: ignore[arg-type]
    (lambda m: save(m.folder, m.model, m.edit), r"there '0.weight' is \[4, 4\], here it is \[8, 4\]$"),
    (lambda m: load(m.model, m.folder), LOAD + r"Sequential, \w*Path$"),  # type: ignore[arg-type, type-var]
    (lambda m: load(m.folder, m.edit), LOAD + r"\w*Path, Edit$"),  # type: ignore[type-var]
    (lambda m: load(m.folder, nn.Linear), LOAD + r"\w*Path, the class Linear$"),  # type: ignore[type-var]
    (lambda m: load(None, m.model), LOAD + "NoneType, Sequential$"),  # type: ignore[arg-type]
    (lambda m: load(m.folder, m.small), "^the edit is for another model: group '0' has 8 units there, 4 here$"),
    (lambda m: Edit(m.model, {}), EDIT + "Sequential, dict$"),  # type: ignore[arg-type]
    (lambda m: Edit({"0": (1,)}, m.network), EDIT + "dict, Network$"),  # type: ignore[arg-type]
    (lambda m: Edit(m.network, HALF), EDIT + "Network, list$"),  # type: ignore[arg-type]
    (lambda m: Edit(m.network, {"0": 3}), r"^group '0': the units that stay must be a list of whole numbers, got 3$"),  # type: ignore[dict-item]
    (lambda m: Edit(m.network, {"0": "ab"}), "a list of whole numbers, got 'ab'$"),  # type: ignore[dict-item]
    (lambda m: Edit(m.network, {"0": (0.5, 1.7)}), r"a list of whole numbers, got \(0.5, 1.7\)$"),  # type: ignore[dict-item]
    (lambda m: Edit(m.network, {0: (1,)}), "^'0' is no group of this network"),  # type: ignore[dict-item]
    (lambda m: m.edit.then(m.network), r"^edit.then\(later\) takes an Edit, got Network$"),  # type: ignore[arg-type]
    (lambda m: Edit.from_json(m.network, m.text), JSON + "Network, str$"),  # type: ignore[arg-type]
    (lambda m: Edit.from_json(m.text, m.model), JSON + "str, Sequential$"),  # type: ignore[arg-type]
    (lambda m: netsurgery.rule(3, "b c -> b c"), "expected an operation such as"),
    (lambda m: netsurgery.rule("b c -> b c", torch.relu), "no such operation is registered"),  # type: ignore[arg-type]
]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    return Made(tmp_path_factory.mktemp("arguments"))


@pytest.mark.parametrize(("call", "said"), CASES)
def test_wrong_arguments_are_said_in_a_sentence(call: Callable[[Made], Any], said: str, made: Made) -> None:
    with pytest.raises(NetsurgeryError, match=said) as caught:
        call(made)
    assert "\n" not in str(caught.value)


def test_nothing_to_prune_in_a_model_without_parameters() -> None:
    with pytest.raises(InputError, match=r"^nothing of ReLU can be pruned: it has no parameters with units$"):
        apply(nn.ReLU(), HALF, X)
    with pytest.raises(InputError, match=r"^nothing of Sequential can be pruned: it has no parameters with units$"):
        plan(nn.Sequential(nn.Flatten(), nn.Softmax(1)), HALF, X)


@pytest.mark.parametrize("label", [-1, 2, 7])
@pytest.mark.parametrize("score", [TaylorScore, FisherScore, LossIncreaseScore])
def test_labels_out_of_range(score: Any, label: int, made: Made) -> None:
    data = X, torch.tensor([0, 1, label])
    low, high = min(0, label), max(1, label)
    with pytest.raises(InputError, match=f"labels go from {low} to {high} where there are 2 classes") as caught:
        plan(made.model, [score(data), PruneChannels(0.5)], X)
    assert "\n" not in str(caught.value)


def test_a_mapping_of_any_kind_holds_keyword_inputs() -> None:
    from collections import UserDict

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 2))

        def forward(self, *, x: torch.Tensor) -> torch.Tensor:
            out: torch.Tensor = self.layers(x)
            return out

    assert [group.size for group in trace(Net(), UserDict(x=X)).prunable] == [8]


@pytest.mark.parametrize(
    "make",
    [
        PruneChannels,
        lambda n: PruneChannels(params=n),
        lambda n: PruneChannels(0.5, multiple_of=n),
        lambda n: PruneChannels(0.5, min_channels=n),
        lambda n: PruneChannels(0.5, max_ratio=n),
        lambda n: PruneChannels(0.5, compensate="bias", data=(X, X), samples=n),
        PlantChannels,
        lambda n: PlantChannels({"0": n}),
        WidenChannels,
        lambda n: WidenChannels(1.5, multiple_of=n),
        lambda n: WidenChannels(1.5, noise=n),
        lambda n: RemoveBlocks(count=n),
        lambda n: LossIncreaseScore((X, X), samples=n),
        lambda n: TaylorScore((X, X), samples=n),
        lambda n: ReconstructionScore((X, X), samples=n),
        lambda n: BlockInfluenceScore((X, X), samples=n),
        lambda n: Distillation(temperature=n),
        lambda n: Distillation(alpha=n),
    ],
)
@pytest.mark.parametrize("truth", [True, False])
def test_truth_values_are_no_numbers(make: Callable[[bool], Any], truth: bool) -> None:
    with pytest.raises(InputError):
        make(truth)


def test_passes_in_a_tuple_do(made: Made) -> None:
    assert plan(made.model, tuple(HALF), X) == made.edit
    with pytest.raises(PassError, match="no passes given"):
        plan(made.model, ())

"""The command behind docs/coverage.md: nothing is missing from its list, and whatever a model does, it has its row."""

import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import torchvision
from torch import nn
from torch._C import _len_torch_dispatch_stack

# At the end: what is called coverage there is a command, not the package coverage.
sys.path.append(str(Path(__file__).resolve().parent.parent / "benchmarks"))
import alive
import coverage_models
import coverage_page
import coverage_rows
import coverage_timm

import netsurgery

ROOT = Path(__file__).resolve().parent.parent


class Net(nn.Module):
    """A network that is exact, unless it is told what else to do."""

    def __init__(self, act=None):
        super().__init__()
        self.first, self.norm, self.last = nn.Linear(5, 8), nn.BatchNorm1d(8), nn.Linear(8, 3)
        self.act = act

    def forward(self, x):
        x = torch.relu(self.norm(self.first(x)))
        return self.last(x) if self.act is None else self.act(self.last(x), x)


def crash(y, x):
    if not _len_torch_dispatch_stack():  # not traced
        return y
    raise KeyboardInterrupt  # nothing of a model's own is expected to raise it


def hang(y, x):
    time.sleep(60 if _len_torch_dispatch_stack() else 0)


def row(monkeypatch, act=None, timeout=60.0, double=False):
    """The row of a network, measured in a process of its own."""
    monkeypatch.setitem(coverage_models.KINDS, "toy", lambda: {"net": lambda: (Net(act), (torch.randn(4, 5),))})
    return coverage_rows.measured("toy", "net", coverage_rows.Options(timeout=timeout, double=double))


def test_exact(monkeypatch):
    found = row(monkeypatch)
    assert (found["status"], found["groups"], found["locked"]) == ("exact", 3, 2)
    assert found["share"] == 1.0  # all but inputs and outputs
    assert found["difference"] < 1e-6 and found["permuted"] < 1e-6 and found["changed"] > 0.1
    assert [(one["reason"], one["groups"]) for one in found["reasons"]] == [
        ("the network input input_0 has this dimension", 1),
        ("the network output has this dimension", 1),
    ]


def test_double(monkeypatch):
    assert 0 <= row(monkeypatch, double=True)["difference"] < 1e-14


@pytest.mark.parametrize(
    ("act", "status", "message"),
    [
        (lambda y, x: y * 0, "PROVES NOTHING", "an output is the same everywhere"),
        (lambda y, x: y / 0, "PROVES NOTHING", "an output is not finite"),
        (lambda y, x: y.argmax(1), "PROVES NOTHING", "no output has numbers"),
        (lambda y, x: str(y.shape), "REFUSED", "TraceError: Net returned no tensor"),
        (lambda y, x: y * x.shape[1], "REFUSED", "InputError: nothing of Net can be pruned"),
        (crash, "CRASH", "the process ended with exit code 1"),
    ],
)
def test_failures(monkeypatch, act, status, message):
    found = row(monkeypatch, act)
    assert found["status"] == status and found["message"].startswith(message)


def test_unexpected_error(monkeypatch):
    monkeypatch.setattr(coverage_rows, "permuted_difference", lambda *given: [][0])
    found = row(monkeypatch)
    assert found["status"] == "CRASH" and found["message"].startswith("IndexError: list index out of range at tests/")
    assert found["difference"] < 1e-6  # what was measured before is kept


@pytest.mark.parametrize(("scale", "status"), [(1e6, "exact"), (1e15, "WRONG")])
def test_rounding(monkeypatch, scale, status):
    """A network that blows rounding up: float64 tells it from an error."""
    found = row(monkeypatch, lambda y, x: (scale * y).sin())
    assert found["status"] == status
    single = found.get("in_float32", found)
    assert max(single["difference"], single["permuted"]) > 1e-4
    if status == "WRONG":
        assert found["in_float64"]["status"] == "WRONG"


def test_timeout(monkeypatch):
    found = row(monkeypatch, hang, timeout=2)
    assert (found["status"], found["message"]) == ("TIMEOUT", "no result in 2 s")


def test_verdict():
    figures = {"difference": 1e-7, "permuted": 1e-7, "dead": None, "changed": 0.5}
    verdicts = [
        ({}, "exact"),
        ({"difference": 2e-4}, "WRONG"),
        ({"permuted": float("nan")}, "WRONG"),
        ({"difference": float("inf"), "dead": alive.NOT_FINITE}, "PROVES NOTHING"),
        ({"difference": 1.0, "dead": "an output is the same everywhere"}, "WRONG"),
        ({"changed": 0.0}, "PROVES NOTHING"),
    ]
    for other, status in verdicts:
        assert coverage_rows.verdict({**figures, **other}, 1e-4)["status"] == status


def test_reasons_are_merged():
    here = "the operation has no rule: aten.roll in layers.{} at timm/models/swin.py:53"
    there = "fails at other sizes (shape '[2, {}]' is invalid): aten.view in blocks.{} at a.py:7 in blocks.{}.attn"
    assert coverage_rows.short(here.format(1)) == "the operation has no rule: aten.roll at timm/models/swin.py:53"
    assert coverage_rows.short("the code refuses other sizes (no) in the model") == "the code refuses other sizes (no)"
    training = " at a.py:7{} ({} runs other code in training)"
    assert coverage_rows.short(training.format(" in a.b", "the code of a.b")) == training.format("", "its code")
    assert coverage_rows.alike(there.format(3, 1, 2)) == coverage_rows.alike(there.format(12, 3, 4))
    assert coverage_rows.short("no (the code of the model uses no_grad)") == "no (its code uses no_grad)"
    assert coverage_rows.alike(here.format(1)).endswith(":53")  # another line is another reason


def test_what_a_reason_holds():
    """Of queries, keys and values the factor 3 is locked; heads and dimensions are open beside it: it holds nothing."""

    class Attention(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.qkv, self.b = nn.Linear(5, 8), nn.Linear(8, 72), nn.Linear(24, 3)

        def forward(self, x):
            q, k, v = self.qkv(self.a(x)).view(-1, 7, 3, 4, 6).permute(2, 0, 3, 1, 4)
            y = (torch.softmax(q @ k.mT, -1) @ v).transpose(1, 2).flatten(2)
            return self.b(y.flip(-1) if self.flips else y)

    model, held = Attention(), []
    for model.flips in (False, True):
        facts = coverage_rows.facts(netsurgery.trace(model, torch.zeros(2, 7, 5)))
        held.append({one["reason"].partition(":")[0]: one["entries"] for one in facts["reasons"]})
    assert held[0]["units are identified by position"] == 0
    assert held[1]["units are identified by position"] > 0 == held[1]["the network output has this dimension"]


def test_every_timm_module():
    """After an update of timm: `python benchmarks/coverage_timm.py MODULE...` chooses for the new ones."""
    assert {one["module"] for one in coverage_timm.chosen()} >= set(coverage_timm.modules())
    assert {one["model"] for one in coverage_timm.chosen()} >= set(coverage_timm.ALSO)
    assert len(coverage_timm.modules()) > 90


def test_choice_for_a_module():
    name = coverage_timm.smallest("inception_v4")
    listed = next(one for one in coverage_timm.chosen() if one["module"] == "inception_v4")
    assert coverage_timm.described(name) == listed


def test_every_torchvision_model():
    ours = {name for kind in ("classification", "segmentation", "detection", "video", "flow")
            for name in coverage_models.names(kind)}  # fmt: skip
    quantized = torchvision.models.list_models(module=torchvision.models.quantization)
    assert ours >= set(torchvision.models.list_models()) - set(quantized)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["llama", "t5", "clip", "detr", "mamba"])
def test_transformers(name):
    pytest.importorskip("transformers")
    model, inputs = coverage_models.build("transformers", name)
    alive.randomise(model, lambda model: coverage_models.call(model, inputs))
    outputs = coverage_models.call(model, inputs)
    assert alive.what_is_dead([value for value in outputs.values() if isinstance(value, torch.Tensor)]) is None


def test_randomise_leaves_nothing_still():
    class Still(nn.Module):
        def __init__(self):
            super().__init__()
            self.token, self.gamma = nn.Parameter(torch.zeros(1, 4, 6)), nn.Parameter(1e-6 * torch.ones(6))
            self.norm, self.first, self.head = nn.BatchNorm1d(4), nn.Linear(6, 6), nn.Linear(6, 3)
            nn.init.zeros_(self.head.weight)
            nn.init.constant_(self.first.weight, 1e6)

        def forward(self, x):
            return self.head(self.gamma * self.first(self.norm(x) + self.token))

    model, x = Still().eval(), 100 * torch.randn(8, 4, 6)
    alive.randomise(model, lambda model: coverage_models.call(model, (x,)))
    for tensor in [*model.parameters(), model.norm.running_mean, model.norm.running_var]:
        assert 1e-3 < tensor.abs().max() < 1e5 and tensor.std() > 1e-3
    out = model(x)
    assert alive.what_is_dead(out) is None and 0.01 < out.std() < 100


def test_page():
    reason = {"reason": "the operation has no rule: aten.roll at a_b.py:53", "groups": 2, "entries": 9.0}
    edge = {"reason": "the network input input_0 has this dimension", "groups": 1, "entries": 0.0}
    figures = {"machine": "M", "parameters": 1234, "groups": 7, "locked": 2, "removed": 0.5, "difference": 2e-7,
               "permuted": 3e-7, "trace_s": 0.5, "rewrite_s": 0.25}  # fmt: skip
    rows = [
        {"kind": "a", "model": "one", "status": "exact", "share": 0.95, "reasons": [edge], **figures},
        {"kind": "a", "model": "two", "status": "exact", "share": 0.5, "reasons": [reason, edge], "replaced": ["l.0"],
         **figures},
        {"kind": "b", "model": "three", "status": "REFUSED", "message": "TraceError: no\nmore", "machine": "M"},
    ]  # fmt: skip
    text = coverage_page.page(rows, ["a", "b", "c"])
    for line in [
        "| a | 2 | 2 | 0 | 0 | 0 | 0 | 0 | 1 (50 %) | 72.5 % |",
        "| b | 1 | 0 | 0 | 1 | 0 | 0 | 0 | 0 (0 %) | 0.0 % |",
        "| **all** | 3 | 2 | 0 | 1 | 0 | 0 | 0 | 1 (33 %) | 50.0 % |",
        "| one | exact | 1,234 | 7 | 2 | 95.0 % | 50.0 % | 2.0e-07 | 3.0e-07 | 0.50 | 0.25 |  |",
        "| two | exact | 1,234 | 7 | 2 | 50.0 % | 50.0 % | 2.0e-07 | 3.0e-07 | 0.50 | 0.25 | 1: `l.0` |",
        "| three | REFUSED |  |  |  |  |  |  |  |  |  |  |",
        "- three: REFUSED: `TraceError: no more`",
        "Only inputs, outputs and positions are locked in 1 of these models.",
        "- two:\n  - 2 groups: `the operation has no rule: aten.roll at a_b.py:53`",
    ]:
        assert f"\n{line}\n" in text
    assert "## c" not in text


def test_checked_in_page():
    """docs/coverage.md has a row for every model of the list, whatever became of it."""
    pytest.importorskip("transformers")
    text = (ROOT / "docs" / "coverage.md").read_text(encoding="utf-8")
    shown = dict.fromkeys(re.findall(r"^\| ([^|]+?) \| (?:exact|[A-Z ]+)(?: \(f64\))? \|", text, re.MULTILINE))
    assert list(shown) == [name for kind in coverage_models.KINDS for name in coverage_models.names(kind)]


@pytest.mark.slow
def test_command(tmp_path):
    """Rows are appended, a second run resumes, and the page has all of them in the order of the list."""
    out, page = tmp_path / "rows.jsonl", tmp_path / "page.md"
    command = [sys.executable, str(ROOT / "benchmarks" / "coverage.py"), "--out", str(out), "--page", str(page)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}

    def run(*arguments):
        done = subprocess.run([*command, *arguments], env=environment, capture_output=True, text=True, check=True)
        return [line.split()[-1] for line in done.stdout.splitlines()]

    assert run("--kind", "classification", "--models", "squeezenet1_?", "--slice", "2/2") == ["squeezenet1_1"]
    assert run("--kind", "classification", "--models", "squeezenet1_?", "--resume") == ["squeezenet1_0"]
    assert [json.loads(line)["status"] for line in out.read_text().splitlines()] == ["exact", "exact"]
    assert page.read_text().index("squeezenet1_0 | exact") < page.read_text().index("squeezenet1_1 | exact")

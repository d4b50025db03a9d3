"""The script that every refactoring is compared with sees what changes."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).resolve().parent.parent / "benchmarks"))
import same

import netsurgery

ROOT = Path(__file__).resolve().parent.parent
FIELDS = (
    "groups", "locks", "equal sizes", "selected", "edit", "diff", "summary", "attributes", "forwards", "state", "exact",
)  # fmt: skip


def test_two_runs_are_the_same():
    before, after = same.facts("random", "groups 1"), same.facts("random", "groups 1")
    assert tuple(before) == FIELDS and same.differences(before, after, []) == {}
    assert before["exact"] == ["exact to 1e-10"] and len(before["edit"]) > 1
    assert before["edit"][1].startswith('"groups": {"conv_0": {"size": ')


def test_other_units_are_seen(monkeypatch):
    def first(self, network):
        return netsurgery.Edit(network, {g.name: range(-(-g.size // 2)) for g in network.prunable})

    before = same.facts("random", "groups 1")
    monkeypatch.setattr(same.Halve, "run", first)
    after = same.facts("random", "groups 1")
    assert list(same.differences(before, after, [])) == ["edit", "state"]
    assert same.differences(before, after, ["edit", "state"]) == {}


def test_a_lock_is_seen(monkeypatch):
    trace = netsurgery.trace

    def locked(model, inputs):
        network = trace(model, inputs)
        return network.with_locked({network.prunable[0].name: "for once"})

    before = same.facts("random", "groups 1")
    monkeypatch.setattr(netsurgery, "trace", locked)
    after = same.facts("random", "groups 1")
    assert same.differences(before, after, [])["locks"][1] == "+conv_0: for once"


def test_refusals_are_compared(monkeypatch):
    def nothing(self, network):
        raise netsurgery.NetsurgeryError("not today")

    before = same.facts("random", "groups 1")
    monkeypatch.setattr(same.Halve, "run", nothing)
    after = same.facts("random", "groups 1")
    assert after["refused"] == ["NetsurgeryError: not today"]
    assert same.differences(before, after, [])["refused"][1] == "+NetsurgeryError: not today"


def test_rounding_is_not_compared_but_exactness_is():
    assert same.exactness(1e-12, "random") == same.exactness(2e-11, "random") == "exact to 1e-10"
    assert same.exactness(0.25, "zoo") == "differs by 2e-01, more than 1e-05"
    assert same.exactness(float("nan"), "zoo").startswith("differs")


@pytest.mark.slow
def test_command(tmp_path):
    """A file compares with itself; where a line of it is changed, that line is shown, and the exit status is 1."""
    file = tmp_path / "before.json"

    def run(*arguments):
        command = [sys.executable, str(ROOT / "benchmarks" / "same.py"), *map(str, arguments)]
        return subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT)

    assert run("--kind", "random", "--models", "groups [12]", "--save", file).returncode == 0
    whole = run("--compare", file)
    assert whole.returncode == 0 and whole.stdout.endswith("\n0 of 2 models differ\n")
    saved = json.loads(file.read_text())
    saved["models"]["random: groups 2"]["summary"] = ["another"]
    file.write_text(json.dumps(saved))
    part = run("--compare", file)
    assert part.returncode == 1 and part.stdout.endswith("\n1 of 2 models differ\n")
    assert "  summary:\n    @@ -1 +1 @@\n    -another\n    +asked to " in part.stdout
    assert run("--compare", file, "--ignore", "summary").returncode == 0

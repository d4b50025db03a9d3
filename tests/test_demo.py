"""The demo: it does what it says, writes what it says, and says the same for the same seed."""

import io
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

pytest.importorskip("sklearn")
pytest.importorskip("matplotlib")

from netsurgery import demo
from netsurgery.models import DigitsResNet

TINY: dict[str, int] = {"epochs": 2, "finetune_epochs": 1, "rounds": 3}
LATENCY = ("latency_ms", "latency_low_ms", "latency_high_ms")


def silent() -> Console:
    return Console(file=io.StringIO(), width=120)


def steady(result: dict[str, Any]) -> dict[str, Any]:
    """The result without what is measured by the clock."""
    rows = [{k: v for k, v in row.items() if k not in LATENCY} for row in result["rows"]]
    return {k: v for k, v in result.items() if k != "seconds"} | {"rows": rows}


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], Path, str]:
    """What one short run returned, where it wrote, and what it printed."""
    out = tmp_path_factory.mktemp("demo") / "made" / "here"
    text = io.StringIO()
    return demo.run(3, out, Console(file=text, width=120), **TINY), out, text.getvalue()


def test_table_json_holds_the_result(ran: tuple[dict[str, Any], Path, str]) -> None:
    result, out, _ = ran
    read = json.loads((out / "table.json").read_text())
    assert read == result
    assert read["seed"] == 3
    assert read["torch"] == torch.__version__
    assert (read["train_images"], read["test_images"]) == (1347, 450)
    assert [row["network"] for row in read["rows"]] == ["trained", "pruned", "pruned, fine-tuned"]


def test_half_of_the_parameters_go_and_the_rest_computes_the_same(ran: tuple[dict[str, Any], Path, str]) -> None:
    trained, pruned, tuned = ran[0]["rows"]
    assert trained["parameters"] == sum(p.numel() for p in DigitsResNet().parameters())
    assert 0.4 * trained["parameters"] < pruned["parameters"] <= 0.5 * trained["parameters"]
    assert pruned["macs"] < trained["macs"]
    assert (tuned["parameters"], tuned["macs"]) == (pruned["parameters"], pruned["macs"])
    assert 0 <= ran[0]["verify"] < 1e-5


def test_accuracy_and_latency_are_measured(ran: tuple[dict[str, Any], Path, str]) -> None:
    for row in ran[0]["rows"]:
        assert 0 < row["latency_low_ms"] <= row["latency_ms"] <= row["latency_high_ms"]
        assert (row["accuracy"] * 450 / 100) == pytest.approx(round(row["accuracy"] * 450 / 100))
    assert ran[0]["rows"][0]["accuracy"] > 60  # two epochs; chance is 10


def test_widths_are_those_of_the_networks(ran: tuple[dict[str, Any], Path, str]) -> None:
    before, after = ran[0]["widths"]["trained"], ran[0]["widths"]["pruned"]
    assert before == demo.widths(DigitsResNet())
    assert list(after) == list(before)
    assert all(0 < after[k] <= before[k] for k in before)
    assert after["head"] == before["head"] == 10
    assert after["stages.1.0.conv2"] == after["stages.1.0.shortcut.0"]  # the sum ties them


def test_the_terminal_shows_the_table_and_the_files(ran: tuple[dict[str, Any], Path, str]) -> None:
    result, out, text = ran
    for row in result["rows"]:
        assert f"{row['accuracy']:.2f} %" in text
        assert f"{row['parameters']:,}" in text
        assert f"{row['macs']:,}" in text
    assert f"{result['verify']:.1e}" in text
    assert str(out / "table.json") in text


def test_the_picture_opens_and_is_not_blank(ran: tuple[dict[str, Any], Path, str]) -> None:
    from matplotlib.image import imread

    pixels = imread(ran[1] / "widths.png")
    assert pixels.shape[0] > 300
    assert pixels.shape[1] > 600
    assert len({tuple(p) for p in pixels.reshape(-1, pixels.shape[2])[::7]}) > 10  # colours


def test_the_same_seed_gives_the_same_figures(ran: tuple[dict[str, Any], Path, str]) -> None:
    before = torch.random.get_rng_state()
    assert steady(demo.run(3, None, silent(), **TINY)) == steady(ran[0])
    assert torch.equal(torch.random.get_rng_state(), before)


def test_another_seed_gives_other_figures(ran: tuple[dict[str, Any], Path, str], tmp_path: Path) -> None:
    other = demo.run(4, None, silent(), **TINY)
    assert other["rows"][0]["accuracy"] != ran[0]["rows"][0]["accuracy"] or other["widths"] != ran[0]["widths"]
    assert not list(tmp_path.iterdir())

"""What a prompt and a notebook show: one line for a value, however large it is, and a table in HTML."""

from __future__ import annotations

import dataclasses
import re
from html.parser import HTMLParser

import pytest
import torch
import torchvision
from torch import nn

import netsurgery
from netsurgery.passes import MagnitudeScore, PruneChannels
from netsurgery.tables import SHOWN


@pytest.fixture(scope="module")
def network() -> netsurgery.Network:
    with torch.device("meta"):
        model = torchvision.models.resnet50()
    return netsurgery.trace(model, torch.zeros(1, 3, 224, 224, device="meta"))


def halved(network: netsurgery.Network) -> netsurgery.Edit:
    return netsurgery.Edit(network, {group.name: range(group.size // 2) for group in network.prunable})  # type: ignore[misc]


def test_a_network(network: netsurgery.Network) -> None:
    assert repr(network) == "Network(ResNet: 25,557,032 parameters, 4,089,184,256 MACs, 39 groups, 2 locked)"
    scores = {group.name: torch.ones(group.size) for group in network.groups}
    assert repr(network.with_scores(scores)) == repr(network)[:-1] + ", scored)"
    assert len(str(network).splitlines()) > 30  # print() shows the table, as before


def test_an_edit(network: netsurgery.Network) -> None:
    assert repr(halved(network)) == (
        "Edit(ResNet: 37 of 39 groups cut, parameters 25,557,032 -> 6,917,640 (27.1%), "
        "MACs 4,089,184,256 -> 1,052,311,552 (25.7%))"
    )
    assert repr(netsurgery.Edit(network, {})) == "Edit(ResNet: nothing goes)"
    assert str(halved(network)) == repr(halved(network))
    fitted = dataclasses.replace(halved(network), values={"fc.bias": torch.zeros(1000)})
    assert ", 1 tensors with new values, " in repr(fitted)


def test_parts_of_a_network(network: netsurgery.Network) -> None:
    stream = network["layer4.0.conv3"]
    assert repr(stream) == "Group('layer4.0.conv3', size=2048, unit='channel', 23 members)"
    assert repr(network["fc"]).endswith("members, locked='the network output has this dimension')")
    assert repr(network.cost()) == "Cost(params=25557032, macs=4089184256, of 107 modules)"
    assert re.fullmatch(r"Program\(mode='eval', \d+ operations, values='none'\)", repr(network.programs[0]))


def test_a_rewritten_network() -> None:
    layer = nn.TransformerEncoderLayer(32, 4, 64, batch_first=True)
    edit = netsurgery.plan(layer, [MagnitudeScore(), PruneChannels(0.5, unit="head")], torch.zeros(1, 5, 32))
    assert re.fullmatch(r"Adaptation\(\d+ attributes, 1 rewritten forwards\)", repr(edit.adaptation))


class Table(HTMLParser):
    """Cells row by row; every tag must be closed by itself."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.rows: list[list[str]] = []
        self.caption = ""
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: object) -> None:
        self.open.append(tag)
        if tag == "tr":
            self.rows.append([])
        elif tag in ("td", "th"):
            self.rows[-1].append("")

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open[-1] == "caption":
            self.caption += data
        else:
            self.rows[-1][-1] += data


def test_tables_of_a_notebook(network: netsurgery.Network) -> None:
    shown = Table(network._repr_html_())
    assert f"Network({shown.caption})" == repr(network)
    assert shown.rows[0] == ["group", "units", "produced by", "consumed by", "locked"]
    assert ["layer1.0.conv1", "64", "layer1.0.conv1", "layer1.0.conv2", ""] in shown.rows
    edit = Table(halved(network)._repr_html_())
    assert (f"Edit({edit.caption})", edit.rows[1]) == (repr(halved(network)), ["conv1", "64", "32", "50.0%"])
    cost = Table(network.cost()._repr_html_())
    assert (cost.rows[1], cost.rows[-1]) == (
        ["conv1", "9,408", "118,013,952"],
        ["total", "25,557,032", "4,089,184,256"],
    )


def test_what_is_no_html_is_escaped() -> None:
    model = nn.Sequential()
    model.add_module("<script>&", nn.Linear(3, 4))
    model.add_module("last", nn.Linear(4, 2))
    text = netsurgery.trace(model, torch.zeros(1, 3))._repr_html_()
    assert "<script>" not in text
    assert any(row[0] == "<script>&" for row in Table(text).rows)


def test_long_tables_say_how_much_is_left_out() -> None:
    model = nn.Sequential(*(nn.Linear(2, 2) for _ in range(SHOWN + 50)))
    network = netsurgery.trace(model, torch.zeros(1, 2))
    rows = Table(network._repr_html_()).rows
    assert len(rows) == SHOWN + 2
    assert rows[-1] == [f"and {len(str(network).splitlines()) - 2 - SHOWN} more"]
    assert len(repr(network)) < 120

"""What was asked, what came of it: targets of the original, limits, shares by modules, and what is said of the rest."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import netsurgery
from netsurgery.errors import InputError
from netsurgery.models import resnet20
from netsurgery.passes import HGSR, MagnitudeScore, PruneChannels, RandomScore, SoftPruning

IMAGE = torch.zeros(1, 3, 12, 12)
ROWS = torch.randn(2, 5, 12, generator=torch.Generator().manual_seed(0))


def net(*widths: int) -> nn.Sequential:
    torch.manual_seed(0)
    parts: list[nn.Module] = []
    for before, after in zip((3, *widths), widths, strict=False):
        parts += [nn.Conv2d(before, after, 3, padding=1), nn.BatchNorm2d(after), nn.ReLU()]
    return nn.Sequential(*parts, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(widths[-1], 4))


def convolutions(model: nn.Module) -> list[int]:
    return [m.out_channels for m in model.modules() if isinstance(m, nn.Conv2d)]


def kept(model: nn.Module, *passes: netsurgery.Pass, x: Any = IMAGE) -> dict[str, int]:
    edit = netsurgery.plan(model, [RandomScore(), *passes], x)
    return {group.name: edit.counts.get(group.name, group.size) for group in edit.network.prunable}


# Targets of the original ---------------------------------------------------------------------------------------------


def rounds(model: nn.Module, targets: Sequence[float], **settings: Any) -> tuple[nn.Module, netsurgery.Edit]:
    """Prune in rounds, each with a target of the original."""
    done: netsurgery.Edit | None = None
    for target in targets:
        edit = netsurgery.plan(model, [MagnitudeScore(), PruneChannels(target, of=done, **settings)], IMAGE)
        done = edit if done is None else done.then(edit)
        model = netsurgery.rewrite(model, edit)
    assert done is not None
    return model, done


STEPS = [k / 20 for k in range(1, 11)]


@pytest.mark.parametrize("scope", ["layer", "global"])
def test_rounds_reach_what_one_round_would(scope: str) -> None:
    small, done = rounds(net(8, 16, 64), STEPS, scope=scope)
    assert sum(convolutions(small)) == 44
    if scope == "layer":
        assert convolutions(small) == [4, 8, 32]
    assert netsurgery.verify(net(8, 16, 64).eval(), small.eval(), done, IMAGE + 1) < 1e-5


def test_rounding_is_made_up_for_by_later_rounds() -> None:
    assert convolutions(rounds(net(16, 64), STEPS, multiple_of=8)[0]) == [8, 32]
    assert convolutions(rounds(net(20, 44), STEPS, multiple_of=8)[0]) == [16, 24]
    assert convolutions(rounds(net(7, 9), [0.1, 0.2, 0.3, 0.4, 0.5])[0]) == [4, 5]


def test_the_original_may_be_a_network_or_any_edit_that_began_with_it() -> None:
    model = net(8, 16)
    first = netsurgery.plan(model, [MagnitudeScore(), PruneChannels(0.25)], IMAGE)
    small = netsurgery.rewrite(model, first)
    for of in (first, first.network, netsurgery.trace(model, IMAGE)):
        assert kept(small, PruneChannels(0.5, of=of)) == {"0": 4, "3": 8}
        assert kept(small, PruneChannels(0.125, of=of)) == {"0": 6, "3": 12}  # more is gone already
    assert kept(small, PruneChannels(0.5)) == {"0": 3, "3": 6}


def test_budgets_and_limits_of_the_original() -> None:
    model = net(8, 16)
    first = netsurgery.plan(model, [MagnitudeScore(), PruneChannels(0.25)], IMAGE)
    small = netsurgery.rewrite(model, first)
    for what in ("params", "macs"):
        edit = netsurgery.plan(small, [RandomScore(), PruneChannels(of=first, **{what: 0.3})], IMAGE)
        whole, left = getattr(first.before, what), getattr(edit.after, what)
        assert 0.2 * whole < left <= 0.3 * whole
    assert kept(small, PruneChannels(0.9, of=first, max_ratio=0.5)) == {"0": 4, "3": 8}
    assert kept(small, PruneChannels(0.9, of=first, scope="global", max_ratio=0.5)) == {"0": 4, "3": 8}


def test_attention_in_rounds() -> None:
    layer = nn.TransformerEncoderLayer(24, 4, 32, batch_first=True)
    model = nn.Sequential(
        nn.Linear(12, 24), nn.TransformerEncoder(layer, 1, enable_nested_tensor=False), nn.Linear(24, 3)
    )
    done = None
    for target in (0.1, 0.25, 0.4, 0.5):
        passes = [RandomScore(), PruneChannels(target, of=done, unit=("channel", "head"))]
        edit = netsurgery.plan(model, passes, ROWS)
        model = netsurgery.rewrite(model, edit)
        done = edit if done is None else done.then(edit)
    attention = model[1].layers[0].self_attn
    assert (attention.in_proj_weight.shape, model[0].out_features) == ((36, 12), 12)


def test_where_one_head_is_left() -> None:
    layer = nn.TransformerEncoderLayer(24, 4, 32, batch_first=True)
    model = nn.Sequential(nn.TransformerEncoder(layer, 1, enable_nested_tensor=False), nn.Linear(24, 3))
    x = torch.zeros(2, 5, 24)
    first = netsurgery.plan(model, [RandomScore(), PruneChannels(0.75, unit="head")], x)
    small = netsurgery.rewrite(model, first)
    second = netsurgery.plan(small, [RandomScore(), PruneChannels(0.5, unit="head_dim", of=first)], x)
    assert netsurgery.rewrite(small, second)[0].layers[0].self_attn.in_proj_weight.shape == (9, 24)


def test_another_original_is_refused() -> None:
    other = netsurgery.trace(net(8, 16, 32), IMAGE)
    with pytest.raises(
        InputError, match=r"of=...\): group '3' of Sequential is none of the original, Sequential: pass the"
    ):
        kept(net(8, 16), PruneChannels(0.5, of=other))
    with pytest.raises(InputError, match=r"of=...\): group '0' of Sequential is none of the original"):
        kept(net(8, 16), PruneChannels(0.5, of=netsurgery.trace(net(4, 16), IMAGE)))
    with pytest.raises(InputError, match=r"of=Sequential\): the Edit that began with the original, or its Network"):
        PruneChannels(0.5, of=net(8))  # type: ignore[arg-type]


# What is said --------------------------------------------------------------------------------------------------------


def said(model: nn.Module, *passes: netsurgery.Pass, x: Any = IMAGE) -> str:
    return netsurgery.plan(model, [RandomScore(), *passes], x).summary()


def test_what_fell_short_is_said() -> None:
    assert (
        said(net(8, 16), PruneChannels(0.5))
        == "asked to remove 50.0% of the channels of each layer, removed 50.0% (12 of 24)"
    )
    assert said(net(8, 64), PruneChannels(0.05)).splitlines() == [
        "asked to remove 5.0% of the channels of each layer, removed 4.2% (3 of 72); "
        "short: 0: 0 of 8 (5% of these is less than one)",
        "  0: 0 of 8 (5% of these is less than one)",
    ]
    assert "short: 3: 4 of 12 (multiple_of=8)" in said(net(16, 12), PruneChannels(0.5, multiple_of=8))
    assert "short: 0: 2 of 8 (max_ratio=0.25)" in said(net(8), PruneChannels(0.5, max_ratio=0.25))
    assert "short: 0: 2 of 8 (min_channels=6)" in said(net(8), PruneChannels(0.5, min_channels=6))
    assert "removed 25.0% (6 of 24); short: 0: 2 of 8 (max_ratio=0.25)" in said(
        net(8, 16), PruneChannels(0.5, scope="global", max_ratio=0.25)
    )
    assert said(net(8, 16), PruneChannels(macs=0.5)).startswith("asked to remove 50.0% of the MACs, removed 5")
    assert "asked to remove 1,020 of the parameters, removed 69.0%" in said(net(8, 16), PruneChannels(params=488))
    assert said(net(8, 16), PruneChannels(params=10**9)) == "asked to remove 0 of the parameters, removed 0.0%"
    assert "the units with scores of at most 0.5" in said(net(8), PruneChannels(threshold=0.5))


class HardCoded(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(12, 8), nn.Linear(8, 6), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        with torch.enable_grad():
            return self.c(self.b(self.a(x).view(-1, 5, 8)).relu())


def test_what_is_locked_is_said_with_the_reason() -> None:
    lines = said(HardCoded(), PruneChannels(0.5), x=ROWS).splitlines()
    assert lines[0].startswith(
        "asked to remove 50.0% of the channels of each layer, removed 21.4% (3 of 14); short: a: 0 of 8"
    )
    assert "aten.view at" in lines[1] and "test_targets.py:" in lines[1] and "locked: " in lines[1]
    assert "locked" not in said(HardCoded(), PruneChannels(0.5, include=["b"]), x=ROWS)  # it was not asked for


def test_apply_says_it_in_one_line(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "netsurgery"):
        netsurgery.apply(net(8, 64), [RandomScore(), PruneChannels(0.05)], IMAGE)
        netsurgery.apply(net(8, 64), [RandomScore(), PruneChannels(0.25)], IMAGE)
        netsurgery.apply(HardCoded(), [RandomScore(), PruneChannels(0.5)], ROWS)
    assert [record.levelname for record in caplog.records] == ["WARNING", "INFO", "WARNING"]
    assert all("\n" not in message and message.startswith("asked to remove") for message in caplog.messages)


def test_many_groups_are_counted() -> None:
    lines = said(net(8, 8, 8, 8, 8, 64), PruneChannels(0.05)).splitlines()
    assert lines[0].endswith("6: 0 of 8 (5% of these is less than one); and 2 more groups") and len(lines) == 6


def test_an_edit_by_hand_says_what_it_removes() -> None:
    network = netsurgery.trace(net(8, 16), IMAGE)
    assert netsurgery.Edit(network, {"0": (1, 2)}).summary() == "removed 6 units of 1 groups"
    assert netsurgery.Edit(network, {}).summary() == "removed nothing"


# Limits --------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Uneven(netsurgery.Pass):
    """Scores of the last layer are far below those of the others, as gradients make them."""

    gives = frozenset({"scores"})

    def run(self, network: netsurgery.Network) -> netsurgery.Network:
        groups = network.prunable
        scores = {g.name: torch.rand(g.size) * (1e-6 if g is groups[-1] else 1.0) for g in groups}
        return network.with_scores(scores, comparable=True)


@pytest.mark.parametrize("target", [{"macs": 0.3}, {"params": 0.3}, {"ratio": 0.6}])
def test_a_tenth_of_each_layer_stays(target: dict[str, float]) -> None:
    model = net(32, 32, 64)
    edit = netsurgery.plan(model, [Uneven(), PruneChannels(scope="global", **target)], IMAGE)
    assert edit.counts["6"] == 7
    edit = netsurgery.plan(model, [Uneven(), PruneChannels(scope="global", max_ratio=1.0, **target)], IMAGE)
    assert edit.counts["6"] < 7


def test_a_share_of_each_layer_is_what_it_says() -> None:
    assert kept(net(40, 20), PruneChannels(0.95)) == {"0": 2, "3": 1}
    assert kept(net(40, 20), PruneChannels(0.95, max_ratio=0.9)) == {"0": 4, "3": 2}
    assert kept(net(40, 20), PruneChannels({"0": 0.95, "*": 0.5})) == {"0": 2, "3": 10}
    edit = netsurgery.plan(net(40), [RandomScore(), PruneChannels(threshold=2.0)], IMAGE)
    assert edit.counts == {"0": 4}


# Modules -------------------------------------------------------------------------------------------------------------


def test_modules_are_named_by_patterns_classes_and_themselves() -> None:
    model = net(8, 16, 32)
    for first in ("0", model[0]):
        assert kept(model, PruneChannels(0.5, exclude=first)) == {"0": 8, "3": 8, "6": 16}
        assert kept(model, PruneChannels(0.5, exclude=[first, "3"])) == {"0": 8, "3": 16, "6": 16}
        assert kept(model, PruneChannels(0.5, include=[first, model[3]])) == {"0": 4, "3": 8, "6": 32}
    with pytest.raises(InputError, match="nothing of Sequential can be pruned"):
        kept(model, PruneChannels(0.5, exclude=[nn.Conv2d]))
    assert kept(model, PruneChannels(0.5, include=nn.Conv2d)) == {"0": 4, "3": 8, "6": 16}
    assert kept(model, PruneChannels(0.5, include=[nn.BatchNorm2d])) == {"0": 4, "3": 8, "6": 16}


def test_modules_that_are_none() -> None:
    model = net(8, 16)
    for wrong, message in (
        (nn.Conv3d, "Conv3d matches no module in Sequential"),
        (nn.Linear(2, 2), "the Linear that is given is no module in Sequential"),
        ("conv9", "pattern 'conv9' matches no module with parameters in Sequential"),
    ):
        for setting in ("include", "exclude", "protect"):
            with pytest.raises(InputError, match=message.replace(" with parameters", "( with parameters)?")):
                kept(model, PruneChannels(0.5, **{setting: [wrong]}))
    for wrong in (3, None, int, [["0"]]):
        with pytest.raises(InputError, match=r"says no modules: pass name patterns \('layer3.\*'\), classes"):
            PruneChannels(0.5, exclude=[wrong])


def test_modules_that_are_shared() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(12, 8), nn.Linear(8, 6)
            self.other, self.c = self.b, nn.Linear(6, 8)
            self.twin = nn.Linear(6, 8)
            self.twin.weight = self.c.weight

        def forward(self, x: Tensor) -> Tensor:
            return (self.twin(self.other(self.a(x)).relu()) + self.c(self.b(self.a(x)))).sum(-1)

    assert kept(Tied(), PruneChannels(0.5, exclude="other"), x=ROWS)["b"] == 6
    assert kept(Tied(), PruneChannels(0.5, exclude="twin"), x=ROWS)["b"] == 3
    with pytest.raises(InputError, match="nothing of Tied can be pruned"):
        kept(Tied(), PruneChannels(0.5, include="other", exclude="b"), x=ROWS)


def test_a_module_that_is_protected_keeps_its_inputs() -> None:
    model = net(8, 16, 32)
    assert kept(model, PruneChannels(0.5, protect=[model[3]])) == {"0": 8, "3": 16, "6": 16}
    assert kept(model, PruneChannels(0.5, protect=nn.Linear)) == {"0": 4, "3": 8, "6": 32}
    assert kept(model, PruneChannels(0.5, protect="2")) == {"0": 8, "3": 8, "6": 16}  # a ReLU is given them
    assert kept(model, PruneChannels(0.5, protect=[nn.AdaptiveAvgPool2d])) == {"0": 4, "3": 8, "6": 32}


def test_shares_by_modules() -> None:
    model = net(20, 20, 20)
    assert kept(model, PruneChannels({"0": 0.7, "3": 0.3})) == {"0": 6, "3": 14, "6": 20}
    assert kept(model, PruneChannels({model[0]: 0.7, nn.Conv2d: 0.3})) == {"0": 6, "3": 14, "6": 14}
    assert kept(model, PruneChannels({"0": 0.0, "*": 0.5})) == {"0": 20, "3": 10, "6": 10}
    assert kept(model, PruneChannels({"*": 0.5}, exclude="3", multiple_of=4)) == {"0": 12, "3": 20, "6": 12}
    assert said(model, PruneChannels({"0": 0.7, "3": 0.3})) == (
        "asked to remove 70.0% of the channels in '0', 30.0% in '3', removed 50.0% (20 of 40)"
    )
    with pytest.raises(InputError, match="pattern 'layer9' matches no module"):
        kept(model, PruneChannels({"layer9": 0.5}))
    with pytest.raises(InputError, match=r"ratio=1.5\): the share to remove must be in"):
        PruneChannels({"0": 1.5})
    with pytest.raises(InputError, match=r"ratio='half'\): expected a number"):
        PruneChannels({"0": "half"})  # type: ignore[dict-item]
    for wrong in ({"ratio": {}}, {"ratio": {"0": 0.5}, "scope": "global"}):
        with pytest.raises(InputError, match="shares by modules, one or more, are of each layer"):
            PruneChannels(**wrong)


def test_one_score_for_two_removals() -> None:
    model = net(20, 20, 20)
    with torch.no_grad():
        for conv in (model[0], model[3]):
            conv.weight[5:10] *= 1e-3
    passes = [MagnitudeScore(), PruneChannels(0.25, include="0"), PruneChannels(0.25, include=[model[3]])]
    edit = netsurgery.plan(model, passes, IMAGE)
    stays = tuple(i for i in range(20) if not 5 <= i < 10)
    assert edit.keep == {"0": stays, "3": stays}
    assert [outcome.got for outcome in edit.outcomes] == ["25.0% (5 of 20)"] * 2
    twice = netsurgery.plan(model, [MagnitudeScore(), PruneChannels(0.25), PruneChannels(0.5)], IMAGE)
    assert twice.counts == {"0": 8, "3": 8, "6": 8}
    ranked = MagnitudeScore().run(netsurgery.trace(model, IMAGE)).scores["6"].argsort(stable=True)
    assert twice.keep["6"] == tuple(sorted(ranked[12:].tolist()))


def test_both_factors_one_after_the_other() -> None:
    model = nn.Sequential(nn.Conv2d(3, 32, 1), nn.GroupNorm(8, 32), nn.Conv2d(32, 4, 1))
    passes = [RandomScore(), PruneChannels(0.5), PruneChannels(0.5, unit="group")]
    small = netsurgery.apply(model, passes, IMAGE)
    assert (small[0].out_channels, small[1].num_groups) == (8, 4)


@dataclass(frozen=True)
class Lock(netsurgery.Pass):
    """A pass that only locks."""

    names: tuple[str, ...]

    def run(self, network: netsurgery.Network) -> netsurgery.Network:
        return network.with_locked(dict.fromkeys(self.names, "kept by hand"))


def test_a_pass_that_only_locks() -> None:
    edit = netsurgery.plan(net(8, 16, 32), [Lock(("0",)), RandomScore(), PruneChannels(0.5), PruneChannels(0.5)], IMAGE)
    assert edit.counts == {"3": 4, "6": 8}
    assert "0: 0 of 8 (locked: kept by hand)" in edit.summary()
    with pytest.raises(netsurgery.errors.PassError, match="no pass gives an edit"):
        netsurgery.plan(net(8), [Lock(("0",))], IMAGE)


# Units of those modules alone ----------------------------------------------------------------------------------------


class Residual(nn.Module):
    """A stream that every block writes to."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Linear(12, 16), nn.Linear(16, 3)
        self.blocks = nn.ModuleList(
            nn.ModuleDict({"norm": nn.LayerNorm(16), "up": nn.Linear(16, 40), "down": nn.Linear(40, 16)})
            for _ in range(2)
        )

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        for block in self.blocks:
            x = x + block["down"](block["up"](block["norm"](x)).relu())
        return self.head(x)


def test_a_stream_stays_unless_it_is_asked_for_by_name() -> None:
    hidden = {"embed": 16, "blocks.0.up": 20, "blocks.1.up": 20}
    model = Residual()
    for include in ("blocks.*", ["*.up", "*.down"], [model.blocks], [model.blocks[0], model.blocks[1]]):
        assert kept(model, PruneChannels(0.5, include=include), x=ROWS) == hidden
    assert kept(model, PruneChannels({"blocks.*": 0.5}), x=ROWS) == hidden
    every = {"embed": 8, "blocks.0.up": 20, "blocks.1.up": 20}
    for include in (["embed", "*.up"], "*", [nn.Linear], [model]):
        assert kept(model, PruneChannels(0.5, include=include), x=ROWS) == every
    assert kept(model, PruneChannels(0.5, include=["*.norm"]), x=ROWS) == {
        **hidden,
        "embed": 8,
        "blocks.0.up": 40,
        "blocks.1.up": 40,
    }
    assert "embed: 0 of 16 (also produced by embed: include 'embed' to cut it)" in said(
        model, PruneChannels(0.5, include="blocks.*"), x=ROWS
    )
    with pytest.raises(
        InputError, match=r"embed: 0 of 16 \(also produced by embed, blocks.1.down: include 'embed' to cut it\)"
    ):
        kept(model, PruneChannels(0.5, include="blocks.0.down"), x=ROWS)


def test_blocks_of_a_residual_network() -> None:
    model, x = resnet20(), torch.zeros(1, 3, 32, 32)
    edit = netsurgery.plan(model, [RandomScore(), PruneChannels(0.5, include="stages.0.*")], x)
    assert sorted(edit.counts) == [f"stages.0.{i}.conv1" for i in range(3)]
    edit = netsurgery.plan(model, [RandomScore(), PruneChannels({"stages.0": 0.25, "stages.1": 0.5})], x)
    assert edit.counts == {
        **{f"stages.0.{i}.conv1": 12 for i in range(3)},
        **{f"stages.1.{i}.conv1": 16 for i in range(3)},
    }


def test_elsewhere_modules_are_named_likewise() -> None:
    model = net(8, 16)
    assert HGSR(model, IMAGE, include=[model[3]]).layers == ("3.weight",)
    assert HGSR(model, IMAGE, exclude=nn.Linear).layers == ("0.weight", "3.weight")
    pruning = SoftPruning(model, IMAGE, method="sfp", ratio=0.5, epochs=1, exclude=[model[0]])
    assert list(pruning.pruned) == ["3.weight"]
    with pytest.raises(InputError, match="Conv3d matches no module"):
        HGSR(model, IMAGE, include=nn.Conv3d)

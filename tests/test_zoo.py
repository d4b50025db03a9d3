"""Every convolutional classifier of torchvision, with random norms: half of every group goes, nothing else changes."""

import logging
import re
import warnings
from collections import Counter

import pytest
import torch
from torch import nn

import netsurgery
import zoo
from netsurgery.passes import PruneChannels, RandomScore
from netsurgery.verification import permuted_difference
from oracles import parameters, snapshot

MODELS = [
    *zoo.REPRESENTATIVES,
    *(pytest.param(name, marks=pytest.mark.slow) for name in zoo.slow_names()),
]


@pytest.mark.parametrize("name", MODELS)
def test_half_of_every_group(name):
    model, inputs = zoo.build(name), (zoo.images(name),)
    before = snapshot(model)
    network = netsurgery.trace(model, inputs)
    assert permuted_difference(model, network, inputs, seed=1) < 1e-5

    sorts = sorted({group.unit for group in network.prunable})  # one by one: a ratio cuts one factor of several
    edit = netsurgery.plan(model, [RandomScore(seed=1), *(PruneChannels(0.5, unit=one) for one in sorts)], inputs)
    assert all(len(edit.keep[group.name]) == group.size - group.size // 2 for group in network.prunable)
    small = netsurgery.rewrite(model, edit)
    assert netsurgery.verify(model, small, edit, inputs) < 1e-5

    assert isinstance(small, type(model))
    assert list(small.state_dict()) == list(before)
    assert all(torch.equal(tensor, before[key]) for key, tensor in model.state_dict().items())
    expected = 0.75 if name.startswith("shufflenet") else 0.5
    assert parameters(small) < expected * parameters(model)
    with torch.no_grad():
        outputs = model(*inputs)
        far = (small(*inputs) - outputs).abs().max() / outputs.abs().max()
    assert far > 1e-3  # what went did matter, so that the comparison proves something
    if name in zoo.REPRESENTATIVES:  # outputs are of a sane scale and tell images apart, or all this proves little
        one, other = outputs
        assert 0.05 < one.std() < 20
        assert (one - other).std() > 0.01 * one.std()

    if not name.startswith("shufflenet"):
        locked = [group for group in network.groups if group.locked and group.size > 1]
        assert {group.locked.partition(":")[0].split()[2] for group in locked} == {"input", "output"}

    assert edit.before == netsurgery.cost(model, inputs)
    assert edit.after == netsurgery.cost(small, inputs)
    for net, cost in ((model, edit.before), (small, edit.after)):
        assert cost.params == parameters(net)
        assert cost.macs == counted(net, inputs[0])


def counted(model: nn.Module, images: torch.Tensor) -> int:
    """Multiply-accumulates of convolutions and matrix products, as fvcore counts them."""
    logging.getLogger("fvcore").setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch.jit, which fvcore uses, is deprecated
        from fvcore.nn import FlopCountAnalysis

        by_operator = FlopCountAnalysis(model, images).unsupported_ops_warnings(False).by_operator()
    return int(sum(by_operator[kind] for kind in ("conv", "linear", "matmul")))


@pytest.mark.parametrize("name", ["googlenet", "inception_v3"])
def test_auxiliary_heads_run_after_surgery(name):
    """Heads that only run in training are cut along; with norms and dropout at rest they give the silenced outputs."""
    model, inputs = zoo.build(name), (zoo.images(name),)
    edit = netsurgery.plan(model, [RandomScore(), PruneChannels(0.5)], inputs)
    small = netsurgery.rewrite(model, edit)
    heads = [path for path, _ in model.named_modules() if re.fullmatch(r"aux1|aux2|AuxLogits", path)]
    assert heads
    assert all(any(parameter.startswith(path) for parameter in changed(edit)) for path in heads)
    small.train()
    for module in small.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm | nn.Dropout):
            module.eval()
    with torch.no_grad():
        outputs = small(*inputs)
    assert len(outputs) == 1 + len(heads)
    assert all(output.isfinite().all() for output in outputs if output is not None)
    assert netsurgery.verify(model, small, edit, inputs) < 1e-5  # runs both modes


def changed(edit: netsurgery.Edit) -> list[str]:
    """Parameters that an edit makes smaller."""
    groups = [edit.network[name] for name in edit.keep]
    return [member.parameter for group in groups for member in group.members]


#: Stages with more shuffles than their width has factors of two: stage, reason, and how many groups.
SHUFFLENET = {
    "shufflenet_v2_x0_5": {
        ("stage3", "a cut goes through a unit: aten.split"): 9,
        ("stage3", "parts of equal size are built differently: aten.split"): 28,
        ("stage3", "the sizes do not align: aten.view"): 1,
    },
    "shufflenet_v2_x1_0": {
        ("stage2", "a cut goes through a unit: aten.split"): 7,
        ("stage2", "parts of equal size are built differently: aten.split"): 31,
        ("stage2", "the sizes do not align: aten.view"): 1,
        ("stage3", "a cut goes through a unit: aten.split"): 31,
        ("stage3", "parts of equal size are built differently: aten.split"): 49,
        ("stage3", "the sizes do not align: aten.view"): 2,
    },
}


@pytest.mark.parametrize("name", SHUFFLENET)
def test_what_shufflenet_locks(name):
    network = netsurgery.trace(zoo.build(name), (zoo.images(name),))
    locked = [group for group in network.groups if group.locked and not group.locked.startswith("the network")]
    assert Counter((g.name.partition(".")[0], g.locked.partition(" in ")[0]) for g in locked) == SHUFFLENET[name]

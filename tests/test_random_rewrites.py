"""Random networks, of which random modules are rewritten, give the same outputs: float64, to 1e-10."""

import random

import pytest
import torch
from hypothesis import given
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd

import netsurgery
from netsurgery.capture.inputs import tensors_in
from netsurgery.errors import InputError
from netsurgery.passes import BranchConv, Factorise, FoldBatchNorm, InsertLayer
from oracles import RandomKeep
from random_networks import THEMES, Program, build, example, programs
from test_random_networks import EXAMPLES, exhaustive

#: What a pass may say of a network or a layer that it does not fit.
EXPECTED = (
    *("has no batch norm that can be folded", "is shared, or computed from others", "layer that can be factorised"),
    *("its channels are", "does not run", "keeps its groups", "would change outputs", "read different inputs"),
    *("has hooks", "filters for"),
)


def one_of(model: nn.Module, draw: random.Random) -> netsurgery.Pass:
    layers = [path for path, module in model.named_modules() if isinstance(module, _ConvNd | nn.Linear)]
    path = draw.choice(layers) if layers else ""
    made: list[netsurgery.Pass] = [FoldBatchNorm(), Factorise(ratio=0, always=True)]
    if layers:
        made += [InsertLayer(path, kind) for kind in ("identity", "shortcut", "dense")]
        made += [BranchConv(path)] * isinstance(model.get_submodule(path), _ConvNd)
    return draw.choice(made)


@pytest.mark.parametrize("examples", [max(1, EXAMPLES // 4), pytest.param(100, marks=pytest.mark.slow)])
@pytest.mark.parametrize("theme", THEMES)
def test_random_rewrites(theme: str, examples: int) -> None:
    done: list[type] = []

    @exhaustive(examples)
    @given(programs(theme))
    def run(program: Program) -> None:
        torch.manual_seed(0)
        draw, model, x = random.Random(program.seed), build(program), example(program)
        for module in model.modules():
            if isinstance(module, _BatchNorm) and module.running_var is not None:
                module.running_var.uniform_(0.5, 2)
        model.eval()
        for _ in range(3):
            rewrite = one_of(model, draw)
            try:
                new = netsurgery.apply(model, [rewrite], x, verify=1e-10)
            except InputError as error:
                if not any(text in str(error) for text in EXPECTED):
                    raise
                continue
            done.append(type(rewrite))
            with torch.no_grad():
                for one, other in zip(tensors_in(model(*x)), tensors_in(new(*x)), strict=True):
                    assert (one - other).abs().max() <= 1e-10 * one.abs().max().clamp(min=1e-30)
            model = new
        edit = netsurgery.plan(model, [RandomKeep(program.seed)], x)
        assert netsurgery.verify(model, netsurgery.rewrite(model, edit), edit, x) < 1e-10

    run()
    assert len(done) > examples / 2

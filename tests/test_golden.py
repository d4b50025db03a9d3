"""The whole effect of each pass on one small network: the units that stay, and the text of ``edit.diff()``."""

import inspect
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import netsurgery
from netsurgery import passes
from netsurgery.passes import (
    BatchNormScore,
    BlockInfluenceScore,
    BranchConv,
    Compensate,
    Factorise,
    FisherScore,
    FoldBatchNorm,
    GeometricMedianScore,
    GradientScore,
    GradMax,
    HGSRScore,
    InsertLayer,
    LossIncreaseScore,
    MagnitudeScore,
    PlantChannels,
    PruneChannels,
    RandomScore,
    ReconstructionScore,
    RemoveBlocks,
    SoftPruning,
    TaylorScore,
    WidenChannels,
)

#: Half of each layer, compensated: by the removal itself and by a pass of its own.
COMPENSATED = """\
0 keeps 0, 2, 4
3 keeps 1, 2
0.weight 6x2x3x3 -> 3x2x3x3
1.weight 6 -> 3
1.bias 6 -> 3
1.running_mean 6 -> 3
1.running_var 6 -> 3
3.weight 4x6x3x3 -> 2x3x3x3
3.bias 4 -> 2
6.weight 3x16 -> 3x8
3.weight has new values
3.bias has new values
6.weight has new values
6.bias has new values
parameters 391 -> 143 (36.6%)
MACs 5,280 -> 2,208 (41.8%)"""

Plan = Callable[[nn.Module], netsurgery.Edit]


def waves(*shape: int, frequency: float = 1.7) -> Tensor:
    """Numbers between -1 and 1 that no generator of random numbers has drawn."""
    count = torch.Size(shape).numel()
    return (frequency * torch.arange(1, count + 1, dtype=torch.float64) ** 1.1).sin().reshape(shape)


X, Y = waves(12, 2, 4, 4, frequency=0.9), torch.arange(12) % 3


def network() -> nn.Module:
    """Two groups, of 6 and 4 units, in float64: no score is near another by rounding."""
    model = nn.Sequential(
        nn.Conv2d(2, 6, 3, padding=1, bias=False), nn.BatchNorm2d(6), nn.ReLU(),
        nn.Conv2d(6, 4, 3, stride=2, padding=1), nn.ReLU(),
        nn.Flatten(), nn.Linear(16, 3),
    ).double().eval()  # fmt: skip
    with torch.no_grad():
        for index, parameter in enumerate(model.parameters()):
            parameter.copy_(waves(*parameter.shape, frequency=1.1 + 0.3 * index))
        model[1].running_mean.copy_(0.1 * waves(6))
        model[1].running_var.copy_(1 + 0.5 * waves(6))
    return model


class Residual(nn.Module):
    def __init__(self, scale: float) -> None:
        super().__init__()
        self.conv, self.scale = nn.Conv2d(2, 2, 3, padding=1), scale

    def forward(self, x: Tensor) -> Tensor:
        return x + self.scale * self.conv(x)


def deep() -> nn.Module:
    """Three residual blocks, of which the second adds least and the last most."""
    blocks = [Residual(scale) for scale in (0.5, 0.1, 2.0)]
    model = nn.Sequential(*blocks, nn.Flatten(), nn.Linear(32, 3)).double().eval()
    with torch.no_grad():
        for index, parameter in enumerate(model.parameters()):
            parameter.copy_(waves(*parameter.shape, frequency=1.1 + 0.3 * index))
    return model


#: Passes that are shown on another network.
NETWORKS = {"BlockInfluenceScore": deep, "RemoveBlocks": deep}


def planned(*scores_and_removal: netsurgery.Pass) -> Plan:
    return lambda model: netsurgery.plan(model, scores_and_removal, (X[:2],))


def ranked(score: netsurgery.Pass) -> Plan:
    """Half of all units, by a score: which ones, and from which group, is the score's."""
    return planned(score, PruneChannels(0.5, scope="global"))


def with_gradients(model: nn.Module) -> netsurgery.Edit:
    nn.functional.cross_entropy(model(X), Y).backward()
    return ranked(GradientScore())(model)


def softly(model: nn.Module) -> netsurgery.Edit:
    pruning = SoftPruning(model, (X[:2],), method="sfp", ratio=0.5, epochs=1, grouping="coupled")
    pruning.step(0)
    return pruning.plan()


#: A pass, how it is used, and its effect.
GOLDEN: dict[str, tuple[Plan, str]] = {
    "BatchNormScore": (
        ranked(BatchNormScore()),
        """\
0 keeps 0, 2, 4
3 keeps 1, 2
0.weight 6x2x3x3 -> 3x2x3x3
1.weight 6 -> 3
1.bias 6 -> 3
1.running_mean 6 -> 3
1.running_var 6 -> 3
3.weight 4x6x3x3 -> 2x3x3x3
3.bias 4 -> 2
6.weight 3x16 -> 3x8
parameters 391 -> 143 (36.6%)
MACs 5,280 -> 2,208 (41.8%)""",
    ),
    "FisherScore": (
        ranked(FisherScore((X, Y))),
        """\
0 keeps 2, 4
3 keeps 1, 2, 3
0.weight 6x2x3x3 -> 2x2x3x3
1.weight 6 -> 2
1.bias 6 -> 2
1.running_mean 6 -> 2
1.running_var 6 -> 2
3.weight 4x6x3x3 -> 3x2x3x3
3.bias 4 -> 3
6.weight 3x16 -> 3x12
parameters 391 -> 136 (34.8%)
MACs 5,280 -> 1,656 (31.4%)""",
    ),
    "GeometricMedianScore": (
        ranked(GeometricMedianScore()),
        """\
0 keeps 0, 4
3 keeps 1, 2, 3
0.weight 6x2x3x3 -> 2x2x3x3
1.weight 6 -> 2
1.bias 6 -> 2
1.running_mean 6 -> 2
1.running_var 6 -> 2
3.weight 4x6x3x3 -> 3x2x3x3
3.bias 4 -> 3
6.weight 3x16 -> 3x12
parameters 391 -> 136 (34.8%)
MACs 5,280 -> 1,656 (31.4%)""",
    ),
    "GradientScore": (
        with_gradients,
        """\
0 keeps 0, 4, 5
3 keeps 2, 3
0.weight 6x2x3x3 -> 3x2x3x3
1.weight 6 -> 3
1.bias 6 -> 3
1.running_mean 6 -> 3
1.running_var 6 -> 3
3.weight 4x6x3x3 -> 2x3x3x3
3.bias 4 -> 2
6.weight 3x16 -> 3x8
parameters 391 -> 143 (36.6%)
MACs 5,280 -> 2,208 (41.8%)""",
    ),
    "BranchConv": (
        planned(BranchConv("0")),
        """\
0 becomes Branched(filters=(3, 3))
0.weight 6x2x3x3 goes
0.0.weight 3x2x3x3 is new
0.1.weight 3x2x3x3 is new
parameters 391 -> 391 (100.0%)
MACs 5,280 -> 5,280 (100.0%)""",
    ),
    "Factorise": (
        planned(Factorise(2)),
        """\
6 becomes Factored(rank=2, exact=False)
6.weight 3x16 goes
6.bias 3 goes
6.0.weight 2x16 is new
6.1.weight 3x2 is new
6.1.bias 3 is new
parameters 391 -> 381 (97.4%)
MACs 5,280 -> 5,260 (99.6%)""",
    ),
    "FoldBatchNorm": (
        planned(FoldBatchNorm()),
        """\
0 becomes Folded(norm='1')
1 becomes WithoutNorm(keep=())
0.weight 6x2x3x3 has new values
1.weight 6 goes
1.bias 6 goes
1.running_mean 6 goes
1.running_var 6 goes
1.num_batches_tracked scalar goes
0.bias 6 is new
parameters 391 -> 385 (98.5%)
MACs 5,280 -> 5,280 (100.0%)""",
    ),
    "HGSRScore": (
        ranked(HGSRScore()),
        """\
0 keeps 0, 1, 3
3 keeps 2, 3
0.weight 6x2x3x3 -> 3x2x3x3
1.weight 6 -> 3
1.bias 6 -> 3
1.running_mean 6 -> 3
1.running_var 6 -> 3
3.weight 4x6x3x3 -> 2x3x3x3
3.bias 4 -> 2
6.weight 3x16 -> 3x8
parameters 391 -> 143 (36.6%)
MACs 5,280 -> 2,208 (41.8%)""",
    ),
    "InsertLayer": (
        planned(InsertLayer("0")),
        """\
1 becomes Inserted(kind='identity', layer='0', clamp=(0.0, None), first=True, seed=0)
1.weight is 1.0.weight
1.bias is 1.0.bias
1.running_mean is 1.0.running_mean
1.running_var is 1.0.running_var
1.num_batches_tracked is 1.0.num_batches_tracked
1.2.weight 6x6x3x3 is new
1.3.weight 6 is new
1.3.bias 6 is new
1.3.running_mean 6 is new
1.3.running_var 6 is new
1.3.num_batches_tracked scalar is new
parameters 391 -> 727 (185.9%)
MACs 5,280 -> 15,648 (296.4%)""",
    ),
    "InsertLayer: dense": (
        planned(InsertLayer("3", "dense", channels=1)),
        """\
3.weight 4x6x3x3 -> 5x6x3x3
3.bias 4 -> 5
6.weight 3x16 -> 3x20
3 becomes DenselyInserted(channels=1, seed=4051597622)
3.weight 5x6x3x3 goes
3.bias 5 goes
3.layer.weight 4x6x3x3 is new
3.layer.bias 4 is new
3.new.weight 1x4x3x3 is new
3.new.bias 1 is new
parameters 391 -> 440 (112.5%)
MACs 5,280 -> 5,592 (105.9%)""",
    ),
    "LossIncreaseScore": (
        ranked(LossIncreaseScore((X, Y), progress=False)),
        """\
0 keeps 0, 2, 4
3 keeps 2, 3
0.weight 6x2x3x3 -> 3x2x3x3
1.weight 6 -> 3
1.bias 6 -> 3
1.running_mean 6 -> 3
1.running_var 6 -> 3
3.weight 4x6x3x3 -> 2x3x3x3
3.bias 4 -> 2
6.weight 3x16 -> 3x8
parameters 391 -> 143 (36.6%)
MACs 5,280 -> 2,208 (41.8%)""",
    ),
    "LossIncreaseScore: cumulative": (
        ranked(LossIncreaseScore((X, Y), mode="cumulative", tolerance=0.2, progress=False)),
        """\
0 keeps 0, 4
3 keeps 1, 2, 3
0.weight 6x2x3x3 -> 2x2x3x3
1.weight 6 -> 2
1.bias 6 -> 2
1.running_mean 6 -> 2
1.running_var 6 -> 2
3.weight 4x6x3x3 -> 3x2x3x3
3.bias 4 -> 3
6.weight 3x16 -> 3x12
parameters 391 -> 136 (34.8%)
MACs 5,280 -> 1,656 (31.4%)""",
    ),
    "MagnitudeScore": (
        ranked(MagnitudeScore()),
        """\
0 keeps 0, 4
3 keeps 1, 2, 3
0.weight 6x2x3x3 -> 2x2x3x3
1.weight 6 -> 2
1.bias 6 -> 2
1.running_mean 6 -> 2
1.running_var 6 -> 2
3.weight 4x6x3x3 -> 3x2x3x3
3.bias 4 -> 3
6.weight 3x16 -> 3x12
parameters 391 -> 136 (34.8%)
MACs 5,280 -> 1,656 (31.4%)""",
    ),
    "MagnitudeScore: lamp": (
        ranked(MagnitudeScore(lamp=True)),
        """\
0 keeps 0, 2, 4
3 keeps 1, 2
0.weight 6x2x3x3 -> 3x2x3x3
1.weight 6 -> 3
1.bias 6 -> 3
1.running_mean 6 -> 3
1.running_var 6 -> 3
3.weight 4x6x3x3 -> 2x3x3x3
3.bias 4 -> 2
6.weight 3x16 -> 3x8
parameters 391 -> 143 (36.6%)
MACs 5,280 -> 2,208 (41.8%)""",
    ),
    "PruneChannels: a budget": (
        planned(MagnitudeScore(), PruneChannels(params=0.6, scope="global", min_channels=2)),
        """\
0 keeps 0, 2, 3, 4
3 keeps 1, 2, 3
0.weight 6x2x3x3 -> 4x2x3x3
1.weight 6 -> 4
1.bias 6 -> 4
1.running_mean 6 -> 4
1.running_var 6 -> 4
3.weight 4x6x3x3 -> 3x4x3x3
3.bias 4 -> 3
6.weight 3x16 -> 3x12
parameters 391 -> 230 (58.8%)
MACs 5,280 -> 3,240 (61.4%)""",
    ),
    "PruneChannels: each layer, compensated": (
        planned(MagnitudeScore(), PruneChannels(0.5, compensate="least-squares", data=waves(200, 2, 4, 4))),
        COMPENSATED,
    ),
    "BlockInfluenceScore": (
        planned(BlockInfluenceScore(X), RemoveBlocks(count=1)),
        """\
1 removed
parameters 213 -> 175 (82.2%)
MACs 3,648 -> 2,496 (68.4%)""",
    ),
    "Compensate": (
        planned(MagnitudeScore(), PruneChannels(0.5), Compensate("least-squares", waves(200, 2, 4, 4))),
        COMPENSATED,
    ),
    "PruneChannels: twice": (
        planned(MagnitudeScore(), PruneChannels({"0": 0.5}), MagnitudeScore(), PruneChannels({"3": 0.25})),
        """\
0 keeps 0, 2, 4
3 keeps 1, 2, 3
0.weight 6x2x3x3 -> 3x2x3x3
1.weight 6 -> 3
1.bias 6 -> 3
1.running_mean 6 -> 3
1.running_var 6 -> 3
3.weight 4x6x3x3 -> 3x3x3x3
3.bias 4 -> 3
6.weight 3x16 -> 3x12
parameters 391 -> 183 (46.8%)
MACs 5,280 -> 2,448 (46.4%)""",
    ),
    "RandomScore": (
        ranked(RandomScore(seed=3)),
        """\
0 keeps 2, 4
3 keeps 0, 1, 3
0.weight 6x2x3x3 -> 2x2x3x3
1.weight 6 -> 2
1.bias 6 -> 2
1.running_mean 6 -> 2
1.running_var 6 -> 2
3.weight 4x6x3x3 -> 3x2x3x3
3.bias 4 -> 3
6.weight 3x16 -> 3x12
parameters 391 -> 136 (34.8%)
MACs 5,280 -> 1,656 (31.4%)""",
    ),
    "ReconstructionScore": (
        ranked(ReconstructionScore(X)),
        """\
0 keeps 2, 5
3 keeps 0, 2, 3
0.weight 6x2x3x3 -> 2x2x3x3
1.weight 6 -> 2
1.bias 6 -> 2
1.running_mean 6 -> 2
1.running_var 6 -> 2
3.weight 4x6x3x3 -> 3x2x3x3
3.bias 4 -> 3
6.weight 3x16 -> 3x12
parameters 391 -> 136 (34.8%)
MACs 5,280 -> 1,656 (31.4%)""",
    ),
    "RemoveBlocks": (
        planned(RemoveBlocks(blocks=["0", "2"])),
        """\
0 removed
2 removed
parameters 213 -> 137 (64.3%)
MACs 3,648 -> 1,344 (36.8%)""",
    ),
    "SoftPruning": (
        softly,
        """\
0 keeps 0, 2, 4
3 keeps 1, 2
0.weight 6x2x3x3 -> 3x2x3x3
1.weight 6 -> 3
1.bias 6 -> 3
1.running_mean 6 -> 3
1.running_var 6 -> 3
3.weight 4x6x3x3 -> 2x3x3x3
3.bias 4 -> 2
6.weight 3x16 -> 3x8
parameters 391 -> 143 (36.6%)
MACs 5,280 -> 2,208 (41.8%)""",
    ),
    "TaylorScore": (
        ranked(TaylorScore((X, Y))),
        """\
0 keeps 2, 4
3 keeps 1, 2, 3
0.weight 6x2x3x3 -> 2x2x3x3
1.weight 6 -> 2
1.bias 6 -> 2
1.running_mean 6 -> 2
1.running_var 6 -> 2
3.weight 4x6x3x3 -> 3x2x3x3
3.bias 4 -> 3
6.weight 3x16 -> 3x12
parameters 391 -> 136 (34.8%)
MACs 5,280 -> 1,656 (31.4%)""",
    ),
    "PlantChannels": (
        planned(PlantChannels({"0": 2})),
        """\
0 keeps 0, 1, 2, 3, 4, 5, New('he', seed=0), New('he', seed=0)
0.weight 6x2x3x3 -> 8x2x3x3
1.weight 6 -> 8
1.bias 6 -> 8
1.running_mean 6 -> 8
1.running_var 6 -> 8
3.weight 4x6x3x3 -> 4x8x3x3
parameters 391 -> 503 (128.6%)
MACs 5,280 -> 7,008 (132.7%)""",
    ),
    "GradMax": (
        planned(PlantChannels({"0": 2}), GradMax((X, Y))),
        """\
0 keeps 0, 1, 2, 3, 4, 5, New('he', seed=5), New('he', seed=7)
0.weight 6x2x3x3 -> 8x2x3x3
1.weight 6 -> 8
1.bias 6 -> 8
1.running_mean 6 -> 8
1.running_var 6 -> 8
3.weight 4x6x3x3 -> 4x8x3x3
parameters 391 -> 503 (128.6%)
MACs 5,280 -> 7,008 (132.7%)""",
    ),
    "WidenChannels": (
        planned(WidenChannels(1.34)),
        """\
0 keeps Copy(0, share=0.5), 1, 2, 3, 4, Copy(5, share=0.5), Copy(0, share=0.5), Copy(5, share=0.5)
3 keeps 0, Copy(1, share=0.5), 2, 3, Copy(1, share=0.5)
0.weight 6x2x3x3 -> 8x2x3x3
1.weight 6 -> 8
1.bias 6 -> 8
1.running_mean 6 -> 8
1.running_var 6 -> 8
3.weight 4x6x3x3 -> 5x8x3x3
3.bias 4 -> 5
6.weight 3x16 -> 3x20
parameters 391 -> 588 (150.4%)
MACs 5,280 -> 7,608 (144.1%)""",
    ),
}


def effect(edit: netsurgery.Edit) -> str:
    kept = [f"{name} keeps {', '.join(map(str, units))}" for name, units in edit.keep.items()]
    return "\n".join([*kept, edit.diff()])


@pytest.mark.parametrize("name", GOLDEN)
def test_effect(name: str) -> None:
    plan, text = GOLDEN[name]
    model = NETWORKS.get(name, network)()
    edit = plan(model)
    assert effect(edit) == text
    assert netsurgery.verify(model, netsurgery.rewrite(model, edit), edit, (X[:2],)) < 1e-12


def test_every_pass_has_one() -> None:
    public = {name for name, one in vars(passes).items() if inspect.isclass(one) and issubclass(one, netsurgery.Pass)}
    assert public and {*public, "SoftPruning"} == {name.partition(":")[0] for name in GOLDEN}

"""Distillation against its formula in float64; hints, their layers and hooks; and what is refused."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from netsurgery.errors import InputError
from netsurgery.passes import Distillation


def draw(*shape: int, seed: int = 0, scale: float = 3.0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * scale


def labels(*shape: int, classes: int = 5, seed: int = 9) -> Tensor:
    return torch.randint(classes, shape, generator=torch.Generator().manual_seed(seed))


def formula(own: Tensor, wanted: Tensor, targets: Tensor | None, temperature: float, alpha: float) -> Tensor:
    """The loss of logits ``(positions, classes)``, position by position."""
    entropies, divergences = [], []
    for i in range(len(own)):
        if targets is not None and targets[i] == -100:
            continue
        if targets is not None:
            entropies.append(own[i].logsumexp(0) - own[i, targets[i]])
        p, q = ((t[i] / temperature).exp() / (t[i] / temperature).exp().sum() for t in (wanted, own))
        divergences.append((p * (p / q).log()).sum())
    hard = (1 - alpha) * torch.stack(entropies).mean() if entropies else 0
    return hard + alpha * temperature**2 * torch.stack(divergences).mean()


def assert_same(found: Tensor, wanted: Tensor, own: Tensor, **bounds: float) -> None:
    """Values and gradients."""
    torch.testing.assert_close(found, wanted, **bounds)
    one, other = (torch.autograd.grad(loss, own, retain_graph=True)[0] for loss in (found, wanted))
    torch.testing.assert_close(one, other, **bounds)
    assert float(one.abs().max()) > 0


@pytest.mark.parametrize(("temperature", "alpha"), [(4, 0.5), (1, 1), (2.5, 0.9), (0.5, 0), (20, 0.1)])
def test_the_formula(temperature: float, alpha: float) -> None:
    own, wanted, y = draw(7, 5).requires_grad_(), draw(7, 5, seed=1), labels(7)
    found = Distillation(temperature, alpha)(own, wanted, y)
    assert found.shape == () and found.dtype == torch.float64
    assert_same(found, formula(own, wanted, y, temperature, alpha), own)


def test_ignored_labels_are_left_out_of_both_terms() -> None:
    own, wanted, y = draw(7, 5).requires_grad_(), draw(7, 5, seed=1), labels(7)
    y[[0, 4]] = -100
    found = Distillation(3, 0.4)(own, wanted, y)
    assert_same(found, formula(own, wanted, y, 3, 0.4), own)
    assert not torch.autograd.grad(found, own)[0][[0, 4]].any()
    none = Distillation()(own, wanted, torch.full((7,), -100))
    assert none.item() == 0 and not torch.autograd.grad(none, own)[0].any()


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.int32])
def test_labels_of_other_integers(dtype: torch.dtype) -> None:
    own, wanted, y = draw(7, 200), draw(7, 200, seed=1), labels(7)
    y[0] = 156 if dtype == torch.uint8 else -100  # what -100 is in eight bits without a sign
    torch.testing.assert_close(Distillation()(own, wanted, y.to(dtype)), formula(own, wanted, y, 4, 0.5))


@pytest.mark.parametrize("place", [1, -1])
def test_more_dimensions(place: int) -> None:
    own, wanted, y = draw(2, 3, 4, 5).requires_grad_(), draw(2, 3, 4, 5, seed=1), labels(2, 3, 4)
    y[0, 1, 2] = y[1, 0, 0] = -100
    pair = own.movedim(-1, place), wanted.movedim(-1, place)
    expected = formula(own.reshape(-1, 5), wanted.reshape(-1, 5), y.flatten(), 4, 0.5)
    assert_same(Distillation()(*pair, y), expected, own)
    assert_same(Distillation(dim=place)(*pair, y), expected, own)
    assert_same(Distillation(dim=place)(*pair), formula(own.reshape(-1, 5), wanted.reshape(-1, 5), None, 4, 0.5), own)


def test_without_targets_the_teachers_term_keeps_its_share() -> None:
    own, wanted = draw(7, 5).requires_grad_(), draw(7, 5, seed=1)
    assert_same(Distillation(2, 0.3)(own, wanted), formula(own, wanted, None, 2, 0.3), own)
    batchmean = F.kl_div(own.log_softmax(1), wanted.log_softmax(1), reduction="batchmean", log_target=True)
    assert_same(Distillation(1, 1)(own, wanted), batchmean, own)


def test_gradients_hardly_depend_on_high_temperatures() -> None:
    """Hinton et al., equation 4: at high T they tend to the difference of centred logits, by the number of classes."""
    own, wanted = draw(1, 5, scale=1).requires_grad_(), draw(1, 5, seed=1, scale=1)
    limit = ((own - own.mean(1, keepdim=True)) - (wanted - wanted.mean(1, keepdim=True))) / 5
    for temperature in (1e2, 1e3):
        found = torch.autograd.grad(Distillation(temperature, 1)(own, wanted), own)[0]
        torch.testing.assert_close(found, limit.detach(), rtol=5 / temperature, atol=5 / temperature)


def test_nothing_flows_into_the_teacher() -> None:
    own, wanted = draw(7, 5).requires_grad_(), draw(7, 5, seed=1).requires_grad_()
    Distillation()(own, wanted, labels(7)).backward()
    assert own.grad is not None and wanted.grad is None


class Named:
    """As Hugging Face returns logits."""

    def __init__(self, logits: Tensor):
        self.logits = logits


def test_outputs_that_hold_logits() -> None:
    own, wanted, y = draw(7, 5), draw(7, 5, seed=1), labels(7)
    plain = Distillation()(own, wanted, y)
    assert torch.equal(Distillation()(Named(own), {"logits": wanted, "loss": None}, y), plain)


def test_a_loss_of_ones_own() -> None:
    own, wanted, y = draw(7, 5).requires_grad_(), draw(7, 5, seed=1), labels(7)
    smooth = nn.CrossEntropyLoss(label_smoothing=0.1, ignore_index=2)
    assert 2 in y
    teacher = formula(own, wanted, torch.where(y == 2, -100, y), 4, 1)
    assert_same(Distillation(alpha=0.25, loss=smooth)(own, wanted, y), 0.75 * smooth(own, y) + 0.25 * teacher, own)
    each = Distillation(alpha=0.25, loss=lambda t, y: F.cross_entropy(t, y, reduction="none"))
    assert_same(each(own, wanted, y), Distillation(alpha=0.25)(own, wanted, y), own)
    shares = draw(7, 5, seed=2).softmax(1)
    mixed = 0.5 * F.cross_entropy(own, shares) + 0.5 * formula(own, wanted, None, 4, 1)
    assert_same(Distillation(loss=F.cross_entropy)(own, wanted, shares), mixed, own)


def test_a_losss_class_weights_move_with_it() -> None:
    distillation = Distillation(loss=nn.CrossEntropyLoss(weight=torch.ones(5))).double()
    own, wanted, y = draw(7, 5), draw(7, 5, seed=1), labels(7)
    torch.testing.assert_close(distillation(own, wanted, y), Distillation()(own, wanted, y))


def test_classes_that_both_mask_have_no_weight() -> None:
    own, wanted, y = draw(7, 5).requires_grad_(), draw(7, 5, seed=1), labels(7)
    mask = torch.tensor([0, 0, 0, 0, 0, -math.inf, -math.inf])
    wide = (torch.cat([t, torch.zeros(7, 2)], 1) + mask for t in (own, wanted))
    assert_same(Distillation()(*wide, y), Distillation()(own, wanted, y), own)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_low_precision(dtype: torch.dtype) -> None:
    """Large logits divided by a small temperature, and sums over many classes."""
    own, wanted = (draw(4, 3000, seed=seed, scale=9000).to(dtype) for seed in (0, 1))
    own.requires_grad_()
    found, y = Distillation(0.1, 0.5)(own, wanted, labels(4)), labels(4)
    expected = Distillation(0.1, 0.5)(own.double(), wanted.double(), y)
    assert found.dtype == torch.float32 and bool(found.isfinite())
    assert_same(found, expected.float(), own, rtol=1e-3, atol=1e-6)


def test_autocast() -> None:
    student, teacher = nets()
    x, y = pictures(), labels(8, classes=3)
    with hinted(student, teacher, project=True) as distillation:
        exact = distillation(student(x), teacher(x), y)
        with torch.autocast("cpu", torch.bfloat16):
            found = distillation(student(x), teacher(x), y)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, exact, rtol=2e-2, atol=0)


# Hints --------------------------------------------------------------------------------------------------------------


class Net(nn.Module):
    def __init__(self, width: int, stride: int = 1):
        super().__init__()
        self.stem = nn.Conv2d(3, width, 3, padding=1)
        self.stages = nn.Sequential(nn.Conv2d(width, width, 3, stride, padding=1), nn.ReLU())
        self.head = nn.Linear(width, 3)

    def forward(self, x: Tensor) -> Tensor:
        head: Tensor = self.head(self.stages(self.stem(x)).mean((2, 3)))
        return head

    def features(self, x: Tensor) -> Tensor:
        found: Tensor = self.stages(self.stem(x))
        return found


class InPlace(nn.Module):
    """Two layers that write into what the one before gave."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.norm, self.relu = nn.Linear(3, 4), nn.LayerNorm(4), nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        twice = self.layer(x)
        twice *= 2
        found: Tensor = self.relu(self.norm(twice))
        return found


def nets(width: int = 4, wide: int = 6, stride: int = 2) -> tuple[Net, Net]:
    torch.manual_seed(0)
    return Net(width), Net(wide, stride)


def pictures() -> Tensor:
    return draw(8, 3, 6, 6, scale=1).float()


def hinted(student: nn.Module, teacher: nn.Module, *, given: bool = True, **more: Any) -> Distillation:
    hints = more.pop("hints", {"stages": "stages"})
    example = {"example_inputs": pictures()} if given else {}
    return Distillation(hints=hints, student=student, teacher=teacher, **example, **more)


def hooks(*networks: nn.Module) -> int:
    modules = [module for network in networks for module in network.modules()]
    return sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in modules)


def seen(distillation: Distillation) -> int:
    assert distillation.hints is not None
    return sum(len(side.seen) for side in distillation.hints.sides)


def gradients(loss: Tensor, *modules: nn.Module) -> list[Tensor]:
    parameters = [parameter for module in modules for parameter in module.parameters()]
    return list(torch.autograd.grad(loss, parameters, materialize_grads=True))


@pytest.mark.parametrize("given", [True, False])
def test_hints_of_one_shape(given: bool) -> None:
    student, teacher = (net.double() for net in nets(4, 4, 1))
    x, y = pictures().double(), labels(8, classes=3)
    example = {"example_inputs": x} if given else {}
    with hinted(student, teacher, given=False, hint_weight=0.7, **example) as distillation:
        found = distillation(student(x), teacher(x), y)
    assert not [*distillation.parameters()]
    apart = (student.features(x) - teacher.features(x).detach()).square().mean()
    expected = Distillation()(student(x), teacher(x), y) + 0.7 * apart
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(gradients(found, student, teacher), gradients(expected, student, teacher))


def test_normalised_hints_do_not_depend_on_the_scale() -> None:
    student, teacher = (net.double() for net in nets(4, 4, 1))
    x, losses = pictures().double(), []
    for factor in (1, 50):
        with torch.no_grad():
            for parameter in teacher.stages[0].parameters():
                parameter.mul_(factor)
        with hinted(student, teacher, given=False, normalize=True, alpha=0) as distillation:
            losses.append(distillation(student(x), teacher(x)))
    own, wanted = (net.features(x) for net in (student, teacher))
    rms = [t.square().mean((1, 2, 3), keepdim=True).sqrt() for t in (own, wanted)]
    torch.testing.assert_close(losses, [(own / rms[0] - wanted / rms[1]).square().mean()] * 2)
    dead = torch.zeros(2, 4, requires_grad=True)
    with Distillation(hints={"": ""}, student=nn.Identity(), teacher=(one := nn.Identity()), normalize=True) as d:
        d.hints.sides[0].seen[""] = (1, dead)  # type: ignore[union-attr, operator]
        one(torch.ones(2, 4))
        assert bool(torch.autograd.grad(d(dead, torch.ones(2, 4)), dead)[0].isfinite().all())


def test_projection_and_pooling() -> None:
    student, teacher = (net.double() for net in nets())
    x, y = pictures().double(), labels(8, classes=3)
    distillation = hinted(student, teacher, given=False, project=True, example_inputs=x)
    names = {name: tuple(parameter.shape) for name, parameter in distillation.named_parameters()}
    assert names == {"hints.layers.0.weight": (6, 4, 1, 1), "hints.layers.0.bias": (6,)}
    found = distillation(student(x), teacher(x), y)
    weight, bias = distillation.parameters()
    own = torch.einsum("oi,nihw->nohw", weight.flatten(1), student.features(x)) + bias[:, None, None]
    own = own.unflatten(2, (3, 2)).unflatten(4, (3, 2)).mean((3, 5))
    apart = (own - teacher.features(x).detach()).square().mean()
    expected = Distillation()(student(x), teacher(x), y) + apart
    torch.testing.assert_close(found, expected)
    modules = student, teacher, distillation
    torch.testing.assert_close(gradients(found, *modules), gradients(expected, *modules))


def test_each_size_is_averaged_to_the_smaller() -> None:
    """The teacher's height and the student's width are halved; channels are the same, so nothing is learnt."""
    x = draw(8, 3, 6, 6, scale=1)
    nets = [nn.Sequential(nn.AvgPool2d(size), nn.Flatten(), nn.Linear(54, 2)).double() for size in ((2, 1), (1, 2))]
    with hinted(*nets, hints={"0": "0"}, given=False, alpha=0, project=True, example_inputs=x) as distillation:
        found = distillation(*(net(x) for net in nets))
    assert not [*distillation.parameters()]
    torch.testing.assert_close(found, torch.zeros_like(found))  # both are means of 2x2
    with hinted(*nets, hints={"0": "0"}, given=False, alpha=0) as distillation, pytest.raises(InputError, match="6, 3"):
        distillation(*(net(x) for net in nets))


@pytest.mark.parametrize("shape", [(2, 7), (2, 5, 7), (2, 7, 4, 4), (2, 7, 2, 4, 4)])
def test_layers_by_dimensions(shape: tuple[int, ...]) -> None:
    kinds = {2: nn.Linear, 3: nn.Linear, 4: nn.Conv2d, 5: nn.Conv3d}

    def net(width: int) -> nn.Sequential:
        layer = nn.Linear(7, width) if len(shape) < 4 else kinds[len(shape)](7, width, 1)
        return nn.Sequential(layer, nn.Flatten(), nn.LazyLinear(3))

    student, teacher, x = net(4), net(6), torch.ones(shape)
    student(x), teacher(x)
    with hinted(student, teacher, hints={"0": "0"}, given=False, project=True, example_inputs=x) as distillation:
        assert type(distillation.hints.layers[0]) is kinds[len(shape)]  # type: ignore[union-attr, index]
        distillation(student(x), teacher(x)).backward()
    assert all(parameter.grad is not None for parameter in distillation.parameters())


def test_training_with_hints_brings_features_nearer() -> None:
    student, teacher = nets()
    x = pictures()
    with hinted(student, teacher, project=True) as distillation:
        optimizer = torch.optim.Adam([*student.parameters(), *distillation.parameters()], 1e-2)
        losses = []
        for _ in range(60):
            optimizer.zero_grad()
            with torch.inference_mode():
                wanted = teacher(x)
            loss = distillation(student(x), wanted)
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]


def test_hooks_go_and_nothing_is_kept() -> None:
    student, teacher = nets()
    x = pictures()
    with hinted(student, teacher, project=True) as distillation:
        assert hooks(student, teacher) == 4
        assert seen(distillation) == 0
        distillation(student(x), teacher(x))
        assert seen(distillation) == 0
        student(x)
        assert seen(distillation) == 1
    assert hooks(student, teacher) == 0 and seen(distillation) == 0
    distillation.close()  # once more
    student(x)
    assert seen(distillation) == 0


def test_a_run_in_between_and_a_copy_change_nothing() -> None:
    student, teacher = nets()
    x = pictures()
    with hinted(student, teacher, project=True) as distillation:
        expected = distillation(student(x), teacher(x))
        student(x + 1), teacher(x + 1)  # a look at other data, of which no loss is taken
        average = torch.optim.swa_utils.AveragedModel(student)
        outputs = student(x), teacher(x)
        average(x + 2)
        assert torch.equal(distillation(*outputs), expected)
        assert copy.deepcopy(teacher)(x).shape == (8, 3)


@pytest.mark.parametrize("path", ["layer", "norm"])
def test_features_are_those_before_others_write_into_them(path: str) -> None:
    torch.manual_seed(0)
    student, teacher, x = InPlace(), InPlace(), draw(6, 3).float()
    with hinted(student, teacher, hints={path: path}, given=False, alpha=0) as distillation:
        found = distillation(student(x), teacher(x))
    own, wanted = (net.layer(x) if path == "layer" else net.norm(2 * net.layer(x)) for net in (student, teacher))
    expected = (own - wanted.detach()).square().mean()
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(gradients(found, student), gradients(expected, student))


def test_building_it_leaves_the_networks_as_they_were() -> None:
    torch.manual_seed(0)
    student, teacher = (nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Dropout()) for _ in range(2))
    teacher[1].eval()
    before = [copy.deepcopy(net.state_dict()) for net in (student, teacher)]
    state = torch.get_rng_state()
    with hinted(student, teacher, hints={"1": "1"}, given=False, example_inputs=(torch.ones(2, 3),)):
        after = [net.state_dict() for net in (student, teacher)]
    assert [module.training for net in (student, teacher) for module in net] == [True] * 4 + [False, True]
    assert all(torch.equal(one[name], other[name]) for one, other in zip(before, after, strict=True) for name in one)
    assert torch.equal(torch.get_rng_state(), state)


def test_layers_that_return_tuples() -> None:
    torch.manual_seed(0)
    x = draw(2, 5, 8, scale=1).float()

    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention = nn.MultiheadAttention(8, 2, batch_first=True)

        def forward(self, x: Tensor) -> Tensor:
            found: Tensor = self.attention(x, x, x)[0].mean(1)
            return found

    student, teacher = Attention(), Attention()
    with hinted(student, teacher, hints={"attention": "attention"}, given=False, alpha=0) as distillation:
        found = distillation(student(x), teacher(x))
    pair = [net.attention(x, x, x)[0] for net in (student, teacher)]
    torch.testing.assert_close(found, (pair[0] - pair[1]).square().mean())


@pytest.fixture
def fresh() -> Iterator[None]:
    torch.compiler.reset()
    yield
    torch.compiler.reset()


@pytest.mark.usefixtures("fresh")
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # the compiler looks at it
@pytest.mark.filterwarnings("ignore:Guards may run slower on Python")
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@pytest.mark.parametrize("whole", [True, False])
def test_compiled(backend: str, whole: bool) -> None:
    """The whole step, or the networks and the loss each by itself."""
    student, teacher = nets()
    x, y = pictures(), labels(8, classes=3)
    y[0] = -100
    with hinted(student, teacher, project=True) as distillation:
        expected = gradients(distillation(student(x), teacher(x), y), student, distillation)
        if whole:

            @torch.compile(backend=backend)
            def step(x: Tensor, y: Tensor) -> Tensor:
                found: Tensor = distillation(student(x), teacher(x), y)
                return found

            loss = step
        else:
            own, wanted, criterion = (torch.compile(one, backend=backend) for one in (student, teacher, distillation))

            def loss(x: Tensor, y: Tensor) -> Tensor:
                found: Tensor = criterion(own(x), wanted(x), y)
                return found

        for _ in range(3):
            torch.testing.assert_close(gradients(loss(x, y), student, distillation), expected)
            assert seen(distillation) == 0


@pytest.mark.usefixtures("fresh")
@pytest.mark.filterwarnings("ignore:Guards may run slower on Python")
def test_compiled_in_one_graph() -> None:
    own, wanted, y = draw(7, 5), draw(7, 5, seed=1), labels(7)
    compiled = torch.compile(Distillation(), backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(own, wanted, y), formula(own, wanted, y, 4, 0.5))


# What is refused ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"temperature": 0}, "Distillation(temperature=0): expected a number above 0"),
        ({"temperature": -1.0}, "Distillation(temperature=-1.0): expected a number above 0"),
        ({"temperature": math.nan}, "Distillation(temperature=nan): expected a number above 0"),
        ({"temperature": "4"}, "Distillation(temperature='4'): expected a number above 0"),
        ({"alpha": 1.5}, "Distillation(alpha=1.5): expected the share of the teacher, a number in [0, 1]"),
        ({"alpha": -0.1}, "Distillation(alpha=-0.1): expected the share of the teacher, a number in [0, 1]"),
        ({"hint_weight": -1}, "Distillation(hint_weight=-1): expected a number of at least 0"),
        (
            {"hints": {"stem": "stem"}},
            "Distillation(hints=...): pass student= and teacher=, whose modules the hints name",
        ),
        ({"hints": ["stem"]}, "Distillation(hints=['stem']): expected a dictionary {student's module: teacher's}"),
    ],
)
def test_arguments_out_of_range(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError) as caught:
        Distillation(**arguments)
    assert str(caught.value) == message


X5 = (torch.zeros(8, 5), torch.zeros(8, 5))
Y = torch.zeros(8, dtype=torch.long)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (
            (torch.zeros(8, 10), torch.zeros(8, 1000), Y),
            "logits are (8, 10) of the student and (8, 1000) of the teacher: 10 classes and 1000; both must have the "
            "same ones",
        ),
        (
            (torch.zeros(8, 10), torch.zeros(4, 10), Y),
            "logits are (8, 10) of the student and (4, 10) of the teacher: run both on the same batch",
        ),
        (
            (torch.zeros(8, 1), torch.zeros(8, 1), Y),
            "logits are (8, 1) of the student and (8, 1) of the teacher: of one class there is nothing to learn",
        ),
        (
            (X5, X5[1], Y),
            "the student's output is tuple: pass logits (n, classes, ...), or what holds such as `logits`",
        ),
        (
            (X5[0], X5[1].argmax(1), Y),
            "the teacher's output is torch.int64 (8,): pass logits (n, classes, ...), or what holds such as `logits`",
        ),
        (
            (*X5, Y.float()),
            "targets are torch.float32 (8,), no class indices (8,): pass such, or loss=f(logits, targets)",
        ),
        (
            (*X5, Y[:4]),
            "targets are torch.int64 (4,), no class indices (8,): pass such, or loss=f(logits, targets)",
        ),
        ((*X5, [0] * 8), "targets are list, no class indices (8,): pass such, or loss=f(logits, targets)"),
        ((*X5, Y + 5), "targets go from 5 to 5, no class indices where there are 5 classes"),
        ((*X5, Y - 1), "targets go from -1 to -1, no class indices where there are 5 classes"),
        (
            (torch.zeros(2, 4, 4), torch.zeros(2, 4, 4), torch.zeros(2, 4, dtype=torch.long)),
            "logits are (2, 4, 4) and targets torch.int64 (2, 4), which does not say where the classes are: "
            "pass dim=1 or dim=-1",
        ),
        (
            (torch.zeros(2, 4, 5), torch.zeros(2, 4, 5)),
            "logits are (2, 4, 5) and targets NoneType, which does not say where the classes are: pass dim=1 or dim=-1",
        ),
    ],
)
def test_outputs_and_targets_that_do_not_fit(given: tuple[Any, ...], message: str) -> None:
    with pytest.raises(InputError) as caught:
        Distillation()(*given)
    assert str(caught.value) == message


def test_nothing_to_learn_and_losses_of_other_shapes() -> None:
    with pytest.raises(InputError) as caught:
        Distillation(alpha=0)(*X5)
    assert str(caught.value) == "Distillation(alpha=0) is the loss of targets alone: pass targets, or a higher alpha"
    with pytest.raises(InputError) as caught:
        Distillation(loss=lambda t, y: t)(*X5, Y)
    message = "the loss of 8 samples is torch.float32 (8, 5): return the mean, or one number for each"
    assert str(caught.value) == message
    for dim in (0, 2, -2):
        with pytest.raises(InputError) as caught:
            Distillation(dim=dim)(*X5, Y)
        assert str(caught.value) == f"Distillation(dim={dim}): no dimension of classes in logits (8, 5)"


@pytest.mark.parametrize(
    ("hints", "more", "message"),
    [
        (
            {"stage": "stages"},
            {},
            "hints: the student Net has no module 'stage'; did you mean stages or stages.1 or stages.0?",
        ),
        ({"stages": "laier"}, {}, "hints: the teacher Net has no module 'laier'"),
        (
            {"stem": "stem", "stages": "stages"},
            {},
            "hint 'stem': 'stem': features are (8, 4, 6, 6) in the student and (8, 6, 6, 6) in the teacher: name "
            "modules whose features have equal shapes, or pass project=True and example_inputs",
        ),
        (
            {"stages": "head"},
            {"project": True},
            "hint 'stages': 'head': features are (8, 4, 6, 6) in the student and (8, 3) in the teacher: no layer fits "
            "these",
        ),
        (
            {"stages": "stages"},
            {"project": True, "example_inputs": None},
            "Distillation(project=True): pass example_inputs=, by which its layers are made",
        ),
    ],
)
def test_hints_that_do_not_fit(hints: dict[str, str], more: dict[str, Any], message: str) -> None:
    student, teacher = nets()
    with pytest.raises(InputError) as caught:
        Distillation(hints=hints, student=student, teacher=teacher, **{"example_inputs": pictures(), **more})
    assert str(caught.value) == message
    assert hooks(student, teacher) == 0


def test_shapes_that_differ_later() -> None:
    student, teacher = nets()
    x = pictures()
    with hinted(student, teacher, given=False) as distillation, pytest.raises(InputError) as caught:
        distillation(student(x), teacher(x))
    assert str(caught.value).startswith(
        "hint 'stages': 'stages': features are (8, 4, 6, 6) in the student and (8, 6, 3, 3) in the teacher: name"
    )
    with hinted(student, teacher, project=True) as distillation, pytest.raises(InputError) as caught:
        distillation(student(x), teacher(x[:4])[[0, 1, 2, 3, 0, 1, 2, 3]])
    assert str(caught.value) == (
        "hint 'stages': 'stages': features are (8, 4, 6, 6) in the student and (4, 6, 3, 3) in the teacher: name "
        "modules whose features have equal shapes"
    )


class Reused(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer, self.unused, self.pair = nn.Linear(3, 3), nn.Linear(3, 3), nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        self.pair({"x": x})
        found: Tensor = self.layer(self.layer(x))
        return found


@pytest.mark.parametrize(
    ("path", "message"),
    [
        (
            "unused",
            "hint: module 'unused' of the student did not run: run student and teacher, as given here, before each "
            "call",
        ),
        (
            "layer",
            "hint: module 'layer' of the student ran 2 times: name one that runs once, since features of one run are "
            "meant",
        ),
        ("pair", "hint: module 'pair' of the student gives dict, not a tensor of floating-point numbers"),
    ],
)
def test_modules_that_give_no_features(path: str, message: str) -> None:
    student, teacher, x = Reused(), Reused(), torch.ones(2, 3)
    with hinted(student, teacher, hints={path: ""}, given=False) as distillation:
        with pytest.raises(InputError) as caught:
            distillation(student(x), teacher(x))
        assert str(caught.value) == message
    with pytest.raises(InputError) as caught:
        hinted(student, teacher, hints={path: ""}, given=False, example_inputs=x)
    assert str(caught.value) == message
    assert hooks(student, teacher) == 0


def test_a_network_that_did_not_run_again() -> None:
    student, teacher = nets()
    x = pictures()
    with hinted(student, teacher, project=True) as distillation:
        wanted = teacher(x)
        distillation(student(x), wanted)
        with pytest.raises(InputError, match="'stages' of the teacher did not run: run student and teacher"):
            distillation(student(x), wanted)


def test_what_print_says() -> None:
    assert repr(Distillation(2, 0.9)) == "Distillation(temperature=2, alpha=0.9, hint_weight=1)"

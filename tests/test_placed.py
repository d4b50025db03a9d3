"""Whether tensors are where they were, and what a penalty does when one is not."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from netsurgery.errors import InputError
from netsurgery.kernels.placed import Placed, widest
from netsurgery.passes import HGSR


def set_data(change: Callable[[Tensor], Tensor]) -> Callable[[list[Tensor]], None]:
    def apply(tensors: list[Tensor]) -> None:
        tensors[1].data = change(tensors[1].data)

    return apply


def replaced(tensors: list[Tensor]) -> None:
    tensors[1] = tensors[1].detach()  # in the same place


CHANGES: dict[str, Callable[[list[Tensor]], None]] = {
    "moved": set_data(torch.clone),
    "moved within its memory": set_data(lambda data: data.new_zeros(5, 4)[1:]),
    "turned": set_data(torch.t),
    "smaller": set_data(lambda data: data[:3]),
    "read as another type": set_data(lambda data: data.view(torch.float16).view(torch.bfloat16)),
    "another object": replaced,
    "another order": list.reverse,
    "one more": lambda tensors: tensors.append(torch.zeros(2, 2)),
}


@pytest.mark.parametrize("change", CHANGES)
def test_what_changed_is_found(change: str) -> None:
    kind = torch.float16 if "type" in change else torch.float32
    tensors: list[Tensor] = [nn.Parameter(torch.randn(4, 4).to(kind)) for _ in range(3)]
    placed = Placed(tensors)
    with torch.no_grad():
        tensors[1].add_(1)  # other numbers in the same place
    assert placed.still(tensors)
    CHANGES[change](tensors)
    assert not placed.still(tensors)
    assert Placed(tensors).still(tensors)


def test_some_that_are_not_there() -> None:
    one, other = torch.zeros(3), torch.zeros(3)
    assert Placed([one, None]).forms != Placed([None, one]).forms
    assert Placed([one, None]).places == Placed([None, one]).places
    assert Placed([one, None]).still([one, None]) and not Placed([one, None]).still([one, other])


def test_the_type_to_add_in() -> None:
    tensors = [torch.zeros(2, dtype=torch.bfloat16), torch.zeros(2)]
    assert widest(tensors) == widest(Placed(tensors)) == torch.float32
    tensors.append(torch.zeros(2, dtype=torch.float64))
    assert widest(tensors) == widest(Placed(tensors)) == torch.float64


def test_a_penalty_keeps_what_it_has_worked_out_until_something_moves() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 2))
    penalty = HGSR(model, grouping="coupled", strength=1.0)
    penalty()
    kept = penalty._placed
    penalty.add_gradient()
    assert penalty._placed is kept and kept is not None and kept.kept
    weight = model[2].weight
    weight.data = weight.data.clone()
    penalty.add_gradient()
    assert penalty._placed is not kept
    kept = penalty._placed
    wanted = HGSR(copy.deepcopy(model), grouping="coupled", strength=1.0)
    for change in (Tensor.t, Tensor.double, Tensor.float):
        for one in (model, wanted._parameters.model):
            one[2].weight.data = change(one[2].weight.data)
            one.zero_grad()
        torch.testing.assert_close(penalty.add_gradient(), wanted())
        assert penalty._placed is not kept
        kept = penalty._placed
        wanted().backward()
        torch.testing.assert_close(weight.grad, wanted._parameters.model[2].weight.grad)
    assert copy.deepcopy(penalty)._placed is None
    weight.data = weight.data[:5]
    with pytest.raises(InputError, match=r"2\.weight had shape \(6, 6\) and has \(5, 6\) now"):
        penalty()


def test_a_weight_that_is_frozen_and_thawed() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 2))
    penalty = HGSR(model, grouping="coupled", strength=1.0)
    weight = model[2].weight
    penalty.add_gradient()
    whole = weight.grad.clone()
    for trained in (False, True, False):
        weight.requires_grad_(trained)
        weight.grad = None
        penalty.add_gradient()
        assert (weight.grad is not None) == trained
        if trained:
            torch.testing.assert_close(weight.grad, whole)
    with torch.no_grad():
        made = torch.zeros(())
    weight.add_(made.requires_grad_())  # in place, out of something that is trained: no leaf from now on
    with pytest.raises(InputError, match=r"2\.weight is computed from other parameters"):
        penalty.add_gradient()

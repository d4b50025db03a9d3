"""Random networks, pruned at random, are exact: float64, to 1e-10."""

import os

import torch
from hypothesis import HealthCheck, given, settings

from oracles import check
from random_networks import Program, build, example, programs

EXAMPLES = int(os.environ.get("NETSURGERY_EXAMPLES", "100"))  # of each of the six themes

exhaustive = settings(
    max_examples=EXAMPLES,
    derandomize=EXAMPLES <= 100,  # beyond these, others every time
    deadline=None,
    database=None,
    print_blob=False,
    suppress_health_check=list(HealthCheck),
)


def run(program: Program) -> float:
    """Check one network; returns the share of its parameters that went."""
    torch.manual_seed(0)
    model, inputs = build(program), example(program)
    _, edit = check(model, inputs, 1e-10, seed=program.seed)
    return 1 - edit.after.params / edit.before.params


@exhaustive
@given(programs("branches"))
def test_branches(program):
    run(program)


@exhaustive
@given(programs("joins"))
def test_joins(program):
    run(program)


@exhaustive
@given(programs("groups"))
def test_groups(program):
    run(program)


@exhaustive
@given(programs("layouts"))
def test_layouts(program):
    run(program)


@exhaustive
@given(programs("code"))
def test_code(program):
    run(program)


@exhaustive
@given(programs("everything"))
def test_everything(program):
    run(program)

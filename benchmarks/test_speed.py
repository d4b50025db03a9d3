"""Surgery beside the peer's: `python -m pytest benchmarks/test_speed.py --benchmark-group-by=param:name`."""

import copy
from collections.abc import Callable

import pytest
from models import COMPARED, build, image, parameters, prune_ours, prune_peer
from pytest_benchmark.fixture import BenchmarkFixture
from torch import Tensor, nn

SURGERIES = {"netsurgery": prune_ours, "torch-pruning": prune_peer}


@pytest.mark.filterwarnings("ignore")  # the peer's
@pytest.mark.parametrize("tool", SURGERIES)
@pytest.mark.parametrize("name", COMPARED)
def test_trace_plan_and_rewrite(benchmark: BenchmarkFixture, name: str, tool: str) -> None:
    surgery: Callable[[nn.Module, Tensor], nn.Module] = SURGERIES[tool]
    model, x = build(name), image(name)

    def patient() -> tuple[tuple[nn.Module, Tensor], dict[str, object]]:
        return (copy.deepcopy(model), x), {}

    small = benchmark.pedantic(surgery, setup=patient, rounds=5, warmup_rounds=1)
    benchmark.extra_info["parameters"] = parameters(small)
    assert parameters(small) < 0.6 * parameters(model)

"""Whatever a model holds beside tensors, and whatever it is wrapped in: surgery works, or one sentence refuses it."""

from __future__ import annotations

import threading
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

import netsurgery
from netsurgery.errors import NetsurgeryError, TraceError
from netsurgery.passes import (
    BatchNormScore,
    GeometricMedianScore,
    HGSRScore,
    LossIncreaseScore,
    MagnitudeScore,
    PruneChannels,
    RandomScore,
    TaylorScore,
)
from oracles import check

X = torch.randn(2, 3, 6, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
HALF = [RandomScore(), PruneChannels(0.5)]


class Net(nn.Module):
    """Two convolutions, what is done between them, and whatever else the module holds."""

    def __init__(self, run: Callable[[Any, Tensor], Tensor] = lambda net, x: x.relu(), **held: Any):
        super().__init__()
        torch.manual_seed(0)
        self.run = run
        self.a, self.b = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 4, 1)
        for name, value in held.items():
            setattr(self, name, value)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.run(self, self.a(x)))


def exact(model: nn.Module, x: Tensor = X) -> nn.Module:
    """The model made smaller: its middle shrinks, and every removal is exact."""
    small, edit = check(model.double().eval(), (x,), 1e-10, share=0.5)
    assert any(member.parameter.endswith("a.weight") for name in edit.keep for member in edit.network[name].members)
    return small


# What modules hold -----------------------------------------------------------------------------------------------


class Table:
    """Like a table of pandas: it has no truth value, and is compared element by element."""

    def __bool__(self) -> bool:
        raise ValueError("the truth value of a table is ambiguous")

    def __eq__(self, other: object) -> Any:
        return np.arange(3) == other

    __hash__ = None  # type: ignore[assignment]


@pytest.mark.parametrize(
    "held",
    [
        np.arange(6.0).reshape(3, 2),
        np.zeros(0),
        np.array(["a", "b"]),
        np.int64(8),
        [np.eye(2), np.eye(3)],
        {"anchors": np.arange(9.0).reshape(3, 3)},
        Table(),
        [Table()],
    ],
    ids=lambda held: type(held).__name__,
)
def test_arrays_and_what_has_no_truth_value(held: Any) -> None:
    small = exact(Net(anchors=held))
    assert type(small.anchors) is type(held)


@pytest.mark.parametrize("name", ["in_channels", "out_channels", "groups", "num_features", "normalized_shape"])
def test_arrays_under_the_names_of_sizes(name: str) -> None:
    sizes = np.array([8, 8])
    small = exact(Net(lambda net, x: F.group_norm(x, 4), **{name: sizes}))
    assert np.array_equal(getattr(small, name), sizes)


def by_array(net: Any, x: Tensor) -> Tensor:
    return x * torch.from_numpy(net.scale) + torch.tensor(net.shift)


def test_arrays_that_the_code_reads() -> None:
    exact(Net(by_array, scale=np.full((1, 1, 1), 0.5), shift=np.float64(2)))


def test_what_cannot_be_copied_is_named() -> None:
    with pytest.raises(TraceError, match=r"attribute 'lock' of module 'Net' cannot be copied: .*lock"):
        netsurgery.trace(Net(lock=threading.Lock()), (X.float(),))


class Uncopied:
    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        raise AssertionError("one of these is enough")


def test_what_refuses_to_be_copied_is_named() -> None:
    with pytest.raises(TraceError, match=r"attribute 'one' of module 'Net' cannot be copied: one of these is enough"):
        netsurgery.trace(Net(one=Uncopied()), (X.float(),))


# Scripted functions and modules ------------------------------------------------------------------------------------


def scripted(function: Any) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch.jit.script is deprecated
        return torch.jit.script(function)


def _swish(x: Tensor) -> Tensor:
    return x * torch.sigmoid(x)


def _hard(x: Tensor, low: float, high: float) -> Tensor:
    if low < high:
        x = x.clamp(low, high)
    return x


def _fused_add(x: Tensor, bias: Tensor, gate: Tensor) -> Tensor:
    return torch.tanh(x + bias) * gate.mean(dim=[2, 3], keepdim=True)


def _in_halves(x: Tensor) -> Tensor:
    first, second = x.chunk(2, dim=1)
    return torch.cat([first.relu(), second], dim=1)


def _of_last_axis(x: Tensor) -> Tensor:
    return x.permute(0, 2, 3, 1).softmax(dim=-1).permute(0, 3, 1, 2).contiguous()


swish, hard, fused_add = scripted(_swish), scripted(_hard), scripted(_fused_add)
in_halves, of_last_axis = scripted(_in_halves), scripted(_of_last_axis)


@pytest.mark.parametrize(
    "run",
    [
        lambda net, x: swish(x),
        lambda net, x: hard(x, -0.5, 0.5),
        lambda net, x: fused_add(x, net.a.bias.view(1, -1, 1, 1), x),
        lambda net, x: in_halves(x),
        lambda net, x: of_last_axis(x),
        lambda net, x: swish(swish(x)) + hard(x, 0.0, 1.0),
    ],
)
def test_scripted_functions_are_seen_through(run: Any) -> None:
    exact(Net(run))


def test_a_scripted_function_that_a_module_holds() -> None:
    small = exact(Net(lambda net, x: net.act(x), act=swish))
    assert small.act is swish


class Hard(nn.Module):
    """Its forward must be rewritten, with a scripted function in it."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(6, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(swish(self.a(x).view(-1, 8)).view(x.shape[0], 3, 6, 8))


def test_a_scripted_function_in_code_that_hard_codes_a_size() -> None:
    exact(nn.Sequential(Hard()))


def _by_value(x: Tensor) -> Tensor:
    if bool(x.mean() < 1e9):
        x = x.relu()
    return x


by_value = scripted(_by_value)


def test_a_scripted_function_that_looks_at_values() -> None:
    exact(Net(lambda net, x: by_value(x)))


class Whole(nn.Module):
    """The outermost forward hard-codes a size around a scripted function that looks at values."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(6, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(by_value(self.a(x)).view(2, 3, 6, 8))


def test_a_reason_never_has_an_empty_path() -> None:
    reasons = [group.locked for group in netsurgery.trace(Whole(), (X.float(),)).groups if group.locked]
    assert reasons and not any("  " in why or why.endswith((" of", " in")) for why in reasons)


@pytest.mark.parametrize("where", ["the model", "module 'b'"])
def test_scripted_modules_are_refused(where: str) -> None:
    model: nn.Module = Net()
    if where == "the model":
        model = scripted(nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 4, 1)))
    else:
        model.b = scripted(nn.Conv2d(8, 4, 1))
    refused(model, rf"{where} is scripted or traced, .*: pass the original model")


def test_a_model_recorded_by_torch_jit_is_refused() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = torch.jit.trace(Net(), X.float())
    refused(model, "the model is scripted or traced")


# Labels for the profiler -------------------------------------------------------------------------------------------


def labelled(net: Any, x: Tensor) -> Tensor:
    with torch.profiler.record_function("middle"), torch.autograd.profiler.record_function("again"):
        return x.relu()


def labelled_by_hand(net: Any, x: Tensor) -> Tensor:
    label = torch.ops.profiler._record_function_enter_new("middle", None)
    x = x.relu()
    torch.ops.profiler._record_function_exit._RecordFunction(label)
    return x


@torch.profiler.record_function("whole")
def decorated(net: Any, x: Tensor) -> Tensor:
    return x.relu()


@pytest.mark.parametrize("run", [labelled, labelled_by_hand, decorated])
def test_labels_for_the_profiler_are_nothing(run: Any) -> None:
    exact(Net(run))
    assert all("profiler" not in str(node.target) for node in netsurgery.trace(Net(run).double(), (X,)).ir.nodes)


class LabelledHeads(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(6, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        with torch.profiler.record_function("heads"):
            return self.b(self.a(x).view(2, 3, 6, 2, 4).softmax(-1).flatten(3))


def test_labels_in_code_that_hard_codes_a_size() -> None:
    exact(nn.Sequential(LabelledHeads()))


# Wrappers, and models in another form --------------------------------------------------------------------------------


def refused(model: nn.Module, match: str) -> None:
    """Every way in refuses the model, in one sentence."""
    with pytest.raises(TraceError, match=match) as caught:
        netsurgery.apply(model, HALF, (X.float(),))
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 250
    for way in (netsurgery.trace, netsurgery.cost):
        with pytest.raises(TraceError, match=match):
            way(model, (X.float(),))


@pytest.fixture
def one_process(tmp_path: Path) -> Iterator[None]:
    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def test_data_parallel_is_refused() -> None:
    refused(nn.DataParallel(Net()), r"the model is wrapped in DataParallel: pass .*model\.module")
    refused(nn.Sequential(nn.DataParallel(Net())), "module '0' is wrapped in DataParallel: pass")


def test_compiled_modules_are_refused_and_compiled_functions_run_by_their_own_operations() -> None:
    refused(torch.compile(Net(), backend="eager"), r"the model is wrapped by torch.compile: pass .*model\._orig_mod")
    refused(nn.Sequential(torch.compile(Net(), backend="eager")), r"module '0' is wrapped by torch.compile: pass")
    compiled = []

    def backend(module: torch.fx.GraphModule, inputs: list[Tensor]) -> Any:
        compiled.append(inputs)
        return module.forward

    @torch.compile(backend=backend)
    def gated(x: Tensor) -> Tensor:
        return x * torch.sigmoid(x)

    class Gated(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.down = nn.Linear(6, 16), nn.Linear(16, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.down(gated(self.up(x)))

    model, x = Gated().eval(), torch.randn(2, 6)
    edit = netsurgery.plan(model, HALF, (x,))
    small = netsurgery.rewrite(model, edit)
    assert not compiled and small.up.out_features == 8 and netsurgery.verify(model, small, edit, (x,)) < 1e-6
    with torch.no_grad():
        assert torch.allclose(small(x), small.down(F.silu(small.up(x)))) and compiled


@pytest.mark.usefixtures("one_process")
def test_distributed_data_parallel_is_refused() -> None:
    refused(nn.parallel.DistributedDataParallel(Net()), r"wrapped in DistributedDataParallel: pass .*model\.module")


@pytest.mark.usefixtures("one_process")
def test_sharded_parameters_are_refused() -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    model = Net()
    fully_shard(model, mesh=init_device_mesh("cpu", (1,)))
    refused(model, r"'a\.weight' is sharded: pass the model before fully_shard")


class Other(Tensor):
    """A tensor that does its operations in its own way."""

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise NotImplementedError(func)


def test_tensors_with_operations_of_their_own_are_refused() -> None:
    model = Net()
    model.table = torch.zeros(3).as_subclass(Other)
    refused(model, r"'table' is a Other, whose operations are its own .*pass the model with plain tensors")


def test_sparse_tensors_are_refused() -> None:
    model = Net()
    model.register_buffer("graph", torch.eye(3).to_sparse())
    refused(model, r"'graph' is sparse \(torch.sparse_coo\): make it dense")


def test_uninitialised_parameters_are_refused() -> None:
    model = Net()
    model.b = nn.LazyConv2d(4, 1)
    refused(model, r"'b\.weight' is not initialised \(lazy\): run the model once")


def quantised(how: str) -> nn.Module:
    import torch.ao.quantization as q
    from torch.ao.quantization.quantize_fx import convert_fx, prepare_fx

    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(128, 4))
    backend = "qnnpack" if "qnnpack" in torch.backends.quantized.supported_engines else "fbgemm"
    if how == "dynamic":
        return q.quantize_dynamic(model, {nn.Linear})
    if how in ("graph", "prepared graph"):
        prepared = prepare_fx(model.eval(), q.get_default_qconfig_mapping(backend), (X.float(),))
        prepared(X.float())
        return convert_fx(prepared) if how == "graph" else prepared
    model.qconfig = q.get_default_qat_qconfig(backend)  # type: ignore[assignment]
    return q.prepare_qat(model.train())


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("how", "match"),
    [
        ("dynamic", r"module '3' is quantised \(Linear\): pass the model in floating point"),
        ("graph", r"module '\w+' is quantised \(\w+\): pass the model in floating point"),
        ("prepared graph", r"is prepared for quantisation \(\w+\): pass the model as it was before"),
        ("qat", r"module '0' is prepared for quantisation \(Conv2d\): pass the model as it was before"),
    ],
)
def test_quantised_models_are_refused(how: str, match: str) -> None:
    refused(quantised(how), match)


@pytest.mark.filterwarnings("ignore")
def test_weights_that_torchao_quantised_are_refused() -> None:
    quantization = pytest.importorskip("torchao.quantization")
    model = nn.Sequential(nn.Flatten(), nn.Linear(108, 16), nn.Linear(16, 4))
    quantization.quantize_(model, quantization.Int8WeightOnlyConfig())
    refused(model, r"'1\.weight' is a \w+, whose operations are its own \(quantised, say\): pass")


SCORES = [MagnitudeScore(), MagnitudeScore(lamp=True), HGSRScore(), BatchNormScore(), GeometricMedianScore()]
BY_DATA = [LossIncreaseScore((X.float(), torch.zeros(2).long())), TaylorScore((X.float(), torch.zeros(2).long()))]


@pytest.mark.parametrize("score", SCORES + BY_DATA, ids=lambda score: type(score).__name__)
def test_scores_of_a_model_without_weights(score: netsurgery.Pass) -> None:
    with torch.device("meta"):
        model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(128, 4))
    x = torch.randn(2, 3, 6, 6)
    with pytest.raises(
        NetsurgeryError, match=r"reads weights, but '0.weight' has none, .* pass a model with"
    ) as caught:
        netsurgery.apply(model, [score, PruneChannels(0.5)], (x,))
    assert "\n" not in str(caught.value)


def test_a_model_without_weights_is_cut_by_scores_that_read_none() -> None:
    with torch.device("meta"):
        model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 4, 1))
    assert netsurgery.apply(model, HALF, (X.float(),))[0].weight.shape == (4, 3, 3, 3)

"""A candidate made and trained, in this process or in another: what is sent there, and what comes back.

Both ways run the same function on the same values with as many threads, so that results do not depend on who computes.
"""

from __future__ import annotations

import hashlib
import pickle
import threading
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import BrokenExecutor, Executor, as_completed
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from safetensors.torch import load, save
from torch import Tensor, nn

from netsurgery.analysis.network import Network
from netsurgery.capture.copies import copy_with, like, named_tensors
from netsurgery.capture.inputs import Inputs
from netsurgery.edit import Edit
from netsurgery.errors import InputError, NetsurgeryError, RewriteError
from netsurgery.passes.planting import Planting
from netsurgery.pipeline import trace
from netsurgery.rewriting.surgery import rewrite
from netsurgery.search.fitting import Fitting
from netsurgery.search.split import Split

__all__ = [
    "Parcel",
    "Setting",
    "State",
    "Trial",
    "copied",
    "rebuilt",
    "threads_of_torch",
    "tried",
    "tried_by",
    "weights",
]


@dataclass(frozen=True)
class Setting:
    """The values that all candidates of a search have in common.

    Attributes:
        net: the network as it was at the start.
        inputs: example inputs.
        only_new: whether new units alone are trained.
        threads: of torch.
    """

    net: nn.Module
    inputs: Inputs
    split: Split
    fitting: Fitting
    only_new: bool
    threads: int


@dataclass(frozen=True)
class State:
    """A network in a search: what was added since the start, as the JSON of an edit, and its tensors as safetensors."""

    edit: str
    weights: bytes


@dataclass(frozen=True)
class Parcel:
    """A value on its way to another process, where it is opened once for many candidates; or as it is, in this one."""

    key: str
    content: Any

    @classmethod
    def closed(cls, value: Any) -> Parcel:
        """For another process.

        Raises:
            InputError: it cannot be pickled.
        """
        try:
            content = pickle.dumps(value)
        except (pickle.PicklingError, AttributeError, TypeError) as error:
            raise InputError(
                f"the network, its loss or its optimizer cannot be sent to other processes ({error}): define classes "
                "and functions at the top of a module, or pass no executor"
            ) from error
        return cls(hashlib.sha256(content).hexdigest(), content)

    def open(self) -> Any:
        """The value."""
        return pickle.loads(self.content) if isinstance(self.content, bytes) else self.content


@dataclass(frozen=True)
class Trial:
    """The result of a candidate.

    Attributes:
        loss: on held-out samples; not finite where training diverged.
        weights: all tensors of the trained network, as safetensors.
        seconds: in all.
        surgery: seconds that went into making it and into making its parameters ordinary again.
        refused: why it cannot be made; empty where it can.
    """

    loss: float = float("nan")
    accuracy: float | None = None
    weights: bytes = b""
    seconds: float = 0.0
    surgery: float = 0.0
    refused: str = ""


@dataclass
class _Opened:
    """The values that a process keeps between candidates: the network of a round, and its groups."""

    keys: tuple[str, str]
    setting: Setting
    base: nn.Module
    network: Network


_opened: list[_Opened] = []  # at most one
_one_at_a_time = threading.Lock()  # random numbers are of a process: threads would draw each other's


def keep(setting: Parcel, state: Parcel, base: nn.Module, network: Network) -> None:
    """Spare this process the work of opening a state whose network is there already.

    Args:
        base: the network of the state.
        network: how it is coupled.
    """
    with _one_at_a_time:
        _opened[:] = [_Opened((setting.key, state.key), setting.open(), base, network)]


def forget() -> None:
    """Let go of what this process keeps."""
    with _one_at_a_time:
        _opened.clear()


def tried(setting: Parcel, state: Parcel, edit: str, seed: int) -> Trial:
    """Make a candidate, train it, and measure it.

    Args:
        setting: a ``Setting``.
        state: the ``State`` that the candidate grows from.
        edit: what grows, as JSON.
        seed: of all that is random.
    """
    with _one_at_a_time:
        begin = time.perf_counter()
        opened = _open(setting, state)
        with threads_of_torch(opened.setting.threads):
            return _tried(opened, edit, seed, begin)


def _open(setting: Parcel, state: Parcel) -> _Opened:
    keys = setting.key, state.key
    if not _opened or _opened[0].keys != keys:
        same = _opened and _opened[0].keys[0] == setting.key
        own: Setting = _opened[0].setting if same else setting.open()
        base = rebuilt(own, state.open())
        _opened[:] = [_Opened(keys, own, base, trace(base, own.inputs[0] or own.inputs[1], try_sizes=False))]
    return _opened[0]


def _tried(opened: _Opened, text: str, seed: int, begin: float) -> Trial:
    setting, edit = opened.setting, Edit.from_json(text, opened.network)
    model = copied(opened.base)
    try:
        plant = Planting(model, edit=edit) if setting.only_new else None
        model = rewrite(model, edit, inplace=True) if plant is None else model
    except (InputError, RewriteError) as error:
        return Trial(refused=str(error), seconds=time.perf_counter() - begin)
    made = time.perf_counter()
    setting.fitting.fit(model, setting.split, seed)
    fitted = time.perf_counter()
    model = model if plant is None else plant.finish()
    finished = time.perf_counter()
    found = setting.fitting.measure(model, setting.split.held)
    surgery = made - begin + finished - fitted
    return Trial(found.loss, found.accuracy, weights(model), time.perf_counter() - begin, surgery)


def tried_by(executor: Executor | None, tasks: Mapping[str, tuple[Any, ...]]) -> Iterator[tuple[str, Trial]]:
    """Candidates by name as they are done.

    Raises:
        InputError: workers are forked of a process that has computed gradients, which PyTorch does not allow.
        NetsurgeryError: a worker died.
    """
    if executor is None:
        yield from ((name, tried(*task)) for name, task in tasks.items())
        return
    futures = {executor.submit(tried, *task): name for name, task in tasks.items()}
    try:
        for future in as_completed(futures):
            yield futures[future], future.result()
    except BrokenExecutor as error:
        raise NetsurgeryError(
            f"a worker of the executor died ({error}): what the log holds is kept, and the same call goes on from there"
        ) from error
    except RuntimeError as error:
        if "Autograd-and-Fork" not in str(error):
            raise
        raise InputError(
            "the executor forks its workers, and these cannot compute gradients once this process has: pass "
            "ProcessPoolExecutor(n, multiprocessing.get_context('spawn'))"
        ) from error
    finally:
        for future in futures:
            future.cancel()


# Networks ----------------------------------------------------------------------------------------------------------


def copied(model: nn.Module) -> nn.Module:
    """A copy that shares no tensor with a model; gradients are not copied."""
    return copy_with(model, {id(t): like(t, t.detach().clone()) for _, t in named_tensors(model)})


def rebuilt(setting: Setting, state: State, network: Network | None = None) -> nn.Module:
    """The network of a state: what was added is added anew, then all tensors are read.

    Args:
        network: of the net at the start, if it has been traced.
    """
    net = setting.net
    if network is None:
        network = trace(net, setting.inputs[0] or setting.inputs[1], try_sizes=False)
    edit = Edit.from_json(state.edit, network)
    model = rewrite(net, edit) if edit.keep else copied(net)
    model.load_state_dict(load(state.weights))
    return model


def weights(model: nn.Module) -> bytes:
    """All of a state dict, as safetensors.

    Raises:
        InputError: it holds something else than tensors.
    """
    found: dict[str, Tensor] = {}
    for name, one in model.state_dict().items():
        if not isinstance(one, Tensor):
            raise InputError(f"the state dict holds '{name}', a {type(one).__name__}, which a search does not keep")
        found[name] = one.detach().to("cpu", copy=True, memory_format=torch.contiguous_format)
    return save(found)


@contextmanager
def threads_of_torch(count: int) -> Iterator[None]:
    """So many threads, and afterwards as many as before."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)

"""One row of docs/coverage.md: a model measured in a process of its own, or what went wrong with it."""

import multiprocessing
import os
import re
import time
import traceback
import warnings
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection
from typing import Any

import alive
import coverage_models
import torch
from models import machine
from torch import Tensor, nn
from torch.utils import _pytree as pytree

import netsurgery
from netsurgery.analysis.network import Network
from netsurgery.axes import Axis, inner
from netsurgery.capture.inputs import tensors_in
from netsurgery.capture.source_locations import format_where
from netsurgery.errors import InputError
from netsurgery.passes import PlantChannels, PruneChannels, RandomScore, WidenChannels
from netsurgery.verification import permuted_difference

Row = dict[str, Any]
_FAILURES = (
    RuntimeError, TypeError, ValueError, LookupError, AttributeError, AssertionError, ArithmeticError, ImportError,
    MemoryError, OSError,
)  # fmt: skip
_CONTEXT = multiprocessing.get_context("fork")  # what is imported here need not be imported for each model


@dataclass(frozen=True)
class Options:
    """How models are measured: the seed of all random numbers, seconds for each model, float64 in place of float32.

    ``grow``: units are added instead of removed.
    """

    seed: int = 0
    timeout: float = 300.0
    double: bool = False
    grow: bool = False


def measure(kind: str, name: str, options: Options, row: Row) -> None:
    """Fill in the row of a model, as far as it comes."""
    model, inputs = coverage_models.build(kind, name, options.seed)
    alive.randomise(model, lambda model: coverage_models.call(model, inputs), options.seed)
    if options.double:
        model = model.double()
        inputs = pytree.tree_map_only(Tensor, lambda t: t.double() if t.is_floating_point() else t, inputs)
    row["parameters"] = sum(parameter.numel() for parameter in model.parameters())
    row["dead"] = alive.what_is_dead(tensors_in(coverage_models.call(model, inputs)))
    (measure_growth if options.grow else measure_removal)(model, inputs, options, row)


def measure_removal(model: nn.Module, inputs: Any, options: Options, row: Row) -> None:
    """Half of every group goes; beside the silenced original nothing else may change."""
    start = time.perf_counter()
    network = netsurgery.trace(model, inputs)
    row.update(trace_s=time.perf_counter() - start, **facts(network))
    start = time.perf_counter()
    edit = netsurgery.plan(model, [RandomScore(options.seed), PruneChannels(0.5)], inputs)
    small = netsurgery.rewrite(model, edit)
    row.update(rewrite_s=time.perf_counter() - start, **facts(edit.network))
    row["removed"] = 1 - edit.after.params / edit.before.params
    row["replaced"] = list(getattr(edit, "replaced", ()))
    row["difference"] = netsurgery.verify(model, small, edit, inputs)
    row["changed"] = changed(model, small, inputs)
    row["permuted"] = permuted_difference(model, network, inputs, options.seed)
    row.update(verdict(row, 1e-9 if options.double else 1e-4))


GROWTH = (WidenChannels(1.5, noise=0.5), WidenChannels(2), PlantChannels(3))


def measure_growth(model: nn.Module, inputs: Any, options: Options, row: Row) -> None:
    """Add units in three ways; the outputs must stay, and ``share`` is that of the groups that grew."""
    before = tensors_in(coverage_models.call(model, inputs))
    row.update(difference=0.0, share=0.0, left={})
    start = time.perf_counter()
    for one in GROWTH:
        try:
            edit = netsurgery.plan(model, [one], inputs)
        except InputError as error:  # nothing can grow so
            row["left"][repr(one)] = str(error)
            continue
        after = tensors_in(coverage_models.call(netsurgery.rewrite(model, edit), inputs))
        row["difference"] = max(row["difference"], _difference(before, after))
        row["share"] = max(row["share"], len(edit.grown) / len(edit.network.prunable))
        row["left"].update(edit.outcomes[0].short)
    row["rewrite_s"] = time.perf_counter() - start
    if not row["share"]:
        row.update(status="REFUSED", message=str(row["left"]))
        return
    exact = row["difference"] <= (1e-9 if options.double else 1e-4)
    row["status"] = "WRONG" if not exact else "exact" if row["dead"] is None else "PROVES NOTHING"


def _difference(wanted: list[Tensor], found: list[Tensor]) -> float:
    """The largest difference over the largest number, of the worst output."""
    if len(wanted) != len(found):
        return float("inf")
    worst = 0.0
    for one, other in zip(wanted, found, strict=True):
        if one.shape != other.shape:
            return float("inf")
        if one.is_floating_point() and one.numel():
            far = float((one - other).abs().max() / one.abs().max().clamp(min=1e-30))
            worst = far if far > worst or far != far else worst
    return worst


def verdict(row: Row, bound: float) -> Row:
    """What the figures of a row amount to: its status and, where it has to be explained, a message."""
    wrong = not (row["difference"] <= bound and row["permuted"] <= bound)
    if row["dead"] is not None and (not wrong or row["dead"] == alive.NOT_FINITE):
        return {"status": "PROVES NOTHING", "message": row["dead"]}
    if wrong:
        return {"status": "WRONG", "message": f"a difference is above {bound}"}
    if row["changed"] < 1e-3:
        return {"status": "PROVES NOTHING", "message": "what was removed did not matter"}
    return {"status": "exact"}


def changed(model: nn.Module, small: nn.Module, inputs: Any) -> float:
    """The relative difference that the removal makes to the outputs: where it is none, exactness proves nothing."""
    small_outputs, outputs = (tensors_in(coverage_models.call(one, inputs)) for one in (small, model))
    return _difference(outputs, small_outputs)


def facts(network: Network) -> Row:
    """What a network's groups say: how many, how much of it can be pruned, and what holds the others."""
    reasons: dict[str, Row] = {}
    held: dict[str, set[Axis]] = {}
    for group in network.groups:
        if group.locked is not None:
            why = alike(group.locked)
            new = {"reason": short(group.locked), "first": group.name, "groups": 0}
            reasons.setdefault(why, new)["groups"] += 1
            held.setdefault(why, set()).update({group.channel} if inner(group.channel) else ())
    free = {group.channel for group in network.prunable}
    for why, channels in held.items():  # what would be open, too
        reasons[why]["entries"] = network.entries(free | channels) - network.entries(free) if channels else 0.0
    return {
        "groups": len(network.groups),
        "locked": len(network.groups) - len(network.prunable),
        "share": network.prunable_share,
        "reasons": sorted(reasons.values(), key=lambda entry: -entry["entries"]),
    }


def short(reason: str) -> str:
    """A reason without the paths of modules: one line of code often runs in many places."""
    reason = re.sub(r"\(the code of (?:the model|\S+) ", "(its code ", reason)
    reason = re.sub(r" in \S+(?= at \S+:\d+)", "", reason)
    return re.sub(r"(:\d+|\)) in (?:\S+|the model)(?=$| \(its code )", r"\1", reason)


def alike(reason: str) -> str:
    """What reasons that differ in numbers alone have in common; the line of code stays."""
    pieces = re.split(r"( at \S+:\d+)", short(reason))  # every other one is a line of code
    return "".join(text if i % 2 else re.sub(r"\d+(\.\d+)?(e-\d+)?", "N", text) for i, text in enumerate(pieces))


def child(connection: Connection, kind: str, name: str, options: Options) -> None:
    """Measure one model and send its row."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    row: Row = {"kind": kind, "model": name, "machine": machine().partition(", load")[0]}
    start = time.perf_counter()
    try:
        measure(kind, name, options, row)
    except netsurgery.NetsurgeryError as error:
        row.update(status="REFUSED", message=f"{type(error).__name__}: {error}")
    except _FAILURES as error:
        last = traceback.extract_tb(error.__traceback__)[-1]
        place = format_where((os.path.realpath(last.filename), last.lineno or 0))
        row.update(status="CRASH", message=f"{type(error).__name__}: {error} {place}")
    row["seconds"] = time.perf_counter() - start
    connection.send(row)


def measured(kind: str, name: str, options: Options) -> Row:
    """The row of a model; where float32 finds a difference, float64 decides whether it is rounding.

    Rounding grows where a network decides by comparing numbers, such as which of two boxes comes first.
    """
    row = measured_once(kind, name, options)
    if row["status"] != "WRONG" or options.double:
        return row
    again = measured_once(kind, name, replace(options, double=True))
    figures = {key: row[key] for key in ("difference", "permuted") if key in row}
    return {**again, "in_float32": figures} if again["status"] == "exact" else {**row, "in_float64": again}


def measured_once(kind: str, name: str, options: Options) -> Row:
    """The row of a model, measured in a process of its own; whatever happens to that process, there is a row."""
    receiver, sender = _CONTEXT.Pipe(duplex=False)
    process = _CONTEXT.Process(target=child, args=(sender, kind, name, options), daemon=True)
    process.start()
    sender.close()
    row: Row = {"kind": kind, "model": name, "status": "TIMEOUT", "message": f"no result in {options.timeout:.0f} s"}
    try:
        if receiver.poll(options.timeout):
            row = receiver.recv()
    except EOFError:
        process.join()
        row.update(status="CRASH", message=f"the process ended with exit code {process.exitcode}")
    process.kill()
    process.join()
    return row

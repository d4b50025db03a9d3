"""How much of the world's networks is covered? `python benchmarks/coverage.py --out rows.jsonl --page docs/coverage.md`

For every model of coverage_models.py, in a process of its own: half of every group that is not frozen is removed at
random, and the result is compared with the original whose removed units are silenced. Weights, norms and statistics are
random (alive.py). A model that fails has its row as well.
"""

import argparse
import fnmatch
import json
import multiprocessing
import os
import re
import time
import traceback
import warnings
from collections.abc import Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import alive
import coverage_models
import coverage_page
import torch
from models import machine
from torch import nn

import netsurgery
from netsurgery.network import Network
from netsurgery.passes import PruneChannels, RandomScore
from netsurgery.report import prunable_share
from netsurgery.tracing import format_where, tensors_in
from netsurgery.verification import permuted_difference

Row = dict[str, Any]
BOUND = 1e-4


def measure(kind: str, name: str, seed: int, row: Row) -> None:
    """Fill in the row of a model, as far as it comes."""
    model, inputs = coverage_models.build(kind, name, seed)
    alive.randomise(model, lambda model: coverage_models.call(model, inputs), seed)
    row["parameters"] = sum(parameter.numel() for parameter in model.parameters())
    row["dead"] = alive.what_is_dead(tensors_in(coverage_models.call(model, inputs)))
    start = time.perf_counter()
    network = netsurgery.trace(model, inputs)
    row.update(trace_s=time.perf_counter() - start, **facts(network))
    row["permuted"] = permuted_difference(model, network, inputs, seed)
    start = time.perf_counter()
    edit = netsurgery.plan(model, [RandomScore(seed), PruneChannels(0.5)], inputs)
    small = netsurgery.rewrite(model, edit)
    row.update(rewrite_s=time.perf_counter() - start, **facts(edit.network))
    row["removed"] = 1 - edit.after.params / edit.before.params
    row["replaced"] = list(getattr(edit, "replaced", ()))
    row["difference"] = netsurgery.verify(model, small, edit, inputs)
    row["changed"] = changed(model, small, inputs)
    verdict(row)


def verdict(row: Row) -> None:
    """What the figures of a row amount to."""
    if not (row["difference"] <= BOUND and row["permuted"] <= BOUND):
        row["status"] = "WRONG"
    elif row["dead"] is not None:
        row.update(status="PROVES NOTHING", message=row["dead"])
    elif row["changed"] < 1e-3:
        row.update(status="PROVES NOTHING", message="what was removed did not matter")
    else:
        row["status"] = "exact"


def changed(model: nn.Module, small: nn.Module, inputs: Any) -> float:
    """The relative difference that the removal makes to the outputs: where it is none, exactness proves nothing."""
    pairs = zip(*(tensors_in(coverage_models.call(m, inputs)) for m in (small, model)), strict=False)
    far = [
        float((a - b).abs().max() / b.abs().max()) if a.shape == b.shape else float("inf")
        for a, b in pairs
        if b.is_floating_point() and b.numel()
    ]
    return max(far, default=0.0)


def facts(network: Network) -> Row:
    """What a network's groups say: how many, how much of it can be pruned, and what holds the others."""
    reasons: dict[str, Row] = {}
    for group in network.groups:
        if group.frozen is not None:
            new = {"reason": short(group.frozen), "first": group.name, "groups": 0, "parameters": 0.0}
            reasons.setdefault(alike(group.frozen), new)["groups"] += 1
    for why, count in locked_parameters(network).items():
        reasons[why]["parameters"] = count
    return {
        "groups": len(network.groups),
        "locked": len(network.groups) - len(network.prunable),
        "share": prunable_share(network),
        "reasons": sorted(reasons.values(), key=lambda entry: -entry["parameters"]),
    }


def locked_parameters(network: Network) -> dict[str, float]:
    """How many parameters each reason holds: those in no prunable group, shared between the reasons that hold them."""
    free = {member.parameter for group in network.prunable for member in group.members}
    holders: dict[str, set[str]] = {}
    for group in network.groups:
        for member in group.members:
            if isinstance(network.tensors[member.parameter], nn.Parameter) and member.parameter not in free:
                holders.setdefault(member.parameter, set()).add(alike(group.frozen or ""))
    counts: dict[str, float] = {}
    for name, reasons in holders.items():
        inner = {why for why in reasons if not why.startswith(("network input", "network output"))} or reasons
        for why in inner:
            counts[why] = counts.get(why, 0.0) + network.tensors[name].numel() / len(inner)
    return counts


def short(reason: str) -> str:
    """A reason without the paths of modules: one line of code often runs in many places."""
    reason = re.sub(r" in \S+(?= at \S+:\d+)", "", reason)
    return re.sub(r"(:\d+|\)) in \S+$| in the model$", r"\1", reason)


def alike(reason: str) -> str:
    """What reasons that differ in numbers alone have in common; the line of code stays."""
    what, place = re.fullmatch(r"(.*?)( at \S+:\d+)?", short(reason), re.DOTALL).groups("")  # type: ignore[union-attr]
    return re.sub(r"\d+(\.\d+)?(e-\d+)?", "N", what) + place


def child(connection: Connection, kind: str, name: str, seed: int) -> None:
    """Measure one model and send its row."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    row: Row = {"kind": kind, "model": name, "machine": machine().partition(", load")[0]}
    start = time.perf_counter()
    try:
        measure(kind, name, seed, row)
    except netsurgery.NetsurgeryError as error:
        row.update(status="REFUSED", message=f"{type(error).__name__}: {error}")
    except Exception as error:  # whatever it is, it is this model's row
        last = traceback.extract_tb(error.__traceback__)[-1]
        place = format_where((os.path.realpath(last.filename), last.lineno or 0))
        row.update(status="CRASH", message=f"{type(error).__name__}: {error} {place}")
    row["seconds"] = time.perf_counter() - start
    connection.send(row)


def measured(kind: str, name: str, seed: int, timeout: float) -> Row:
    """The row of a model, measured in a process of its own."""
    receiver, sender = _CONTEXT.Pipe(duplex=False)
    process = _CONTEXT.Process(target=child, args=(sender, kind, name, seed), daemon=True)
    process.start()
    sender.close()
    row: Row = {"kind": kind, "model": name}
    try:
        row = receiver.recv() if receiver.poll(timeout) else {**row, "status": "TIMEOUT", "message": f"{timeout:.0f} s"}
    except EOFError:
        process.join()
        row.update(status="CRASH", message=f"the process ended with exit code {process.exitcode}")
    process.kill()
    process.join()
    return row


_CONTEXT = multiprocessing.get_context("fork")  # what is imported here need not be imported for each model


def chosen(options: argparse.Namespace) -> Iterator[tuple[str, str]]:
    """The models that the options name."""
    part, parts = map(int, options.slice.split("/"))
    patterns = options.models.split(",")
    kinds = list(coverage_models.KINDS) if options.kind == "all" else options.kind.split(",")
    listed = [
        (kind, name)
        for kind in kinds
        for name in coverage_models.names(kind)
        if any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)
    ]
    yield from listed[part - 1 :: parts]


def read(path: Path) -> list[Row]:
    """The rows of a file: of each model the last one."""
    lines = path.read_text().splitlines() if path.exists() else []
    rows = [json.loads(line) for line in lines if line.strip()]
    return list({(row["kind"], row["model"]): row for row in rows}.values())


def line(row: Row) -> str:
    """A row on one line, for whoever waits."""
    share = f"{100 * row['share']:.1f}%" if "share" in row else ""
    difference = f"{row['difference']:.1e}" if "difference" in row else ""
    figures = f"{row['status']:14} {share:>7} {difference:>8} {row.get('seconds', 0):6.1f} s"
    return f"{figures}  {row['kind']}: {row['model']} {row.get('message', '')[:200]}"


def main() -> None:
    """Measure, and append each row to the file as soon as it is there."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kind", default="all", help=f"kinds among {', '.join(coverage_models.KINDS)}")
    parser.add_argument("--models", default="*", help="patterns of names, such as resnet*,vit_b_16")
    parser.add_argument("--slice", default="1/1", help="i/n: every n-th model, from the i-th")
    parser.add_argument("--out", type=Path, default=Path("coverage.jsonl"), help="file that rows are appended to")
    parser.add_argument("--page", type=Path, help="file to write the page to, from all rows of --out")
    parser.add_argument("--resume", action="store_true", help="leave out the models that the file has")
    parser.add_argument("--timeout", type=float, default=300.0, help="seconds for each model")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    done = {(row["kind"], row["model"]) for row in read(options.out)} if options.resume else set()
    for kind, name in list(chosen(options)):
        if (kind, name) not in done:
            row = measured(kind, name, options.seed, options.timeout)
            with options.out.open("a") as file:
                file.write(json.dumps(row) + "\n")
            print(line(row), flush=True)
    if options.page is not None:
        rows = {(row["kind"], row["model"]): row for row in read(options.out)}
        everything = [(kind, name) for kind in coverage_models.KINDS for name in coverage_models.names(kind)]
        options.page.write_text(coverage_page.page([rows[key] for key in everything if key in rows], coverage_models.KINDS))


if __name__ == "__main__":
    main()

"""What is left of a trained network after a removal: every score, scope, compensation and budget, beside torch-pruning.

    python -m pip install -e '.[bench,showcase]'
    python benchmarks/worth.py lite0 --seeds 3 --out lite0.jsonl
    python benchmarks/worth.py --read lite0.jsonl --picture lite0.png

Each row is one removal to a share of the multiply-accumulates (or parameters, ``--of params``), without fine-tuning:
agreement with the original's first class (or accuracy where there are labels) and KL(original || pruned) on data that
no choice has seen, seconds (of all steps: score, choice, compensation) and the growth of the peak of the resident
memory. A seed deals the pictures, or the training data, anew. Rows that a file holds are not made again. torch-pruning
takes a share of the channels: it is halved until the MACs, counted by us, are within 0.5% (or as near as twelve tries
come), and its seconds are those of one try. ``--finetune STEPS`` trains what is left by distillation from the original
on the calibration data, ``--epochs N`` on the labelled data the network was trained on; both tools alike.
"""

from __future__ import annotations

import argparse
import copy
import functools
import json
import logging
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from operator import itemgetter
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import torch
import torch.nn.functional as F
from models import Known, machine, print_table, reset_peak, resident_mb
from showcase import LeNet, Rows, Subject, agreement, crops, dealt, lite0, logits, minilm, mnist, shapes
from torch import Tensor, nn

import netsurgery
from netsurgery import passes as P
from netsurgery.demo import digits as digit_rows
from netsurgery.demo import fit
from netsurgery.models import DigitsResNet

PEERS = ("Taylor", "magnitude", "LAMP", "FPGM", "OBD-C", "Taylor, isomorphic")
COMPENSATIONS = (None, "bias", "least-squares")


@dataclass(frozen=True)
class Task:
    """A trained network, data to choose by, and data to report on."""

    model: nn.Module
    calibration: Rows
    report: Rows
    apart: int = 0  # of the calibration data, so many at the end are other pictures than those before
    gradients: int = 1000  # samples of the calibration data, evenly spread, that scores by gradients take
    train: Rows | None = None  # what the network was trained on; without it targets are its own first class

    def to(self, device: str) -> Task:
        """The network and its data there."""
        data = {"calibration": self.calibration, "report": self.report, "train": self.train}
        moved: dict[str, Any] = {name: part and tuple(one.to(device) for one in part) for name, part in data.items()}
        return replace(self, model=self.model.to(device), **moved)

    @functools.cached_property
    def before(self) -> Tensor:
        """Logits of the original on the data to report on."""
        return logits(self.model, self.report[0])

    @property
    def fitted(self) -> Tensor:
        """Inputs to reconstruct."""
        x = self.calibration[0]
        return x[: len(x) - self.apart]

    @property
    def held_back(self) -> Tensor | None:
        """Inputs to measure groups on, where these are apart from those."""
        return self.calibration[0][-self.apart :] if self.apart else None

    @property
    def few(self) -> Rows:
        """Samples for scores by gradients."""
        x, y = self.calibration
        step = max(1, len(x) // self.gradients)
        return x[::step], y[::step]

    @property
    def example(self) -> Tensor:
        """A batch of one, as MACs are counted."""
        return self.report[0][:1]

    @functools.cached_property
    def cost(self) -> netsurgery.Cost:
        """Of the original."""
        return netsurgery.cost(self.model, self.example)

    def figures(self, small: nn.Module) -> dict[str, float]:
        """Agreement and accuracy in percent, KL in nats."""
        after = logits(small, self.report[0])
        same, divergence = agreement(self.before, after)
        right = 100 * float((after.argmax(1) == self.report[1]).float().mean())
        return {"agreement": same, "KL": divergence} | ({"accuracy": right} if self.train else {})


SCORES: dict[str, Callable[[Task], netsurgery.Pass]] = {
    "reconstruction": lambda task: P.ReconstructionScore(task.fitted, held_back=task.held_back, samples=1000),
    "Taylor": lambda task: P.TaylorScore(task.few),
    "Taylor, second order": lambda task: P.TaylorScore(task.few, order=2),
    "Fisher": lambda task: P.FisherScore(task.few),
    "magnitude": lambda task: P.MagnitudeScore(),
    "LAMP": lambda task: P.MagnitudeScore(lamp=True),
    "batch norm": lambda task: P.BatchNormScore(),
    "geometric median": lambda task: P.GeometricMedianScore(),
    "HGSR": lambda task: P.HGSRScore(),
    "random": lambda task: P.RandomScore(),
}


def of_lite0(seed: int) -> Task:
    """EfficientNet-Lite0: crops of 25 pictures to choose by, 8 each of 13 others to report on.

    32 crops each of 18 pictures and 8 each of 7 others; scores by gradients take every fourth.
    """
    model, (some, others) = lite0(), dealt(seed)
    x = torch.cat([crops(some[:18], 32, 3 * seed), crops(some[18:], 8, 3 * seed + 1)])
    y = crops(others, 8, 3 * seed + 2)
    targets = [logits(model, part).argmax(1) for part in (x, y)]
    return Task(model, (x, targets[0]), (y, targets[1]), apart=7 * 8, gradients=len(x) // 4)


def of_mnist(seed: int) -> Task:
    """LeNet-5, ten epochs on 4,000 images; reported on 1,000 others."""
    train, test = mnist(seed)
    torch.manual_seed(seed)
    model = LeNet()
    fit(model, train, 10, 2e-3, seed, lambda: None)
    return Task(model.eval(), (train[0][:1024], train[1][:1024]), test, train=train)


def of_digits(seed: int) -> Task:
    """A small residual network, 15 epochs on scikit-learn's digits."""
    data = digit_rows(seed)
    torch.manual_seed(seed)
    model = DigitsResNet()
    fit(model, data.train, 15, 3e-3, seed, lambda: None)
    return Task(model.eval(), data.train, data.test, train=data.train)


def of_subject(make: Callable[[], Subject], seed: int) -> Task:
    """A network of ``showcase.py``; the seed draws its calibration data."""
    model, (x, y), held_out = make()
    some = torch.randperm(len(x), generator=torch.Generator().manual_seed(seed))[:1000]
    return Task(model, (x[some], y[some]), held_out, train=(x, y))


TASKS: dict[str, Callable[[int], Task]] = {
    "shapes": functools.partial(of_subject, shapes),
    "minilm": functools.partial(of_subject, minilm),
    "lite0": of_lite0,
    "mnist": of_mnist,
    "digits": of_digits,
}


# Removals ----------------------------------------------------------------------------------------------------------


def ours(
    task: Task, score: netsurgery.Pass, what: str, share: float, scope: str, compensate: str | None, memory: float
) -> nn.Module:
    """The network with a share of its MACs or parameters."""
    kept: dict[str, Any] = {}
    if compensate:
        kept = {"compensate": compensate, "data": task.calibration[0], "samples": 1000, "memory": int(memory * 2**30)}
    removal = P.PruneChannels(**{what: share}, scope=scope, **kept)  # type: ignore[arg-type]
    return netsurgery.apply(task.model, [score, removal], task.example)


def peer(task: Task, which: str, share: float) -> nn.Module:
    """torch-pruning at a share of the channels of all layers together."""
    import torch_pruning as tp

    model = copy.deepcopy(task.model).eval()
    for parameter in model.parameters():
        parameter.requires_grad_(True)
    x, y = task.few
    name, _, isomorphic = which.partition(", ")
    kinds: dict[str, Callable[[], Any]] = {
        "Taylor": tp.importance.GroupTaylorImportance,
        "magnitude": tp.importance.GroupMagnitudeImportance,
        "LAMP": tp.importance.LAMPImportance,
        "FPGM": tp.importance.FPGMImportance,
        "OBD-C": lambda: tp.importance.OBDCImportance(num_classes=task.before.shape[1]),
    }
    importance = kinds[name]()
    last = [module for module in model.modules() if isinstance(module, nn.Linear)][-1]
    pruner = tp.pruner.BasePruner(
        model,
        task.example,
        importance=importance,
        global_pruning=bool(isomorphic) or which == "LAMP",
        isomorphic=bool(isomorphic),
        pruning_ratio=share,
        ignored_layers=[last],
    )
    if name == "OBD-C":
        find, pruner._downstream_node_as_root_if_attention = pruner._downstream_node_as_root_if_attention, lambda g: g
        importance._prepare_model(model, pruner)  # fails in 1.6.1, where that is None for what is no attention
        pruner._downstream_node_as_root_if_attention = find
        for a, b in zip(x.split(8), y.split(8), strict=True):
            model.zero_grad()
            F.cross_entropy(model(a), b).backward()
            importance.step()
    elif name == "Taylor":
        for a, b in zip(x.split(8), y.split(8), strict=True):
            (F.cross_entropy(model(a), b, reduction="sum") / len(x)).backward()
    pruner.step()
    if name == "OBD-C":
        importance._rm_hooks(model)
        importance._clear_buffer()
    model.zero_grad()
    return model.eval()


def peer_at(task: Task, which: str, what: str, wanted: float) -> tuple[nn.Module, float]:
    """The peer's network at a share of the MACs or parameters, found by halving; and the seconds of its try."""
    whole = getattr(netsurgery.cost(task.model, task.example), what)
    low, high = 0.0, 0.95
    tries: list[tuple[float, nn.Module, float]] = []
    while len(tries) < 12 and (not tries or min(tries, key=itemgetter(0))[0] > 0.005):
        share, start = (low + high) / 2, time.perf_counter()
        small = peer(task, which, share)
        seconds = time.perf_counter() - start
        left = getattr(netsurgery.cost(small, task.example), what) / whole
        tries.append((abs(left - wanted), small, seconds))
        low, high = (share, high) if left > wanted else (low, share)
    return min(tries, key=itemgetter(0))[1:]


def distilled(task: Task, small: nn.Module, steps: int, rows: int = 16) -> nn.Module:
    """Trained on the calibration data towards the logits of the original: AdamW, 3e-4 down to 0 by a cosine."""
    x, _ = task.calibration
    wanted, loss = logits(task.model, x), P.Distillation(temperature=1, alpha=1)
    optimizer = torch.optim.AdamW(small.parameters(), 3e-4, weight_decay=1e-4)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    order = torch.Generator().manual_seed(0)
    for _ in range(steps):
        some = torch.randint(len(x), (rows,), generator=order)
        optimizer.zero_grad()
        loss(small(x[some]), wanted[some]).backward()
        optimizer.step()
        schedule.step()
    return small.eval()


# Rows --------------------------------------------------------------------------------------------------------------


def rows(task: Task, args: argparse.Namespace, done: set[tuple[Any, ...]]) -> Iterator[dict[str, Any]]:
    """One after the other, those that are not known yet."""
    for name in args.scores:
        wanted = [(name, s, str(c), b) for s in args.scopes for c in args.compensations for b in args.budgets]
        if not [key for key in wanted if key not in done]:
            continue
        start = time.perf_counter()
        scored = SCORES[name](task).run(netsurgery.trace(task.model, task.example))
        scoring, known = time.perf_counter() - start, Known(scored.scores, scored.comparable, scored.ordinal)
        for key in wanted:
            if key not in done:
                made = None if key[2] == "None" else key[2]
                run = functools.partial(ours, task, known, args.of, key[3], key[1], made, args.memory)
                yield measured(task, "netsurgery", key, lambda run=run, extra=scoring: (run(), extra), args)
    for name in args.peers:
        for budget in args.budgets:
            key = (f"torch-pruning {name}", "its own", "None", budget)
            if key not in done:
                find = functools.partial(peer_at, task, name, args.of, budget)
                yield measured(task, "torch-pruning", key, find, args)


def measured(
    task: Task, tool: str, key: tuple[Any, ...], make: Callable[[], Any], args: argparse.Namespace
) -> dict[str, Any]:
    """Figures of one removal."""
    peak, start = memory_peak(args.device), time.perf_counter()
    small, more = make()
    taken = more if tool == "torch-pruning" else time.perf_counter() - start + more
    found = {
        **dict(zip(("score", "scope", "compensation", "budget"), key, strict=True)),
        "tool": tool,
        **{name: getattr(args, name) for name in _RUN[2:]},
        "left": getattr(netsurgery.cost(small, task.example), args.of) / getattr(task.cost, args.of),
        "seconds": taken,
        "MiB": peak(),
        **task.figures(small),
    }
    if args.finetune:
        tuned = task.figures(distilled(task, small, args.finetune))
        found |= {f"{name} after {args.finetune} steps": value for name, value in tuned.items()}
    elif args.epochs and task.train:
        fit(small, task.train, args.epochs, 1e-3, 0, lambda: None)
        tuned = task.figures(small)
        found |= {f"{name} after {args.epochs} epochs": value for name, value in tuned.items()}
    return found


def memory_peak(device: str) -> Callable[[], float]:
    """Says by how many MiB memory has grown at most since now: of the process, or that of tensors on a GPU."""
    if device == "cpu":
        reset_peak()
        before = resident_mb("VmRSS")
        return lambda: resident_mb("VmHWM") - before
    torch.cuda.reset_peak_memory_stats()
    held = torch.cuda.memory_allocated()
    return lambda: (torch.cuda.max_memory_allocated() - held) / 2**20


_RUN = ("network", "seed", "of", "finetune", "epochs", "memory", "device")  # rows that agree in these come from one run


def print_rows(found: list[dict[str, Any]]) -> None:
    """A table for each network: means over the seeds, and the standard deviation of the first figure."""
    for network, what, *rest in dict.fromkeys(tuple(row[name] for name in ("network", *_RUN[2:])) for row in found):
        mine = [row for row in found if tuple(row[name] for name in ("network", *_RUN[2:])) == (network, what, *rest)]
        figures = [name for name in ("accuracy", "agreement", "KL") if name in mine[0]]
        figures += sorted({name for row in mine for name in row if " after " in name})
        groups: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
        for row in mine:
            groups.setdefault(tuple(row[n] for n in ("budget", "score", "scope", "compensation")), []).append(row)
        seeds, run = max(map(len, groups.values())), dict(zip(_RUN[3:], rest, strict=True))
        print(f"\n{network}, {seeds} seeds, budgets are shares of the {what}, {run}\n")
        lines = []
        for key, same in sorted(groups.items(), key=lambda item: (-item[0][0], mean(r["KL"] for r in item[1]))):
            cells = [f"{key[0]:.0%}", *map(str, key[1:])]
            for name in [*figures, "seconds", "MiB"]:
                values = [row[name] for row in same if name in row]
                spread = f" ± {stdev(values):.1f}" if len(values) > 1 and name in figures[:1] else ""
                digits = 2 if name.startswith("KL") else 0 if name in ("seconds", "MiB") else 1
                cells.append(f"{mean(values):.{digits}f}{spread}" if values else "")
            lines.append(cells)
        print_table(("budget", "score", "scope", "compensation", *figures, "seconds", "MiB"), lines)


def draw(found: list[dict[str, Any]], file: Path) -> None:
    """Agreement by budget: our scores over all layers with least squares, and the peer's."""
    import matplotlib.pyplot as plt

    networks = list(dict.fromkeys(row["network"] for row in found))
    figure, axes = plt.subplots(1, len(networks), figsize=(6 * len(networks), 4.5), squeeze=False)
    for network, axis in zip(networks, axes[0], strict=True):
        best: dict[tuple[str, str], dict[float, float]] = {}
        by: dict[tuple[Any, ...], list[float]] = {}
        ours = ("global", "least-squares")
        for row in [row for row in found if row["network"] == network and row["of"] == "macs"]:
            if row["tool"] == "netsurgery" and (row["scope"], row["compensation"]) != ours:
                continue
            key = row["tool"], row["score"], row["scope"], row["compensation"], row["budget"]
            by.setdefault(key, []).append(row["agreement"])
        for (tool, score, _, _, budget), values in by.items():
            line = best.setdefault((tool, score), {})
            line[budget] = max(line.get(budget, 0.0), mean(values))
        for (tool, score), line in sorted(best.items(), key=lambda item: -sum(item[1].values())):
            budgets = sorted(line, reverse=True)
            style = "--" if tool == "torch-pruning" else "-"
            axis.plot(budgets, [line[b] for b in budgets], style, marker="o", markersize=3, label=score)
        axis.set(
            title=f"{network}; ours: scope global, least squares",
            xlabel="share that stays",
            ylabel="agreement with the original, %",
        )
        axis.invert_xaxis()
        axis.legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(file, dpi=130)


def main() -> None:
    """Make rows, or read them; print tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("networks", nargs="*", choices=[*TASKS, []])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--first", type=int, default=0, help="the first seed")
    parser.add_argument("--budgets", type=float, nargs="+", default=[0.9, 0.75, 0.5])
    parser.add_argument("--scores", nargs="*", choices=[*SCORES], default=[*SCORES])
    parser.add_argument("--scopes", nargs="+", default=["layer", "global"])
    parser.add_argument("--compensations", nargs="+", default=[*map(str, COMPENSATIONS)])
    parser.add_argument("--peers", nargs="*", choices=PEERS, default=[*PEERS])
    parser.add_argument("--of", choices=["macs", "params"], default="macs", help="what budgets are shares of")
    parser.add_argument("--epochs", type=int, default=0, help="train what is left on the labelled data")
    parser.add_argument("--finetune", type=int, default=0, metavar="STEPS")
    parser.add_argument("--memory", type=float, default=1, metavar="GIB", help="of the compensation")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--out", type=Path, default=Path("worth.jsonl"))
    parser.add_argument("--read", type=Path, nargs="+", help="only print what these files hold")
    parser.add_argument("--picture", type=Path)
    args = parser.parse_args()
    logging.getLogger("netsurgery").setLevel(logging.ERROR)
    files = args.read or [args.out]
    for network in args.networks:
        for seed in range(args.first, args.first + args.seeds):
            this = (network, seed, *(getattr(args, name) for name in _RUN[2:]))
            known = [row for row in read([args.out]) if tuple(row[name] for name in _RUN) == this]
            done = {(row["score"], row["scope"], row["compensation"], row["budget"]) for row in known}
            with args.out.open("a") as out:
                for row in rows(TASKS[network](seed).to(args.device), args, done):
                    print(json.dumps({"network": network, "seed": seed, **row}), file=out, flush=True)
    print(machine())
    found = read(files)
    print_rows(found)
    if args.picture:
        draw(found, args.picture)


def read(files: list[Path]) -> list[dict[str, Any]]:
    """The rows that files hold."""
    return [json.loads(line) for file in files if file.exists() for line in file.read_text().splitlines()]


if __name__ == "__main__":
    main()

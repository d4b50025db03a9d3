"""Growing beside training: accuracy against parameters on scikit-learn's digits and on 5,000 images of MNIST.

    python -m pip install -e '.[showcase]'
    OMP_NUM_THREADS=1 python benchmarks/growing.py [digits] [mnist] [--seeds 0 1 2] [--out runs/growing]
    OMP_NUM_THREADS=1 python benchmarks/growing.py digits --choose

For each seed: a small DigitsResNet; a teacher of 308,074 parameters; the small one grown by planting up to 7% of the
teacher's parameters, with and without the teacher; by width search; and networks of the widths so found that are
trained from new weights. A quarter of the digits, and a fifth of the MNIST images, are the test, which nothing but
the last figure is measured on; of the rest a fifth is held out, by which candidates are compared, and four fifths
train every network, the teacher, too. MNIST is averaged over 2x2 pixels. ``--choose`` measures settings on held-out
images of another seed: those here are the best.

What is done is kept in the folder; the same command goes on from there, and ends with a table and ``growing.png``.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import platform
import time
from collections.abc import Callable
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import torch
import torch.nn.functional as F
from sklearn.model_selection import train_test_split
from torch import Tensor, nn

import netsurgery
from netsurgery.demo import accuracy, digits
from netsurgery.models import DigitsResNet
from netsurgery.passes import Distillation, WidenChannels
from netsurgery.search import WidthSearch
from netsurgery.search.fitting import Fitting
from netsurgery.search.split import read
from netsurgery.search.widths import reset_all, uniform

Rows = tuple[Tensor, Tensor]
SMALL, LARGE = (4, 8, 16), (32, 64, 128)
SHARE = 0.07  # of the teacher's parameters, as the paper's claim says
CHOOSING = 9  # the seed by which settings were chosen, none of those that are reported
SETTINGS: dict[str, dict[str, Any]] = {
    "digits": {"small": 20, "large": 15, "scratch": 40, "epochs": 8, "lr": 3e-3, "amount": 8, "candidates": 2},
    "mnist": {"small": 6, "large": 5, "scratch": 10, "epochs": 5, "lr": 3e-3, "amount": 12, "candidates": 2},
}
#: Tried by ``--choose``, each in place of the settings above.
CHOICES: tuple[dict[str, Any], ...] = (
    {"lr": 1e-3, "epochs": 4, "candidates": 3},
    {"lr": 3e-3, "epochs": 4, "candidates": 3},
    {"lr": 1e-2, "epochs": 4, "candidates": 3},
    {"lr": 3e-3, "epochs": 4, "candidates": 3, "amount": 4},
    {"lr": 3e-3, "epochs": 8, "candidates": 3},
    {"lr": 1e-2, "epochs": 8, "candidates": 2},
    {"lr": 1e-2, "epochs": 12, "candidates": 2, "amount": 12},
)
ROWS = (
    "small",
    "planted",
    "planted, teacher",
    "planted, teacher, then all trained",
    "planted widths, new weights",
    "planted widths, new weights, teacher",
    "uniform widths of that size, new weights, teacher",
    "widened",
    "widened widths, new weights",
    "uniform widths, new weights",
    "teacher",
)


def images(name: str, seed: int) -> tuple[Rows, Rows, Rows]:
    """Images to learn from, held out, and of the test."""
    if name == "digits":
        found = digits(seed)
        train, test = found.train, found.test
    else:
        from showcase import mnist

        train, test = ((F.avg_pool2d(x, 2), y) for x, y in mnist(seed))
    x, y = train
    learnt, held = train_test_split(range(len(y)), test_size=0.2, stratify=y, random_state=seed)
    return (x[learnt], y[learnt]), (x[held], y[held]), test


def fresh(widths: tuple[int, ...], seed: int) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return DigitsResNet(widths)


def renewed(model: nn.Module, seed: int) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        reset_all(model)
    return model


class Study:
    """One data set with one seed."""

    def __init__(self, name: str, seed: int, folder: Path, **changed: Any):
        self.name, self.seed, self.folder = name, seed, folder
        self.settings = {**SETTINGS[name], **changed}
        self.learn, self.held, self.test = images(name, seed)
        self.split = read(self.learn, self.held, seed)
        self.budget = {"params": int(SHARE * netsurgery.cost(fresh(LARGE, 0), self.learn[0][:1]).params)}

    def trained(self, model: nn.Module, epochs: int, teacher: nn.Module | None = None, lr: float = 3e-3) -> nn.Module:
        """As candidates are: AdamW, a learning rate that falls along a cosine."""
        distillation = None if teacher is None else Distillation()
        split = self.split if teacher is None else self.split.taught(teacher)
        Fitting(epochs, 64, torch.optim.AdamW, lr, None, distillation).fit(model, split, self.seed)
        return model.eval()

    def pair(self) -> tuple[nn.Module, nn.Module]:
        """The small network and the teacher."""
        small = self.trained(fresh(SMALL, self.seed), self.settings["small"])
        return small, self.trained(fresh(LARGE, self.seed), self.settings["large"])

    def grown(self, small: nn.Module, teacher: nn.Module | None) -> netsurgery.search.Growth:
        chosen = {key: self.settings[key] for key in ("epochs", "lr", "amount", "candidates")}
        return netsurgery.grow(
            small, self.learn, teacher, validation=self.held, budget=self.budget, log=None, seed=self.seed, **chosen
        )

    def widened(self, small: nn.Module) -> netsurgery.search.Widths:
        epochs = -(-self.settings["epochs"] // 2)  # all of the network is trained, which is dearer and learns faster
        search = WidthSearch(
            small,
            self.learn,
            validation=self.held,
            budget=self.budget,
            retrain=self.settings["scratch"],
            log=None,
            seed=self.seed,
            epochs=epochs,
            candidates=self.settings["candidates"],
        )
        return search.run()

    def uniform(self, small: nn.Module, most: int, teacher: nn.Module) -> nn.Module:
        """The small network with one factor on all widths, trained from new weights."""
        x = self.learn[0][:1]
        wider = uniform(WidenChannels(2), netsurgery.trace(small, x, try_sizes=False), most)
        assert wider is not None
        model = renewed(netsurgery.apply(small, [wider], x), self.seed)
        return self.trained(model, self.settings["scratch"], teacher)

    def row(self, name: str, model: nn.Module, seconds: float, **more: Any) -> dict[str, Any]:
        cost = netsurgery.cost(model, self.learn[0][:1])
        figures = {key: accuracy(model.eval(), rows) for key, rows in (("test", self.test), ("held", self.held))}
        found = {"data": self.name, "seed": self.seed, "row": name, "params": cost.params, "macs": cost.macs}
        return {**found, **figures, "seconds": round(seconds, 1), **more}

    def run(self, say: Callable[[dict[str, Any]], None]) -> None:
        """All rows."""
        begin = time.process_time()

        def spent() -> float:
            nonlocal begin
            begin, before = time.process_time(), begin
            return begin - before

        small, teacher = self.pair()
        say(self.row("small", small, spent()))
        say(self.row("teacher", teacher, 0.0))
        for name, one in (("planted, teacher", teacher), ("planted", None)):
            found = self.grown(small, one)
            rounds = found.history[1:]
            share = sum(each.surgery for each in rounds) / sum(each.seconds for each in rounds)
            say(
                self.row(
                    name,
                    found.model,
                    spent(),
                    surgery=round(share, 4),
                    widths=dict(found.best.widths),
                    rounds=len(rounds),
                    why=found.why,
                )
            )
            if one is None:
                continue
            model = self.trained(copy.deepcopy(found.model), self.settings["scratch"] // 2, teacher, lr=1e-3)
            say(self.row("planted, teacher, then all trained", model, spent()))
            for label, taught in (
                ("planted widths, new weights", None),
                ("planted widths, new weights, teacher", teacher),
            ):
                model = self.trained(renewed(found.model, self.seed), self.settings["scratch"], taught)
                say(self.row(label, model, spent()))
            model = self.uniform(small, found.best.params, teacher)
            say(self.row("uniform widths of that size, new weights, teacher", model, spent()))
        widths = self.widened(small)
        say(
            self.row(
                "widened", widths.growth.model, spent(), widths=widths.widths, rounds=len(widths.growth.history) - 1
            )
        )
        say(self.row("widened widths, new weights", widths.found.model, 0.0))
        say(self.row("uniform widths, new weights", widths.uniform.model, 0.0))


def choose(name: str, out: Path) -> None:
    """Accuracy on held-out images for some settings of planting with a teacher; the test images are not looked at."""
    base = Study(name, CHOOSING, out)
    small, teacher = base.pair()
    for changed in CHOICES:
        study = Study(name, CHOOSING, out, **changed)
        begin = time.process_time()
        best = study.grown(small, teacher).best
        taken = round(time.process_time() - begin, 1)
        print(
            flush=True,
            end=json.dumps({**changed, "loss": best.loss, "held": best.accuracy, "params": best.params, "s": taken})
            + "\n",
        )


def spread(values: list[float]) -> str:
    return f"{mean(values):.2f} ± {stdev(values) if len(values) > 1 else 0.0:.2f}"


def table(rows: list[dict[str, Any]]) -> str:
    """Mean and standard deviation over seeds."""
    lines = [
        "| network | parameters | of the teacher's | MACs | test accuracy % | CPU s |",
        "| --- " + "| ---: " * 5 + "|",
    ]
    for name in ROWS:
        own = [row for row in rows if row["row"] == name]
        if own:
            whole = next(row["params"] for row in rows if row["row"] == "teacher")
            params = round(mean(row["params"] for row in own))
            macs, cpu = round(mean(row["macs"] for row in own)), mean(row["seconds"] for row in own)
            test = spread([row["test"] for row in own])
            seconds = f"{cpu:.0f}" if cpu else "in another row"
            lines.append(f"| {name} | {params:,} | {params / whole:.1%} | {macs:,} | {test} | {seconds} |")
    return "\n".join(lines)


def picture(rows: list[dict[str, Any]], path: Path) -> None:
    """Test accuracy against parameters: a point for each seed, a larger one for the mean."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    names = list(dict.fromkeys(row["data"] for row in rows))
    figure = Figure(figsize=(6 * len(names), 5), dpi=100, layout="constrained")
    FigureCanvasAgg(figure)
    for axes, data in zip(figure.subplots(1, len(names), squeeze=False)[0], names, strict=True):
        for index, name in enumerate(ROWS):
            own = [row for row in rows if row["row"] == name and row["data"] == data]
            style: dict[str, Any] = {"color": f"C{index}", "marker": "osDp^vhPX<>"[index]}
            x, y = [row["params"] for row in own], [row["test"] for row in own]
            if own:
                axes.scatter(x, y, s=14, alpha=0.5, linewidths=0, **style)
                axes.scatter(mean(x), mean(y), s=70, label=name, **style)
        axes.set(xscale="log", xlabel="parameters", ylabel="test accuracy, %", title=data)
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.25)
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(names) + 1, frameon=False, fontsize=8)
    figure.savefig(path, format="png")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", nargs="*", default=[], help="digits, mnist, or both")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--out", type=Path, default=Path("runs/growing"))
    parser.add_argument("--choose", action="store_true")
    options = parser.parse_args()
    names = options.data or list(SETTINGS)
    if options.choose:
        for name in names:
            choose(name, options.out)
        return
    options.out.mkdir(parents=True, exist_ok=True)
    for name in names:
        for seed in options.seeds:
            done, new = options.out / f"{name}-{seed}.json", []
            if not done.exists():
                Study(name, seed, options.out).run(
                    lambda row, new=new: new.append(row) or print(json.dumps(row), flush=True)
                )
                done.write_text(json.dumps(new), encoding="utf-8")
    rows = [row for path in sorted(options.out.glob("*-*.json")) for row in json.loads(path.read_text())]
    where = (
        f"{platform.machine()}, {os.cpu_count()} cores, {torch.get_num_threads()} thread(s), torch {torch.__version__}"
    )
    print(f"{where}, load average {os.getloadavg()[0]:.1f} at the end")
    for name in dict.fromkeys(row["data"] for row in rows):
        own = [row for row in rows if row["data"] == name]
        print(f"\n{name}, {len({row['seed'] for row in own})} seeds:\n\n{table(own)}")
        shares = [row["surgery"] for row in own if "surgery" in row]
        print(f"\nSurgery's share of the time of planting: {mean(shares):.1%} (highest {max(shares):.1%})")
    picture(rows, options.out / "growing.png")


if __name__ == "__main__":
    main()

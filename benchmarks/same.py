"""What a refactoring must leave equal, on many networks: saved before it, compared after each step.

    OMP_NUM_THREADS=1 python benchmarks/same.py --save before.json
    OMP_NUM_THREADS=1 python benchmarks/same.py --compare before.json [--ignore locks,forwards]

The file holds of each model its groups with their members, the reasons of locks and the units that
``PruneChannels(0.5)`` selects. Then every open group is halved by magnitude, and the file holds the Edit as JSON, its
diff and summary, attributes of modules that change, the sources of rewritten forwards, the small model's state dict
(names, shapes and checksums), and whether the small model equals the silenced original. A refusal or an error is
compared by its text. Nothing but public names of netsurgery is used here, so that private modules can move.

Kinds are the lists of coverage_models.py and two more: ``zoo`` is tests/zoo.py, ``random`` are networks that hypothesis
draws. The default kinds take some seven CPU minutes. A file is for one machine and one release of torch: other kernels
round otherwise, and the order of nearly equal scores changes.
"""

import argparse
import difflib
import fnmatch
import functools
import inspect
import json
import sys
import time
import warnings
import zlib
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from importlib.metadata import version
from multiprocessing import get_context
from pathlib import Path
from typing import Any, ClassVar

import alive
import coverage_models
import torch
from hypothesis import HealthCheck, Phase, given, settings
from torch import nn

import netsurgery
from netsurgery.passes import MagnitudeScore, PruneChannels, RandomScore

sys.path.append(str(Path(__file__).resolve().parent.parent / "tests"))
import random_networks
import zoo

Key = tuple[str, str]  # kind and name of a model
Facts = dict[str, list[str]]  # lines by field

DEFAULT = "random,zoo,transformers"
THEMES = dict.fromkeys(random_networks.THEMES, 20)  # networks of each
BOUNDS = {"random": 1e-10, "zoo": 1e-5}  # of the difference to the silenced original; of other kinds:
BOUND = 1e-4
LARGE = 150_000_000  # parameters; models with more are looked at without weights


# Models ----------------------------------------------------------------------------------------------------------


@functools.cache
def programs(theme: str) -> list[random_networks.Program]:
    """Networks of a theme, the same in every run."""
    found: list[random_networks.Program] = []

    def collect(program: random_networks.Program) -> None:
        found.append(program)

    options = settings(
        max_examples=THEMES[theme], derandomize=True, deadline=None, database=None, phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )  # fmt: skip
    options(given(random_networks.programs(theme))(collect))()
    return found


def names(kind: str) -> list[str]:
    """The models of a kind."""
    if kind == "random":
        return [f"{theme} {index}" for theme, count in THEMES.items() for index in range(count)]
    return list(zoo.names()) if kind == "zoo" else coverage_models.names(kind)


def build(kind: str, name: str) -> tuple[nn.Module, Any]:
    """A model with random weights that leave it alive, and its inputs."""
    if kind == "random":
        theme, _, index = name.partition(" ")
        program = programs(theme)[int(index)]
        torch.manual_seed(0)
        return random_networks.build(program), random_networks.example(program)
    if kind == "zoo":
        return zoo.build(name), (zoo.images(name),)
    model, inputs = coverage_models.build(kind, name)
    alive.randomise(model, lambda model: coverage_models.call(model, inputs))
    return model, inputs


# What is compared ------------------------------------------------------------------------------------------------


def facts(kind: str, name: str) -> Facts:
    """All that is compared of a model, field by field; a refusal in place of what it prevents."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    model, inputs = build(kind, name)
    weights = sum(parameter.numel() for parameter in model.parameters()) <= LARGE
    model = model if weights else model.to("meta")
    network = netsurgery.trace(model, inputs)
    score = MagnitudeScore() if weights else RandomScore(seed=0)
    found = {**described(network), "selected": selected(model, [score, PruneChannels(0.5)], inputs)}
    try:
        edit = netsurgery.plan(model, [score, Halve()], inputs)
        small = netsurgery.rewrite(model, edit)
    except netsurgery.NetsurgeryError as error:
        return {**found, "refused": lines(error)}
    exact = exactness(netsurgery.verify(model, small, edit, inputs), kind) if weights else "not measured"
    return {**found, **carried_out(model, small, edit), "exact": [exact]}


@dataclass(frozen=True)
class Halve(netsurgery.Pass):
    """Keep the half of the units of every open group that has the highest scores."""

    needs: ClassVar[frozenset[str]] = frozenset({"scores"})
    gives: ClassVar[frozenset[str]] = frozenset({"edit"})

    def run(self, network: netsurgery.Network) -> netsurgery.Edit:
        ranked = {g.name: network.scores[g.name].argsort(descending=True, stable=True) for g in network.prunable}
        return netsurgery.Edit(
            network, {n: sorted(order[: -(-len(order) // 2)].tolist()) for n, order in ranked.items()}
        )


def selected(model: nn.Module, passes: Sequence[netsurgery.Pass], inputs: Any) -> list[str]:
    """The units that passes keep, or why they cannot."""
    try:
        return netsurgery.plan(model, passes, inputs).to_json().replace("}, ", "},\n").splitlines()
    except netsurgery.NetsurgeryError as error:
        return lines(error)


def lines(error: BaseException) -> list[str]:
    """An error as a fact."""
    return f"{type(error).__name__}: {error}".splitlines()


def described(network: netsurgery.Network) -> Facts:
    """The groups of a network, and why some are locked."""
    groups = []
    for group in network.groups:
        groups.append(f"{group.name}: {group.size} of unit {group.unit}")
        groups.extend(f"    {member.parameter} {member.axis} {member.role}" for member in group.members)
    return {
        "groups": groups,
        "locks": [f"{group.name}: {group.locked}" for group in network.groups if group.locked is not None],
        "equal sizes": [", ".join(tied) for tied in network.equal_sizes],
    }


def carried_out(model: nn.Module, small: nn.Module, edit: netsurgery.Edit) -> Facts:
    """An edit and the model that it leaves."""
    forwards = [
        line
        for path, why in edit.replaced.items()
        for line in (
            f"# {path}: {why}",
            *inspect.getsource(type(small.get_submodule(path)).forward).splitlines(),
        )
    ]
    return {
        "edit": edit.to_json().replace("}, ", "},\n").splitlines(),
        "diff": edit.diff().splitlines(),
        "summary": edit.summary().splitlines(),
        "attributes": attributes(model, small),
        "forwards": forwards,
        "state": [f"{name} {tuple(tensor.shape)} {checksum(tensor)}" for name, tensor in small.state_dict().items()],
    }


def checksum(tensor: torch.Tensor) -> str:
    """Eight digits that change with any bit of a tensor, if it has data."""
    return "" if tensor.is_meta else f"{zlib.crc32(tensor.cpu().flatten().view(torch.uint8).numpy()):08x}"


def attributes(model: nn.Module, small: nn.Module) -> list[str]:
    """Numbers, and lists of them, that modules of the small model hold and others than the model's."""
    pairs = zip(model.named_modules(), small.modules(), strict=True)
    return [
        f"{path}.{name}: {value} -> {vars(after)[name]}".lstrip(".")
        for (path, before), after in pairs
        for name, value in vars(before).items()
        if isinstance(value, int | float | tuple | list) and str(vars(after).get(name, value)) != str(value)
    ]


def exactness(difference: float, kind: str) -> str:
    """Rounding may change; whether a network is exact may not."""
    bound = BOUNDS.get(kind, BOUND)
    return f"exact to {bound}" if difference <= bound else f"differs by {difference:.0e}, more than {bound}"


def differences(before: Facts, after: Facts, ignored: Sequence[str]) -> dict[str, list[str]]:
    """By field: the lines of a unified diff."""
    fields = [field for field in {**before, **after} if field not in ignored]
    return {
        field: list(difflib.unified_diff(before.get(field, []), after.get(field, []), n=0, lineterm=""))[2:]
        for field in fields
        if before.get(field) != after.get(field)
    }


# Running ---------------------------------------------------------------------------------------------------------


def measured(keys: Sequence[Key], jobs: int) -> Iterator[tuple[str, Facts, float]]:
    """Each model as it gets ready, with its facts and seconds; an error that is none of netsurgery's is a fact, too."""
    with ProcessPoolExecutor(jobs, mp_context=get_context("fork")) as pool:
        futures = {pool.submit(timed, *key): ": ".join(key) for key in keys}
        for future in as_completed(futures):
            error = future.exception()
            yield futures[future], *(future.result() if error is None else ({"error": lines(error)}, 0.0))


def timed(kind: str, name: str) -> tuple[Facts, float]:
    """The facts of a model and the CPU seconds that they took."""
    start = time.process_time()
    return facts(kind, name), time.process_time() - start


def chosen(kinds: str, patterns: str) -> list[Key]:
    """The models of some kinds (or of all) whose names fit one of the patterns."""
    listed = ["random", "zoo", *coverage_models.KINDS] if kinds == "all" else kinds.split(",")
    keys = [(kind, name) for kind in listed for name in names(kind)]
    return [key for key in keys if any(fnmatch.fnmatchcase(key[1], one) for one in patterns.split(","))]


def show(found: dict[str, list[str]], most: int) -> None:
    """The differences of a model, at most so many lines a field."""
    for field, lines in found.items():
        print(f"  {field}:")
        print("\n".join(f"    {line}" for line in lines[:most]))
        if len(lines) > most:
            print(f"    ... {len(lines) - most} more lines")


def main() -> int:
    """Save, or compare, or both; the exit status is 1 where anything differs."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--save", type=Path, metavar="FILE", help="file to write")
    parser.add_argument("--compare", type=Path, metavar="FILE", help="file to compare with: the models that it has")
    parser.add_argument("--kind", help=f"kinds of models, or all (default {DEFAULT}, or all that the file has)")
    parser.add_argument("--models", default="*", help="patterns of names, such as resnet*,densenet121")
    parser.add_argument("--ignore", default="", help="fields that may differ, such as locks,summary")
    parser.add_argument("--lines", type=int, default=20, help="most lines that are shown of a field of a model")
    parser.add_argument("--jobs", type=int, default=1, help="processes")
    options = parser.parse_args()
    if options.save is None and options.compare is None:
        parser.error("--save FILE, --compare FILE, or both")
    before = json.loads(options.compare.read_text()) if options.compare else {}
    keys = chosen(options.kind or ("all" if before else DEFAULT), options.models)
    keys = [key for key in keys if not before or ": ".join(key) in before["models"]]
    made = {"torch": torch.__version__, "hypothesis": version("hypothesis")}
    if before and before["made"] != made:
        print(f"the file is of {before['made']}, this is {made}: differences may be theirs")
    after: dict[str, Facts] = {}
    differing = 0
    for number, (model, found, seconds) in enumerate(measured(keys, options.jobs), start=1):
        after[model] = found
        unequal = differences(before["models"][model], found, options.ignore.split(",")) if before else {}
        differing += bool(unequal)
        said = "; ".join(line for field in ("exact", "refused", "error") for line in found.get(field, []))
        verdict = "" if not before else "  DIFFERS" if unequal else "  same   "
        print(f"{number:4}/{len(keys)}{verdict}  {seconds:5.1f} s  {model}: {said[:150]}", flush=True)
        show(unequal, options.lines)
    if options.save:
        ordered = {": ".join(key): after[": ".join(key)] for key in keys}
        options.save.write_text(json.dumps({"made": made, "models": ordered}, indent=0) + "\n")
    if before:
        print(f"{differing} of {len(keys)} models differ")
    return int(differing > 0)


if __name__ == "__main__":
    sys.exit(main())

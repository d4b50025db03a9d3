"""A recipe: settings of training, penalty, removal or growth, and fine-tuning; variants make it a comparison.

Tables of a file are laid over each other, `[variants.NAME]` over the rest; where both say `name` and differ, the later
table replaces the whole; `false` takes a table away. Every table is checked before anything runs.
"""

from __future__ import annotations

import json
import re
import tomllib
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from importlib.resources import files
from pathlib import Path
from typing import Literal, cast

import torch
import yaml

import netsurgery.passes
import netsurgery.search
from netsurgery.errors import InputError
from netsurgery.pipeline import Pass
from netsurgery.training.options import Arguments, Place, Table, check, near, parameters
from netsurgery.training.schedules import SCHEDULES

__all__ = ["Data", "Engine", "Model", "Recipe", "Stage", "Teacher", "Variant", "read", "shipped"]

NAMES = re.compile(r"\w[\w +.-]*")
BARE = re.compile(r"[\w-]+")
PART = re.compile(r"""\s*"[^"]*"\s*|\s*'[^']*'\s*|[^."'=]+""")
CHANGE = re.compile(rf"((?:{PART.pattern})(?:\.(?:{PART.pattern}))*)=")
SUPPLIED = ("data", "model", "example_inputs", "inputs", "optimizer", "epochs", "file")  # by the run, not the recipe
OF_GROWTH = ("net", "data", "teacher", "example_inputs", "log", "threads", "seed", "progress")  # likewise
UNFIT = ("Optimizer", "LBFGS", "SparseAdam")  # LBFGS wants a closure, SparseAdam sparse gradients
OPTIMIZERS = {
    name: cls
    for name, cls in vars(torch.optim).items()
    if isinstance(cls, type) and issubclass(cls, torch.optim.Optimizer) and name not in UNFIT
}
GROWTHS = {"planting": netsurgery.search.grow, "widths": netsurgery.search.WidthSearch}
PASSES = {name: cls for name, cls in vars(netsurgery.passes).items() if isinstance(cls, type) and issubclass(cls, Pass)}


@dataclass(frozen=True)
class Data:
    """The data set; `batch` images in a step over all processes; `limit`: so many training images, evenly spread."""

    name: Literal["digits", "cifar10", "cifar100", "stl10", "tinyimagenet", "mnist-5k"]
    batch: int = 128
    augment: bool = True
    workers: int = 0
    limit: int | None = None
    folder: str | None = None


@dataclass(frozen=True)
class Model:
    """A name as for `netsurgery inspect`, and the arguments it is called with."""

    name: str
    arguments: Table = field(default_factory=dict)


@dataclass(frozen=True)
class Stage:
    """Some epochs of training: a torch.optim optimizer, and a schedule of the learning rate."""

    epochs: int = 0
    optimizer: Table = field(default_factory=dict)
    schedule: Table = field(default_factory=dict)


@dataclass(frozen=True)
class Teacher:
    """A larger network, and how it is trained before the growth."""

    model: Model
    train: Stage


@dataclass(frozen=True)
class Engine:
    """Settings of accelerate; those that are not given are those of `accelerate config` and `accelerate launch`."""

    mixed_precision: Literal["no", "fp16", "bf16"] | None = None
    accumulate: int = 1


@dataclass(frozen=True)
class Variant:
    """One way through the pipeline. Tables are empty where their step is left out."""

    data: Data
    model: Model
    train: Stage
    finetune: Stage
    penalty: Table
    soft: Table
    selection: Table
    removal: Table
    growth: Table = field(default_factory=dict)
    teacher: Teacher | None = None

    @property
    def training(self) -> str:
        """A key that variants share if they can share a trained network."""
        return self._shared("data", "model", "train", "penalty", "soft")

    @property
    def teaching(self) -> str:
        """A key that variants share if they can share a teacher."""
        return self._shared("data", "teacher")

    def _shared(self, *keys: str) -> str:
        held_out = bool(self.growth)  # a part of the training images, by which candidates are compared
        found = {key: value for key, value in asdict(self).items() if key in keys}
        return json.dumps({**found, "held out": held_out}, sort_keys=True)


@dataclass(frozen=True)
class Recipe:
    """A recipe, as `read` makes it of a file."""

    name: str
    seeds: Sequence[int]
    engine: Engine
    variants: Mapping[str, Variant]

    @property
    def fixed(self) -> Arguments:
        """All that the result of a run depends on: not the seeds, of which there may be more, nor where data lies."""
        found = cast(Arguments, json.loads(json.dumps({k: v for k, v in asdict(self).items() if k != "seeds"})))
        for variant in found["variants"].values():
            del variant["data"]["folder"], variant["data"]["workers"]
        return found


def shipped() -> list[str]:
    """The names of the recipes that come with netsurgery."""
    return sorted(path.name.removesuffix(".toml") for path in (files("netsurgery") / "recipes").iterdir())


def read(source: str, changes: Sequence[str] = ()) -> Recipe:
    """Read and check a recipe.

    Args:
        source: a TOML or YAML file, or the name of a recipe that is shipped.
        changes: `key.path=value` each; a value is written as in TOML, and is a text if it is not that.

    Raises:
        InputError: no such file, no such table or key, a value of the wrong type, with the file, the table and the key;
            a change that every variant overrides.
    """
    file, raw = parse(source)
    there_before = set(raw)
    for change in changes:
        raw = merged_tables(raw, setting(change))
    place = Place(file)
    there = {**parameters(_top), **parameters(_tables)}
    if unknown := next((key for key in raw if key not in there), None):
        raise place.error(f"no key '{unknown}'{near(unknown, there)}; there are: {', '.join(there)}")
    variants = raw.pop("variants", None) or {}
    top = {key: raw.pop(key) for key in ("name", "seeds", "engine") if key in raw}
    check(_top, top, place)
    if not isinstance(variants, Mapping):
        raise place.error(f"variants: expected a table of tables, got {variants!r}")
    name = top.get("name", Path(file).name.partition(".")[0])
    if not NAMES.fullmatch(name):
        raise place.error(f"name = {name!r}: letters, digits, spaces and +-. only, as it names a folder")
    seeds = tuple(top.get("seeds", (0,)))
    if not seeds or len(set(seeds)) < len(seeds) or not all(0 <= seed < 2**32 for seed in seeds):
        raise place.error(f"seeds = {list(seeds)}: at least one, each once, and none below 0")
    laid = laid_over(raw, variants, there_before)
    for change in changes:
        check_arrival(change, raw, variants, laid)
    made = {} if variants else {name: variant(raw, place)}
    for key, table in variants.items():
        inside = place.at("variants").at(key)
        if not isinstance(table, Mapping) or not NAMES.fullmatch(key):
            raise inside.error("expected a table whose name has letters, digits, spaces and +-. only")
        made[key] = variant(laid[key], inside, table)
    engine = Engine(**check(Engine, top.get("engine", {}), place.at("engine")))
    return Recipe(name, seeds, engine, made)


def _top(
    name: str = "",
    seeds: Sequence[int] = (0,),
    engine: Table | None = None,
    variants: Table | None = None,
) -> None:
    """The keys at the top of a recipe beside the tables of a variant."""


def parse(source: str) -> tuple[str, Arguments]:
    """The name of a file and its tables."""
    path = Path(source)
    if source in shipped():
        path = Path(str(files("netsurgery") / "recipes" / f"{source}.toml"))
    elif not path.is_file():
        there = ", ".join(shipped())
        raise InputError(
            f"no recipe '{source}': pass a .toml or .yaml file, or one of {there}{near(source, shipped())}"
        )
    try:
        text = path.read_text(encoding="utf-8")
        raw = tomllib.loads(text) if path.suffix == ".toml" else yaml.load(text, _Yaml)
    except (UnicodeDecodeError, tomllib.TOMLDecodeError, yaml.YAMLError) as error:
        raise InputError(f"{path.name}: {error}") from error
    if not isinstance(raw, dict):
        raise InputError(f"{path.name}: expected tables, got {type(raw).__name__}")
    if odd := list(odd_keys(raw)):
        raise InputError(f"{path.name}: the key {odd[0]!r} is no text: put it into quotes")
    return path.name, raw


class _Yaml(yaml.SafeLoader):  # type: ignore[misc]
    """Reads 1e-3 as a number, as TOML does; YAML 1.1 wants 1.0e-3."""


_Yaml.add_implicit_resolver("tag:yaml.org,2002:float", re.compile(r"[-+]?\d+(\.\d*)?[eE][-+]?\d+$"), [*"-+0123456789"])


def odd_keys(value: object) -> Iterator[object]:
    """Keys that are no texts, at any depth."""
    if isinstance(value, dict):
        yield from (key for key in value if not isinstance(key, str))
    for one in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
        yield from odd_keys(one)


def laid_over(raw: Table, variants: Table, file: Collection[str]) -> dict[str, Arguments]:
    """The tables of each variant. A part of a table that only variants have is for those that have it.

    Args:
        raw: tables that variants share, with changes.
        file: the names of those that were there before the changes.
    """
    own = {key: table for key, table in variants.items() if isinstance(table, Mapping)}
    theirs = {key for table in own.values() for key in table if key not in file and isinstance(raw.get(key), Mapping)}
    return {
        name: merged_tables({key: one for key, one in raw.items() if key not in theirs or key in table}, table)
        for name, table in own.items()
    }


def check_arrival(change: str, raw: Table, variants: Table, laid: Mapping[str, Table]) -> None:
    """Raise InputError for a change of a shared table that all variants override."""
    nested = setting(change)
    if not laid or next(iter(nested)) not in parameters(_tables):
        return
    for path in paths(nested):
        if any(value_at(table, path) == value_at(raw, path) for table in laid.values()):
            continue
        owners = [name for name, table in variants.items() if isinstance(table, Mapping) and path[0] in table]
        owner = min(owners, key=lambda name: BARE.fullmatch(name) is None)
        quoted = owner if BARE.fullmatch(owner) else f'"{owner}"'
        raise InputError(
            f"--set {change}: the variants set [{path[0]}] themselves, so this changes none of them: name the variant, "
            f"as in --set 'variants.{quoted}.{change}'"
        )


def paths(nested: Table) -> Iterator[tuple[str, ...]]:
    """The keys that lead to each value in nested tables."""
    for key, value in nested.items():
        if isinstance(value, Mapping):
            yield from ((key, *rest) for rest in paths(value))
        else:
            yield (key,)


def value_at(table: object, path: Sequence[str]) -> object:
    """The value at a path of keys; None where there is none."""
    for key in path:
        table = table.get(key) if isinstance(table, Mapping) else None
    return table


def setting(change: str) -> Arguments:
    """`a.b=1` as nested tables; parts of the key may stand in quotes, as in TOML."""
    found = CHANGE.match(change)
    if not found:
        raise InputError(f"--set {change}: write key.path=value, such as train.epochs=3")
    text = change[found.end() :]
    try:
        value: object = tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        value = text
    for part in reversed(PART.findall(found[1])):
        value = {part.strip().strip("\"'"): value}
    return cast(Arguments, value)


def merged_tables(below: Table, above: Table) -> Arguments:
    """One table over another, and so on inside."""
    merged = dict(below)
    for key, value in above.items():
        old = below.get(key)
        both = isinstance(value, Mapping) and isinstance(old, Mapping)
        if both and value.get("name", old.get("name")) == old.get("name"):  # type: ignore[union-attr]
            merged[key] = merged_tables(old, value)  # type: ignore[arg-type]
        else:
            merged[key] = merged_tables({}, value) if isinstance(value, Mapping) else value
    return merged


def variant(raw: Table, place: Place, own: Table | None = None) -> Variant:
    """Check the tables of a variant; errors in tables that it shares name the place outside of it."""
    tables = {key: value for key, value in raw.items() if value is not False}
    check(_tables, tables, place)
    places = {key: (place if own is None or key in own else Place(place.file)).at(key) for key in parameters(_tables)}
    made = Variant(
        data=Data(**check(Data, tables["data"], places["data"])),
        model=Model(**check(Model, tables["model"], places["model"])),
        train=stage(tables["train"], places["train"]),
        finetune=stage(tables.get("finetune", {}), places["finetune"]),
        penalty=named(tables, "penalty", places, "HGSR"),
        soft=named(tables, "soft", places, "SoftPruning"),
        selection=named(tables, "selection", places),
        removal=named(tables, "removal", places, "PruneChannels"),
        growth=growth(tables, places["growth"]),
        teacher=teacher(tables, places["teacher"]),
    )
    if made.data.batch < 1 or made.data.workers < 0 or (made.data.limit is not None and made.data.limit < 1):
        raise places["data"].error("batch and limit are at least 1, workers at least 0")
    if made.soft and made.selection:
        raise place.error("soft pruning selects as it trains: take one of [soft] and [selection] away (= false)")
    if made.growth and (made.soft or made.selection or made.removal):
        raise place.error("[growth] stands alone: take [soft], [selection] and [removal] away (= false)")
    if made.teacher and made.growth.get("name") != "planting":
        raise place.error('[teacher] teaches what is planted: add [growth] with name = "planting", or drop it')
    if bool(made.removal) != bool(made.selection and "edit" not in PASSES[made.selection["name"]].gives):
        raise place.error("[selection] and [removal] go together, unless the selection removes: add or drop one")
    return made


def _tables(
    data: Table,
    model: Table,
    train: Table,
    finetune: Table | None = None,
    penalty: Table | None = None,
    soft: Table | None = None,
    selection: Table | None = None,
    removal: Table | None = None,
    growth: Table | None = None,
    teacher: Table | None = None,
) -> None:
    """The tables of a variant."""


def stage(table: Table, place: Place) -> Stage:
    """Check a stage, its optimizer and its schedule."""
    found = Stage(**check(Stage, table, place))
    if found.epochs < 0:
        raise place.error(f"epochs = {found.epochs}: at least 0")
    optimizer = {"name": "SGD", **found.optimizer}
    schedule = {"name": "constant", **found.schedule}
    among(OPTIMIZERS, optimizer, place.at("optimizer"), ("params", "maximize", "differentiable"))
    among(SCHEDULES, schedule, place.at("schedule"))
    return Stage(found.epochs, optimizer, schedule)


def growth(tables: Table, place: Place) -> Arguments:
    """Check the table of a growth, if it is there."""
    table = dict(tables.get("growth", {}))
    if table:
        among(GROWTHS, table, place, OF_GROWTH)
    return table


def teacher(tables: Table, place: Place) -> Teacher | None:
    """Check the table of a teacher, if it is there."""
    if "teacher" not in tables:
        return None
    found = check(_teacher, tables["teacher"], place)
    model = Model(**check(Model, found["model"], place.at("model")))
    return Teacher(model, stage(found["train"], place.at("train")))


def _teacher(model: Table, train: Table) -> None:
    """The tables of a teacher."""


def named(tables: Table, key: str, places: Mapping[str, Place], default: str | None = None) -> Arguments:
    """Check the table of a pass, of the penalty or of soft pruning, if it is there."""
    if key not in tables:
        return {}
    there = PASSES if key in ("selection", "removal") else {default: getattr(netsurgery.passes, str(default), None)}
    table = {"name": default, **tables[key]} if default else dict(tables[key])
    among(cast(Table, there), table, places[key], SUPPLIED)
    return table


def among(there: Table, table: Table, place: Place, given: Sequence[str] = ()) -> None:
    """Check that a table names one of these, and holds what it takes."""
    name = table.get("name")
    if not isinstance(name, str) or there.get(name) is None:
        hint = near(name, there) if isinstance(name, str) else ""
        raise place.error(f"name = {name!r}: expected one of {', '.join(sorted(there))}{hint}")
    check(there[name], {key: value for key, value in table.items() if key != "name"}, place, given)

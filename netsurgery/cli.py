"""The command line: `netsurgery demo | inspect | prune | rules | train`."""

import copy
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text
from torch import nn
from typer.core import TyperGroup

import netsurgery
from netsurgery.errors import InputError, NetsurgeryError

__all__ = ["app", "main"]

TOLERANCE = 1e-3  # float32 rounding through the deepest networks stays far below, a wrong unit far above
console = Console()
problems = Console(stderr=True)


class ClearErrors(TyperGroup):
    """Prints an error that netsurgery raised on purpose, and an interruption, as one message without a traceback."""

    def invoke(self, ctx: Any) -> object:
        """Run the command; exit with code 1 where it raises a NetsurgeryError, 130 where it is interrupted."""
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt as stop:
            problems.print(Text(f"interrupted: {stop}" if str(stop) else "interrupted"), soft_wrap=True)
            raise typer.Exit(130) from stop
        except NetsurgeryError as error:
            hint = " (here: --input SHAPE)" if "pass example_inputs" in str(error) else ""
            hint += " by --out" if str(error).endswith("pass another folder") else ""
            problems.print(Text(f"error: {error}{hint}", style="red"), soft_wrap=True)
            raise typer.Exit(1) from error


app = typer.Typer(cls=ClearErrors, no_args_is_help=True, add_completion=False, pretty_exceptions_show_locals=False)

Option = typer.Option
Model = Annotated[
    str,
    typer.Argument(
        metavar="MODEL", help="torchvision:NAME, timm:NAME, either with @WEIGHTS, or package.module:callable."
    ),
]
WeightsFile = Annotated[
    Path | None,
    Option("--weights", metavar="FILE", help="Weights to load: safetensors, or a state dict of torch.save."),
]
RandomWeights = Annotated[bool, Option("--random-weights", help="Prune random weights.")]
Shape = Annotated[str | None, Option("--input", metavar="SHAPE", help="As in 1x3x224x224; inferred where possible.")]
Seed = Annotated[int, Option(metavar="N", help="Fixes everything random.")]
Ratio = Annotated[float | None, Option(metavar="R", help="Share of the channels that goes, in [0, 1).")]
Params = Annotated[str | None, Option(metavar="P", help="Parameters that stay: 0.5 (a share) or 2000000.")]
Macs = Annotated[str | None, Option(metavar="M", help="MACs that stay: 0.5 (a share) or 900000000.")]
Score = Annotated[Literal["hgsr", "magnitude", "random"], Option(help="What ranks the channels.")]
Scope = Annotated[Literal["layer", "global"], Option(help="Rank within groups or across them.")]
Multiple = Annotated[int, Option(metavar="N", help="Widths that stay are multiples of this.")]
Include = Annotated[list[str] | None, Option(metavar="PATTERN", help="Modules to prune; repeatable.")]
Exclude = Annotated[list[str] | None, Option(metavar="PATTERN", help="Modules to leave whole; repeatable.")]
DryRun = Annotated[bool, Option("--dry-run", help="Print the plan only.")]
Small = Annotated[Path | None, Option(metavar="DIR", help="Folder for weights.pt and edit.json.")]
Results = Annotated[Path | None, Option(metavar="DIR", help="Folder for the table (JSON) and a plot.")]
RecipeFile = Annotated[
    str,
    typer.Argument(
        metavar="RECIPE",
        help="A .toml or .yaml file, or digits, cifar10, cifar100, stl10, tinyimagenet; digits-planting, "
        "mnist-planting, stl10-planting grow a network.",
    ),
]
Out = Annotated[Path | None, Option(metavar="DIR", help="Folder for all results; runs/NAME by default.")]
DataFolder = Annotated[Path | None, Option("--data", metavar="DIR", help="Where the data set is; ./data by default.")]
Download = Annotated[bool, Option("--download", help="Fetch the data set where it is missing.")]
Seeds = Annotated[str | None, Option(metavar="N,N", help="Seeds instead of the recipe's.")]
Changes = Annotated[
    list[str] | None,
    Option("--set", metavar="KEY=VALUE", help="As in train.epochs=3, or variants.planted.growth.epochs=1; repeatable."),
]


def version(wanted: bool) -> None:
    """Print the version and leave."""
    if wanted:
        console.print(netsurgery.__version__, highlight=False)
        raise typer.Exit


@app.callback()
def root(_: Annotated[bool, Option("--version", callback=version, is_eager=True, help="Print it.")] = False) -> None:
    """Exact structural surgery on PyTorch networks."""


@app.command()
def demo(seed: Seed = 0, out: Results = None) -> None:
    """Train a small network on handwritten digits, halve it, fine-tune, verify."""
    from netsurgery.demo import run

    run(seed, out, console)


@app.command()
def inspect(model: Model, shape: Shape = None) -> None:
    """Show what is coupled in a network, what is locked and why, and what it costs."""
    from netsurgery.model_lookup import build, example

    with console.status("tracing"):
        network = netsurgery.trace(build(model), example(shape) if shape else None)
    for part in (str(network), "", str(network.cost())):
        console.print(Text(part), soft_wrap=True)


@app.command()
def prune(
    model: Model,
    weights: WeightsFile = None,
    random_weights: RandomWeights = False,
    ratio: Ratio = None,
    params: Params = None,
    macs: Macs = None,
    score: Score = "hgsr",
    scope: Scope = "layer",
    multiple_of: Multiple = 1,
    include: Include = None,
    exclude: Exclude = None,
    shape: Shape = None,
    seed: Seed = 0,
    dry_run: DryRun = False,
    out: Small = None,
) -> None:
    """Remove channels under a ratio or a budget, and prove that nothing else changed."""
    if sum(value is not None for value in (ratio, params, macs)) != 1:
        raise InputError("say how much goes by exactly one of --ratio, --params and --macs")
    if dry_run and out:
        raise InputError("--dry-run writes nothing; leave one of --dry-run and --out out")
    from netsurgery.model_lookup import example
    from netsurgery.outputs import check_writable
    from netsurgery.passes import HGSRScore, MagnitudeScore, PruneChannels, RandomScore
    from netsurgery.weight_sources import prepared

    scores = {"hgsr": HGSRScore(), "magnitude": MagnitudeScore(), "random": RandomScore(seed=seed)}
    selection = PruneChannels(
        ratio,
        params=budget("--params", params),
        macs=budget("--macs", macs),
        scope=scope,
        multiple_of=multiple_of,
        include=tuple(include or ()),
        exclude=tuple(exclude or ()),
    )
    if out:
        check_writable(out, ("weights.pt", "edit.json"))
    torch.manual_seed(seed)
    inputs = example(shape, seed) if shape else None
    with console.status("loading"):
        original, source = prepared(model, weights, random_weights)
    with console.status("tracing and planning"):
        edit = netsurgery.plan(original, [scores[score], selection], inputs)
    check_removes(edit, {"--ratio": ratio, "--params": params, "--macs": macs, "--multiple-of": multiple_of})
    console.print(Text(f"weights: {source}"), soft_wrap=True)
    console.print(widths(edit), costs(edit))
    console.print(Text(edit.summary()), soft_wrap=True)
    if dry_run:
        return
    with console.status("cutting and verifying"):
        small = netsurgery.rewrite(original, edit)
        rough = perturb_constants(original)
        pairs = ((original, small), (rough, netsurgery.rewrite(rough, edit)))
        errors = [netsurgery.verify(before, after, edit, inputs) for before, after in pairs]
    error = max(errors, key=lambda one: (one != one, one))  # what is not a number is worse than any
    if not error < TOLERANCE:
        raise NetsurgeryError(f"the pruned network differs from the silenced original by {error:.1e} (relative)")
    proof = f"verify: the pruned network differs from the silenced original by {error:.1e} at most (relative)."
    console.print(proof, soft_wrap=True)
    if out:
        netsurgery.save(out, small, edit)
        files = f"{out / 'weights.pt'} and {out / 'edit.json'}"
        console.print(f'Wrote {files}; netsurgery.load("{out}", model) reads them.', soft_wrap=True)


@app.command()
def rules() -> None:
    """List the operators that have a rule, and what the rule says."""
    from netsurgery.analysis.rules import table

    view = Table("operator", "rule")
    for operator, rule in table():
        view.add_row(Text(operator), Text(rule))
    console.print(view)


@app.command()
def train(
    recipe: RecipeFile,
    out: Out = None,
    data: DataFolder = None,
    download: Download = False,
    seeds: Seeds = None,
    changes: Changes = None,
) -> None:
    """Carry out a recipe: train, remove, fine-tune, compare. An interrupted run is continued."""
    from netsurgery.training import read, run

    given = [*(changes or ()), *([f"data.folder={data}"] if data else ()), *([f"seeds=[{seeds}]"] if seeds else ())]
    found = read(recipe, given)
    run(found, out or Path("runs") / found.name, console, download)


def budget(option: str, text: str | None) -> float | int | None:
    """A share where the text has a decimal point, else an absolute number."""
    try:
        return None if text is None else float(text) if "." in text else int(text.replace("_", ""))
    except ValueError:
        raise InputError(f"{option} {text}: write a share such as 0.5 or a whole number such as 2000000") from None


def check_removes(edit: netsurgery.Edit, options: dict[str, object]) -> None:
    """Raise InputError where an edit removes nothing."""
    if edit.keep:
        return
    asked = " ".join(f"{name} {value}" for name, value in options.items() if value not in (None, 1))
    largest = max(edit.network.prunable, key=lambda group: group.size)
    raise InputError(
        f"{asked} removes nothing: {edit.network.model_name} has {edit.before.params:,} parameters and "
        f"{edit.before.macs:,} MACs, its largest group that may be cut, '{largest.name}', has {largest.size:,} units: "
        "ask for more to go, or for a smaller --multiple-of"
    )


def perturb_constants(model: nn.Module) -> nn.Module:
    """A copy without constant tensors: fresh norms and zeroed heads would hide a difference from the proof."""
    rough = copy.deepcopy(model)
    for tensor in (*rough.parameters(), *rough.buffers()):
        if tensor.is_floating_point() and tensor.numel() and bool((tensor == tensor.flatten()[0]).all()):
            tensor.data += 0.1 * tensor.data.new_empty(tensor.shape).uniform_()
    return rough


def widths(edit: netsurgery.Edit) -> Table:
    """Units before and after, for each group that the edit touches."""
    view = Table(title="Groups that are cut")
    view.add_column("group", overflow="fold")
    for name in ("units", "stay", "kept"):
        view.add_column(name, justify="right")
    for group in edit.network.groups:
        stay = len(edit.keep.get(group.name, range(group.size)))
        if stay < group.size:
            view.add_row(Text(group.name), f"{group.size:,}", f"{stay:,}", f"{stay / group.size:.1%}")
    return view


def costs(edit: netsurgery.Edit) -> Table:
    """Parameters and MACs before and after."""
    view = Table("", title="Cost")
    for name in ("before", "after", "kept"):
        view.add_column(name, justify="right")
    before, after = edit.before, edit.after
    for label, old, new in (("parameters", before.params, after.params), ("MACs", before.macs, after.macs)):
        view.add_row(label, f"{old:,}", f"{new:,}", f"{new / old:.1%}" if old else "")
    return view


def main() -> None:
    """Entry point of the `netsurgery` command."""
    app()


if __name__ == "__main__":  # for accelerate launch -m netsurgery.cli train RECIPE
    main()

"""The command line: what each command prints and writes, and the text of each error."""

import math
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn
from typer.testing import CliRunner, Result

import netsurgery
from netsurgery.cli import app
from netsurgery.outputs import check_writable
from netsurgery.passes import HGSRScore, MagnitudeScore, PruneChannels, RandomScore
from netsurgery.training.recipe import shipped

TINY = """
import torch
from torch import nn


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv1 = nn.Conv2d(3, 8, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(8)
        self.conv2 = nn.Conv2d(8, 16, 3, padding=1)
        self.head = nn.Linear(16, 5)

    def forward(self, x):
        x = torch.relu(self.bn1(self.conv1(x)))
        return self.head(torch.relu(self.conv2(x)).mean((2, 3)))


class Settings:
    width = 8


def sized(width):
    return Net()


def text():
    return "no network"


def nothing_to_prune():
    return nn.Sequential(nn.Linear(3, 5))


class Odd(nn.Module):
    def forward(self, x, y):
        return x @ y


class Flat(Net):
    def __init__(self):
        super().__init__()
        self.width = 8
        self.inner = nn.Conv2d(16, 8, 1)
        self.last = nn.Linear(8, 5)

    def forward(self, x):
        x = torch.relu(self.bn1(self.conv1(x)))
        if x.shape[1] < 8:
            raise ValueError("too narrow")
        return self.last(self.inner(torch.relu(self.conv2(x))).mean((2, 3)))


ready = Net()
"""


@pytest.fixture(autouse=True)
def tiny(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A module `tiny_models` in the current directory, which is on the path as it is for `python -m`."""
    (tmp_path / "tiny_models.py").write_text(TINY)
    (tmp_path / "needy_models.py").write_text("import a_package_nobody_has\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "tiny_models", raising=False)
    monkeypatch.setenv("COLUMNS", "120")


def invoke(*arguments: str) -> Result:
    return CliRunner().invoke(app, list(arguments), catch_exceptions=False)


def passed(*arguments: str) -> str:
    result = invoke(*arguments)
    assert result.exit_code == 0, result.stderr
    assert result.stderr == ""
    return result.stdout


def failed(*arguments: str) -> str:
    """The message on stderr: one line, no traceback, nothing on stdout."""
    result = invoke(*arguments)
    assert result.exit_code == 1
    assert result.stdout == ""
    assert result.stderr.startswith("error: ")
    assert "Traceback" not in result.stderr
    return result.stderr.removeprefix("error: ").rstrip("\n")


def row(output: str, label: str) -> list[str]:
    """The cells of the table row that begins with a label."""
    (line,) = [line for line in output.splitlines() if re.match(rf"\W*{re.escape(label)}\s", line)]
    return [cell.strip() for cell in re.split("[│|]", line.strip("│| "))]


def stays(output: str) -> dict[str, int]:
    """The table of groups that are cut: name and number of units that stay."""
    return {name: int(stay) for name, stay in re.findall(r"│ (conv\d) +│ +\d+ │ +(\d+) │", output)}


def test_help_names_the_commands() -> None:
    assert all(command in passed("--help") for command in ("demo", "inspect", "prune", "rules", "train"))


def test_help_of_train_names_every_recipe() -> None:
    said = re.findall(r"[\w-]+", passed("train", "--help"))
    assert set(shipped()) <= set(said)


def test_version() -> None:
    assert passed("--version") == f"{netsurgery.__version__}\n"


def test_rules_are_listed() -> None:
    assert "convolution" in passed("rules")


def test_demo_passes_its_options_on(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    monkeypatch.setattr("netsurgery.demo.run", lambda seed, out, console: seen.append((seed, out)))
    passed("demo")
    passed("demo", "--seed", "3", "--out", "results")
    assert seen == [(0, None), (3, Path("results"))]


def test_train_passes_its_options_on(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    monkeypatch.setattr(
        "netsurgery.training.run", lambda recipe, out, _, download: seen.append((recipe, out, download))
    )
    passed("train", "digits")
    options = ("--out", "here", "--data", "there", "--download", "--seeds", "5,6", "--set", "train.epochs=2")
    passed("train", "digits", *options, "--set", "data.batch=8")
    (plain, out, download), (recipe, other, downloads) = seen
    assert (plain.seeds, out, download) == ((0, 1, 2), Path("runs/digits"), False)
    assert (recipe.seeds, other, downloads) == ((5, 6), Path("here"), True)
    for variant in recipe.variants.values():
        assert (variant.data.folder, variant.data.batch, variant.train.epochs) == ("there", 8, 2)


def test_train_asks_for_a_recipe_that_is_there() -> None:
    assert failed("train", "mnist").startswith("no recipe 'mnist': pass a .toml or .yaml file, or one of cifar10, ")


@pytest.mark.parametrize("name", ["tiny_models:Net", "tiny_models:ready"])
def test_inspect_shows_groups_and_cost(name: str) -> None:
    output = passed("inspect", name, "--input", "1x3x8x8")
    assert "conv1" in output
    assert str(netsurgery.cost(sys.modules["tiny_models"].Net(), torch.zeros(1, 3, 8, 8))) in output


def test_inspect_infers_the_input() -> None:
    assert "conv1" in passed("inspect", "tiny_models:Net")


def test_prune_prints_the_plan_and_the_proof_and_saves_what_load_reads(tmp_path: Path) -> None:
    output = passed(
        "prune", "tiny_models:Net", "--random-weights", "--ratio", "0.5", "--input", "2x3x8x8", "--out", "small"
    )
    assert row(output, "parameters")[1:] == ["1,485", "457", "30.8%"]
    proof = re.search(r"differs from the silenced original by (\S+) at most", output)
    assert proof
    assert float(proof[1]) < 1e-5
    assert sorted(path.name for path in (tmp_path / "small").iterdir()) == ["edit.json", "weights.pt"]
    small = netsurgery.load(tmp_path / "small", sys.modules["tiny_models"].Net())
    assert small.conv1.weight.shape == (4, 3, 3, 3)
    assert sum(p.numel() for p in small.parameters()) == 457


def test_a_dry_run_prints_the_plan_only() -> None:
    whole = passed("prune", "tiny_models:Net", "--random-weights", "--ratio", "0.5", "--input", "2x3x8x8")
    plan = passed("prune", "tiny_models:Net", "--random-weights", "--ratio", "0.5", "--input", "2x3x8x8", "--dry-run")
    assert whole.startswith(plan)
    assert "verify" not in plan


def test_prune_says_what_was_asked_what_went_and_what_is_locked() -> None:
    asked = ("prune", "tiny_models:Net", "--random-weights", "--ratio", "0.5")
    line = "asked to remove 50.0% of the channels of each layer, removed 50.0% (12 of 24)"
    assert line in passed(*asked).splitlines() and line in passed(*asked, "--dry-run").splitlines()
    said = passed("prune", "tiny_models:Flat", *asked[2:], "--input", "2x3x8x8").splitlines()
    (first,) = [i for i, one in enumerate(said) if one.startswith("asked to remove 50.0% of the channels of each")]
    assert "removed 37.5% (12 of 32); short: conv1: 0 of 8 (locked: " in said[first]
    assert said[first + 1].startswith("  conv1: 0 of 8 (locked: the code refuses other sizes (too narrow) at ")
    assert "width=8 (dimensions of this size become 4 and 8)" in said[first + 2]
    torch.manual_seed(0)
    model = sys.modules["tiny_models"].Flat()
    edit = netsurgery.plan(model, [HGSRScore(), PruneChannels(0.5)], torch.zeros(2, 3, 8, 8))
    assert "\n".join(said[first : first + 3]) == edit.summary()


@pytest.mark.parametrize(
    ("score", "scorer"), [("hgsr", HGSRScore()), ("magnitude", MagnitudeScore()), ("random", RandomScore(seed=7))]
)
def test_the_edit_is_the_one_that_plan_makes(score: str, scorer: netsurgery.Pass) -> None:
    arguments = ("--ratio", "0.5", "--score", score, "--scope", "global", "--seed", "7", "--out", "small")
    passed("prune", "tiny_models:ready", "--random-weights", *arguments)
    edit = netsurgery.plan(sys.modules["tiny_models"].ready, [scorer, PruneChannels(0.5, scope="global")])
    assert Path("small/edit.json").read_text() == edit.to_json()


def test_the_same_seed_gives_the_same_weights_and_plan() -> None:
    passed("inspect", "tiny_models:Net")  # importing the module draws random numbers too
    for out, seed in (("a", "7"), ("b", "7"), ("c", "8")):
        passed(
            "prune",
            "tiny_models:Net",
            "--random-weights",
            "--ratio",
            "0.5",
            "--score",
            "random",
            "--seed",
            seed,
            "--out",
            out,
        )
    a, b, c = (torch.load(f"{out}/weights.pt")["head.bias"] for out in "abc")
    assert a.equal(b)
    assert not a.equal(c)
    assert Path("a/edit.json").read_text() == Path("b/edit.json").read_text() != Path("c/edit.json").read_text()


@pytest.mark.parametrize("option", ["--params", "--macs"])
@pytest.mark.parametrize("scope", ["layer", "global"])
def test_budgets(option: str, scope: str) -> None:
    arguments = ("prune", "tiny_models:Net", "--random-weights", "--scope", scope, "--input", "1x3x8x8")
    label = {"--params": "parameters", "--macs": "MACs"}[option]
    share = row(passed(*arguments, option, "0.5"), label)
    before, after = (int(cell.replace(",", "")) for cell in share[1:3])
    assert 0.3 * before < after <= 0.5 * before
    assert row(passed(*arguments, option, str(before // 2)), label) == share


def test_include_exclude_and_multiple_of() -> None:
    arguments = ("prune", "tiny_models:Net", "--random-weights", "--ratio", "0.7", "--input", "1x3x8x8", "--dry-run")
    assert stays(passed(*arguments)) == {"conv1": 3, "conv2": 5}
    assert stays(passed(*arguments, "--include", "conv1")) == {"conv1": 3}
    assert stays(passed(*arguments, "--exclude", "conv1")) == {"conv2": 5}
    assert stays(passed(*arguments, "--include", "conv1", "--include", "conv2")) == {"conv1": 3, "conv2": 5}
    assert stays(passed(*arguments, "--multiple-of", "4")) == {"conv1": 4, "conv2": 8}


def test_torchvision() -> None:
    output = passed("prune", "torchvision:resnet18", "--random-weights", "--ratio", "0.5", "--input", "1x3x64x64")
    assert row(output, "parameters")[1] == "11,689,512"
    assert "at most (relative)" in output


def test_the_proof_is_not_empty_where_the_head_starts_at_zero(monkeypatch: pytest.MonkeyPatch) -> None:
    """The outputs of such a network are all zero, before and after: equal whatever was cut."""
    (Path("zeroed_models.py")).write_text(TINY + "nn.init.zeros_(ready.head.weight), nn.init.zeros_(ready.head.bias)\n")
    monkeypatch.delitem(sys.modules, "zeroed_models", raising=False)
    command = ("prune", "zeroed_models:ready", "--random-weights", "--ratio", "0.5", "--input", "1x3x8x8")
    assert passed(*command)

    def wrong(model: nn.Module, edit: netsurgery.Edit) -> nn.Module:
        small = netsurgery.rewriting.surgery.rewrite(model, edit)
        small.conv2.bias.data += 1
        return small

    monkeypatch.setattr("netsurgery.rewrite", wrong)
    assert "differs from the silenced original" in invoke(*command).stderr


def test_timm() -> None:
    pytest.importorskip("timm")
    assert "12 groups" in passed("inspect", "timm:resnet10t", "--input", "1x3x64x64")


FORMS = "write torchvision:NAME, timm:NAME, either with @WEIGHTS, or package.module:callable"
SHAPES = "write positive sizes joined by x, such as 1x3x224x224"
EPOCH = "digits.toml, [train]: no key 'epoch' (did you mean 'epochs'?); there are: epochs, optimizer, schedule"
AMOUNT = "say how much goes by exactly one of --ratio, --params and --macs"


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("inspect resnet18", f"'resnet18' names no model; {FORMS}"),
        ("inspect torchvision:", f"'torchvision:' names no model; {FORMS}"),
        ("inspect ../tiny:Net", f"'../tiny:Net' names no model; {FORMS}"),
        (
            "inspect torchvision:resnet19",
            "torchvision has no model 'resnet19'; did you mean resnet18 or resnet152 or resnet101?",
        ),
        ("inspect torchvision:qqqq", "torchvision has no model 'qqqq'"),
        (
            "inspect torchvison:resnet18",
            "no module 'torchvison' here or among the installed packages; did you mean torchvision:?",
        ),
        ("inspect no_such_module:Net", "no module 'no_such_module' here or among the installed packages"),
        (
            "inspect needy_models:Net",
            "needy_models cannot be imported: it needs a_package_nobody_has, which is not installed",
        ),
        ("inspect tiny_models:Nett", "tiny_models has no 'Nett'; did you mean Net?"),
        (
            "inspect tiny_models:Settings.width",
            "tiny_models:Settings.width is of type int, not a callable that returns a torch.nn.Module",
        ),
        ("inspect tiny_models:text", "tiny_models:text returned a value of type str, not a torch.nn.Module"),
        (
            "inspect tiny_models:sized",
            "tiny_models:sized needs arguments (width); name a function without any that calls it",
        ),
        ("train digits --seeds a,b", "digits.toml: seeds = '[a,b]': expected a list of a whole number"),
        ("train digits --set train.epoch=1", EPOCH),
        ("inspect tiny_models:Net --input 3by3", f"'3by3' is no shape; {SHAPES}"),
        ("inspect tiny_models:Net --input 1x0x8x8", f"'1x0x8x8' is no shape; {SHAPES}"),
        ("prune tiny_models:Net", AMOUNT),
        ("prune tiny_models:Net --ratio 0.5 --macs 0.5", AMOUNT),
        (
            "prune tiny_models:Net --params half",
            "--params half: write a share such as 0.5 or a whole number such as 2000000",
        ),
        (
            "prune tiny_models:Net --ratio 0.5 --dry-run --out x",
            "--dry-run writes nothing; leave one of --dry-run and --out out",
        ),
    ],
)
def test_messages(line: str, message: str) -> None:
    assert failed(*line.split()) == message


@pytest.mark.parametrize(
    "arguments",
    [
        ["inspect", "tiny_models:Net", "--input", "1x4x8x8"],  # four channels into a convolution that takes three
        ["prune", "tiny_models:Net", "--random-weights", "--ratio", "1.5"],
        ["prune", "tiny_models:Net", "--random-weights", "--ratio", "0.5", "--include", "stem"],
        ["prune", "tiny_models:nothing_to_prune", "--random-weights", "--ratio", "0.5"],
    ],
)
def test_errors_of_the_core_are_shown_without_a_traceback(arguments: list[str], tmp_path: Path) -> None:
    failed(*arguments)


def test_an_input_that_cannot_be_inferred_is_asked_for_by_its_option() -> None:
    assert failed("inspect", "tiny_models:Odd").endswith("(here: --input SHAPE)")


def test_timm_is_named_where_it_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "timm", None)
    message = "timm:resnet10t needs timm, which is not installed: python -m pip install timm"
    assert failed("inspect", "timm:resnet10t") == message


def test_unknown_timm_names_propose_near_ones() -> None:
    pytest.importorskip("timm")
    assert failed("inspect", "timm:resnet18q").startswith("timm has no model 'resnet18q'; did you mean resnet18")


def test_a_result_that_is_not_exact_is_refused_and_not_saved(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("netsurgery.verify", lambda *_: 0.25)
    result = invoke(
        "prune", "tiny_models:Net", "--random-weights", "--ratio", "0.5", "--input", "1x3x8x8", "--out", "small"
    )
    assert result.exit_code == 1
    assert result.stderr == "error: the pruned network differs from the silenced original by 2.5e-01 (relative)\n"
    assert not (tmp_path / "small").exists()


@pytest.mark.parametrize("found", [[0.0, math.nan], [math.nan, 0.0], [0.0, 0.25], [math.inf, 0.0], [1e-3, 0.0]])
def test_either_proof_is_enough_to_refuse(found: list[float], monkeypatch: pytest.MonkeyPatch) -> None:
    """The network as it is, and a copy without constants, are compared; what is not a number is no proof."""
    errors = iter(found)
    monkeypatch.setattr("netsurgery.verify", lambda *_: next(errors))
    result = invoke("prune", "tiny_models:ready", "--random-weights", "--ratio", "0.5", "--out", "small")
    assert (result.exit_code, Path("small").exists()) == (1, False)
    worst = next((one for one in found if one != one), max(found))
    assert f"differs from the silenced original by {worst:.1e} (relative)" in result.stderr


# Folders that cannot be written, interruptions, requests that remove nothing -----------------------------------------


def test_a_folder_that_cannot_be_written_is_known_before_the_work(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("precious")
    (tmp_path / "full" / "weights.pt").mkdir(parents=True)
    monkeypatch.setattr("netsurgery.weight_sources.prepared", None)  # calling it would fail
    for out, reason in {
        "file": "File exists",
        "file/inside": "Not a directory",
        "/proc/nowhere/small": "No such file or directory",
        "full": "Is a directory",
        "x" * 300: "File name too long",
    }.items():
        message = failed("prune", "tiny_models:Net", "--ratio", "0.5", "--out", out)
        assert message == f"{out} cannot be written to ({reason}): pass another folder by --out"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "full", "needy_models.py", "tiny_models.py"]
    assert (tmp_path / "file").read_text() == "precious"


@pytest.mark.parametrize("command", ["demo", "train digits"])
def test_so_it_is_in_other_commands(command: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("precious")
    monkeypatch.setattr("netsurgery.demo.digits", None)  # calling it would fail
    message = failed(*command.split(), "--out", "file/inside")
    assert message == "file/inside cannot be written to (Not a directory): pass another folder by --out"


def test_folders_that_were_tried_are_left_as_they_were(tmp_path: Path) -> None:
    check_writable(tmp_path / "a" / "b" / "c", ("table.json",))
    assert not (tmp_path / "a").exists()
    (tmp_path / "d").mkdir()
    (tmp_path / "d" / "table.json").write_text("{}")
    check_writable(tmp_path / "d", ("table.json", "other.json"))
    assert [(path.name, path.read_text()) for path in (tmp_path / "d").iterdir()] == [("table.json", "{}")]


LIMITED = """
import resource, sys
from netsurgery.cli import main
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[1]),) * 2)  # as a full disk, and quicker
sys.argv = ["netsurgery", *sys.argv[2:]]
main()
"""


@pytest.mark.parametrize(
    ("command", "start", "end"),
    [
        (
            "4000 prune tiny_models:Net --random-weights --ratio 0.2 --input 1x3x8x8 --out small",
            "error: small cannot be written to (the disk is full, or failed): ",
            "free the space that is missing, or pass another folder by --out\n",
        ),
        (
            "60000 train digits --seeds 0 --set train.epochs=1 --set finetune.epochs=0 --out small",
            "error: small/unpruned/seed-0/train.safetensors cannot be written to (I/O error: File too large ",
            "what was written before is kept; put that right, and the same command goes on\n",
        ),
    ],
)
def test_a_disk_that_is_full(command: str, start: str, end: str) -> None:
    (Path("limited.py")).write_text(LIMITED)
    done = subprocess.run([sys.executable, "limited.py", *command.split()], capture_output=True, text=True, check=False)
    assert done.returncode == 1, done.stderr
    assert done.stderr.startswith(start) and done.stderr.endswith(end) and done.stderr.count("\n") == 1


def test_an_interruption_is_said_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("netsurgery.plan", stop)
    monkeypatch.setattr("netsurgery.demo.fit", stop)
    for command in (["prune", "tiny_models:Net", "--random-weights", "--ratio", "0.5", "--out", "small"], ["demo"]):
        result = invoke(*command)
        assert (result.exit_code, result.stdout.strip(), result.stderr) == (130, "", "interrupted\n")
    assert not Path("small").exists()


@pytest.mark.parametrize(
    "options",
    [
        "--ratio 0.5 --multiple-of 7000",
        "--params 999999999999",
        "--macs 1.0",
        "--ratio 0.0",
        "--ratio 0.01",
        "--params 1485 --scope global",
        "--ratio 0.2 --multiple-of 16 --scope global",
    ],
)
@pytest.mark.parametrize("dry", [(), ("--dry-run",)])
def test_a_request_that_removes_nothing_is_no_success(options: str, dry: tuple[str, ...]) -> None:
    asked = options.removesuffix(" --scope global")
    message = failed("prune", "tiny_models:Net", "--random-weights", *options.split(), *dry, "--input", "1x3x8x8")
    assert message == (
        f"{asked} removes nothing: Net has 1,485 parameters and 87,632 MACs, its largest group that may be cut, "
        "'conv2', has 16 units: ask for more to go, or for a smaller --multiple-of"
    )

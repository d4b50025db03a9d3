"""The suite can fail: every planted fault turns it red."""

import ast
import textwrap

import pytest

from mutants import MUTANTS, ROOT, Mutant, caught_by, planted


@pytest.mark.slow
@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.name.replace(" ", "-"))
def test_fault_is_caught(mutant):
    assert caught_by(mutant) is not None


def test_enough_faults_of_different_kinds():
    assert len({mutant.name for mutant in MUTANTS}) == len(MUTANTS) >= 20
    assert len({mutant.file for mutant in MUTANTS}) >= 6


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.name.replace(" ", "-"))
def test_fault_can_be_planted(mutant):
    """The text to replace stands once, and what it makes of its file is a program: what cannot be read is no fault."""
    file, text = planted(mutant)
    assert text != (ROOT / file).read_text()
    ast.parse(text)


CODE = "def one(x):\n    if x is None:\n        return 0\n    return x\n"
TEST = "    if x is None:\n        return 0\n"
FAULT = Mutant("zero is one", "netsurgery/a.py", TEST, TEST.replace("0", "1"))


@pytest.mark.parametrize(
    ("file", "code", "becomes"),
    [
        ("netsurgery/a.py", CODE, CODE.replace("return 0", "return 1")),
        ("passes/deep/b.py", CODE, CODE.replace("return 0", "return 1")),
        (
            "kernels/c.py",
            "class A:\n" + textwrap.indent(CODE, "    "),
            "class A:\n" + textwrap.indent(CODE, "    ").replace("return 0", "return 1"),
        ),
    ],
    ids=["where it was", "in another file", "in a class"],
)
def test_faults_follow_the_code(tmp_path, file, code, becomes):
    for path, text in (("netsurgery/other.py", "x = 1\n"), (file, code)):
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_text(text)
    found, text = planted(FAULT, tmp_path)
    assert (found, text) == (file, becomes)


def test_text_that_stands_twice_is_refused(tmp_path):
    (tmp_path / "netsurgery").mkdir()
    for name in ("b.py", "c.py"):
        (tmp_path / "netsurgery" / name).write_text(CODE)
    with pytest.raises(LookupError, match="zero is one: its text stands 2 times in the package, not once"):
        planted(FAULT, tmp_path)

"""The suite can fail: every planted fault turns it red."""

from pathlib import Path

import pytest

from mutants import MUTANTS, caught_by


@pytest.mark.slow
@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.name.replace(" ", "-"))
def test_fault_is_caught(mutant):
    assert caught_by(mutant) is not None


def test_enough_faults_of_different_kinds():
    assert len({mutant.name for mutant in MUTANTS}) == len(MUTANTS) >= 20
    assert len({mutant.file for mutant in MUTANTS}) >= 6


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.name.replace(" ", "-"))
def test_fault_can_be_planted(mutant):
    """The text to replace stands in its file once: a change of the code that moves it is seen at once."""
    assert (Path(__file__).parent.parent / mutant.file).read_text().count(mutant.old) == 1

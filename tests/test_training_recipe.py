"""Recipes: what a file may say, what its variants become, and the text of each error."""

import re
import tomllib
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
import yaml

from netsurgery.errors import InputError
from netsurgery.training import read
from netsurgery.training.options import Place, check, fits, spell
from netsurgery.training.recipe import PASSES, merged_tables, shipped
from netsurgery.training.schedules import Constant, Cosine, OneCycle, Steps

BASE = """
seeds = [3, 4]
data = { name = "digits", batch = 32 }
model = { name = "netsurgery.models:DigitsResNet", arguments = { widths = [4, 8] } }
train = { epochs = 2, optimizer = { name = "AdamW", lr = 0.01 }, schedule = { name = "cosine" } }
finetune = { epochs = 1 }
selection = { name = "MagnitudeScore", p = 1 }
removal = { params = 0.5 }
"""
VARIANTS = """
[variants.plain]
[variants.penalised.penalty]
strength = 1e-4
[variants.random]
selection = { name = "RandomScore" }
removal = { ratio = 0.25 }
[variants.random.train.optimizer]
lr = 0.1
[variants.whole]
selection = false
removal = false
"""


def file(folder: Path, text: str, name: str = "mine.toml") -> str:
    (folder / name).write_text(text)
    return str(folder / name)


def message(folder: Path, text: str, *changes: str) -> str:
    with pytest.raises(InputError) as caught:
        read(file(folder, text), changes)
    return str(caught.value)


@pytest.mark.parametrize("name", shipped())
def test_what_is_shipped_can_be_read(name: str) -> None:
    recipe = read(name)
    assert recipe.name == name
    assert len(recipe.variants) > 1
    assert len(recipe.seeds) == 3


def test_variants_are_laid_over_the_rest(tmp_path: Path) -> None:
    found = read(file(tmp_path, BASE + VARIANTS.replace("removal = { ratio = 0.25 }\n", ""))).variants
    assert list(found) == ["plain", "penalised", "random", "whole"]
    assert found["plain"].selection == {"name": "MagnitudeScore", "p": 1}
    assert found["random"].selection == {"name": "RandomScore"}  # another name: nothing of the other pass is left
    assert found["random"].train.optimizer == {"name": "AdamW", "lr": 0.1}  # the same: only the rate differs
    assert found["penalised"].penalty == {"name": "HGSR", "strength": 1e-4}
    assert (found["whole"].selection, found["whole"].removal) == ({}, {})
    assert found["plain"].finetune.optimizer == {"name": "SGD"}


def test_variants_share_a_training_where_nothing_in_it_differs(tmp_path: Path) -> None:
    text = BASE + '[variants.a]\n[variants.b]\nselection = { name = "HGSRScore" }\n[variants.c]\ntrain.epochs = 3\n'
    found = read(file(tmp_path, text + "[variants.d]\npenalty.strength = 1e-4\n")).variants
    trainings = [variant.training for variant in found.values()]
    assert trainings[0] == trainings[1]
    assert len(set(trainings)) == 3


def test_without_variants_the_file_is_one(tmp_path: Path) -> None:
    recipe = read(file(tmp_path, BASE))
    assert (recipe.name, recipe.seeds, list(recipe.variants)) == ("mine", (3, 4), ["mine"])


def test_yaml_says_the_same(tmp_path: Path) -> None:
    text = """
seeds: [3, 4]
data: {name: digits, batch: 32}
model: {name: "netsurgery.models:DigitsResNet", arguments: {widths: [4, 8]}}
train: {epochs: 2, optimizer: {name: AdamW, lr: 0.01}, schedule: {name: cosine}}
finetune: {epochs: 1}
selection: {name: MagnitudeScore, p: 1}
removal: {params: 0.5}
"""
    assert read(file(tmp_path, text, "mine.yaml")) == read(file(tmp_path, BASE))


def test_numbers_of_yaml_that_toml_knows_too(tmp_path: Path) -> None:
    text = BASE.replace("lr = 0.01", "lr = 1e-2")
    as_yaml = yaml.safe_dump(tomllib.loads(text)).replace("0.01", "1e-2")
    assert "lr: 1e-2" in as_yaml
    assert read(file(tmp_path, as_yaml, "mine.yaml")) == read(file(tmp_path, text))


@pytest.mark.parametrize("text", ["3: 4", "data: {3: 4}", "variants: {3: {removal: false}}", "seeds: [{3: 4}]"])
def test_a_key_that_is_no_text(text: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"^mine\.yaml: the key 3 is no text: put it into quotes$"):
        read(file(tmp_path, text, "mine.yaml"))


def test_a_file_that_is_no_text(tmp_path: Path) -> None:
    (tmp_path / "mine.toml").write_bytes(b"\xff\xfe")
    with pytest.raises(InputError, match=r"^mine\.toml: 'utf-8' codec can't decode byte 0xff"):
        read(str(tmp_path / "mine.toml"))


def test_changes(tmp_path: Path) -> None:
    changes = ["train.epochs=7", "seeds=[1]", "data.folder=/some/where", "variants.random.train.optimizer.lr=0.5"]
    recipe = read(file(tmp_path, BASE + VARIANTS.replace("removal = { ratio = 0.25 }\n", "")), changes)
    assert recipe.seeds == (1,)
    assert {variant.train.epochs for variant in recipe.variants.values()} == {7}
    assert recipe.variants["plain"].data.folder == "/some/where"
    assert recipe.variants["random"].train.optimizer["lr"] == 0.5


def test_the_place_of_the_data_and_the_seeds_are_no_part_of_what_is_fixed(tmp_path: Path) -> None:
    path = file(tmp_path, BASE)
    fixed = read(path).fixed
    assert read(path, ["seeds=[1]", "data.folder=x", "data.workers=3"]).fixed == fixed
    assert read(path, ["data.batch=3"]).fixed != fixed


def test_tables_below_stay_as_they_are() -> None:
    below = {"a": {"b": 1}, "c": {"name": "x", "y": 1}}
    assert merged_tables(below, {"a": {"d": 2}, "c": {"name": "z"}}) == {"a": {"b": 1, "d": 2}, "c": {"name": "z"}}
    assert below == {"a": {"b": 1}, "c": {"name": "x", "y": 1}}


@pytest.mark.parametrize(
    ("old", "new", "text"),
    [
        ("epochs = 2,", "epochs = 'two',", "mine.toml, [train]: epochs = 'two': expected a whole number"),
        ("epochs = 2,", "epochs = true,", "mine.toml, [train]: epochs = True: expected a whole number"),
        ("epochs = 2,", "epochs = -1,", "mine.toml, [train]: epochs = -1: at least 0"),
        (
            "epochs = 2,",
            "epoch = 2,",
            "mine.toml, [train]: no key 'epoch' (did you mean 'epochs'?); there are: epochs, optimizer, schedule",
        ),
        (
            'name = "cosine"',
            'name = "cos"',
            "mine.toml, [train.schedule]: name = 'cos': expected one of constant, cosine, onecycle, steps",
        ),
        (
            "p = 1 }",
            "q = 1 }",
            "mine.toml, [selection]: no key 'q'; there are: p",
        ),
        ("p = 1 }", "p = 'l1' }", "mine.toml, [selection]: p = 'l1': expected a number"),
        (
            "params = 0.5",
            "parameters = 0.5",
            "mine.toml, [removal]: no key 'parameters' (did you mean 'params'?); there are: ratio, params, macs, ",
        ),
        ("params = 0.5", "scope = 'all'", "mine.toml, [removal]: scope = 'all': expected 'layer' or 'global'"),
        ("batch = 32", "batch = 0", "mine.toml, [data]: batch and limit are at least 1, workers at least 0"),
        (
            'name = "digits"',
            'name = "mnist"',
            "mine.toml, [data]: name = 'mnist': expected 'digits' or 'cifar10' or 'cifar100' or 'stl10' or ",
        ),
        ('name = "digits", ', "", "mine.toml, [data]: name: missing"),
        ("lr = 0.01", "lr = '0.01'", "mine.toml, [train.optimizer]: lr = '0.01': expected a number"),
        ('"AdamW"', '"Adam W"', "mine.toml, [train.optimizer]: name = 'Adam W': expected one of ASGD, Adadelta, "),
        ("seeds = [3, 4]", "seeds = 3", "mine.toml: seeds = 3: expected a list of a whole number"),
        ("seeds = [3, 4]", "seeds = []", "mine.toml: seeds = []: at least one, each once, and none below 0"),
        ("seeds = [3, 4]", "seeds = [3, 3]", "mine.toml: seeds = [3, 3]: at least one, each once, "),
        ("seeds = [3, 4]", "seeds = [-1]", "mine.toml: seeds = [-1]: at least one, each once, "),
        ("seeds = [3, 4]", "name = '../up'", "mine.toml: name = '../up': letters, digits, spaces and +-. only, as it "),
        ("seeds = [3, 4]", "seed = [3, 4]", "mine.toml: no key 'seed' (did you mean 'seeds'?); there are: name, seeds"),
        ("removal = { params = 0.5 }", "", "mine.toml: [selection] and [removal] go together, unless the selection "),
        ("finetune = {", "soft = { ratio = 0.5, epochs = 3 }\nfinetune = {", "mine.toml, [soft]: no key 'epochs'"),
        ("finetune = {", "soft = { ratio = 0.5 }\nfinetune = {", "mine.toml: soft pruning selects as it trains: take "),
        ("finetune = {", "soft = { ratio = 'x' }\nfinetune = {", "mine.toml, [soft]: ratio = 'x': expected a number"),
        ("finetune = {", "soft = 1\nfinetune = {", "mine.toml: soft = 1: expected a table"),
        ("finetune = {", "[", "mine.toml: "),
        (
            "seeds = [3, 4]",
            "engine.mixed_precision = 'fp64'",
            "mine.toml, [engine]: mixed_precision = 'fp64': expected ",
        ),
        ("seeds = [3, 4]", "variants.x = 3", "mine.toml, [variants.x]: expected a table whose name has letters, "),
        ("seeds = [3, 4]", "variants.'a/b' = {}", "mine.toml, [variants.a/b]: expected a table whose name has "),
        (
            "seeds = [3, 4]",
            "variants.x.removal.ratio = 'half'",
            "mine.toml, [variants.x.removal]: ratio = 'half': expected a number",
        ),
    ],
)
def test_messages(old: str, new: str, text: str, tmp_path: Path) -> None:
    assert old in BASE
    assert message(tmp_path, BASE.replace(old, new, 1)).startswith(text)


def test_what_the_rest_says_wrong_is_not_blamed_on_a_variant(tmp_path: Path) -> None:
    text = BASE.replace("epochs = 2,", "epochs = 'two',") + "[variants.plain]\n"
    assert message(tmp_path, text) == "mine.toml, [train]: epochs = 'two': expected a whole number"


def test_a_table_that_is_missing(tmp_path: Path) -> None:
    assert message(tmp_path, 'data.name = "digits"') == "mine.toml: model, train: missing"


def test_every_pass_can_be_named(tmp_path: Path) -> None:
    text = message(tmp_path, BASE.replace('"MagnitudeScore"', '"MagnitudScore"'))
    assert all(name in text for name in PASSES)
    assert text.endswith("(did you mean 'MagnitudeScore'?)")


def test_a_change_that_is_none(tmp_path: Path) -> None:
    assert message(tmp_path, BASE, "train.epochs") == "--set train.epochs: write key.path=value, such as train.epochs=3"


@pytest.mark.parametrize(
    ("recipe", "change", "wanted"),
    [
        ("digits-planting", "growth.epochs=1", "growth] themselves, .*'variants.planted.growth.epochs=1'"),
        ("digits-planting", "growth.nonsense=7", "growth] themselves, .*'variants.planted.growth.nonsense=7'"),
        ("digits-planting", "growth={epochs=1}", "growth] themselves, .*'variants.planted.growth={epochs=1}'"),
        ("digits-planting", "growth=false", "growth] themselves, .*'variants.planted.growth=false'"),
        (
            "digits-planting",
            "teacher.train.epochs=1",
            """teacher] themselves, .*'variants."planted \\+ teacher".teacher.train.epochs=1'""",
        ),
        (
            "stl10-planting",
            "teacher.model.name=torchvision:resnet34",
            """teacher] themselves, .*'variants."planted \\+ teacher".teacher.model""",
        ),
    ],
)
def test_a_change_that_every_variant_overrides(recipe: str, change: str, wanted: str) -> None:
    with pytest.raises(InputError, match=rf"^--set {re.escape(change)}: the variants set \[{wanted}"):
        read(recipe, [change])


@pytest.mark.parametrize(
    ("key", "name"),
    [
        ('variants."planted + teacher"', "planted + teacher"),
        ("variants.'planted + teacher'", "planted + teacher"),
        ("variants.planted + teacher", "planted + teacher"),
        ('"variants"."planted"', "planted"),
    ],
)
def test_parts_of_a_key_may_stand_in_quotes(key: str, name: str) -> None:
    found = read("digits-planting", [f"{key}.growth.epochs=1"]).variants
    assert {one for one, made in found.items() if made.growth["epochs"] == 1} == {name}


def test_what_is_proposed_works() -> None:
    for change in ("growth.epochs=1", "teacher.train.epochs=1"):
        with pytest.raises(InputError) as caught:
            read("digits-planting", [change])
        read("digits-planting", [str(caught.value).rpartition("--set ")[2].strip("'")])


def test_a_name_with_a_dot_in_quotes(tmp_path: Path) -> None:
    text = BASE + "[variants.'v1.5'.train]\nepochs = 5\n[variants.b.train]\nepochs = 6\n"
    found = read(file(tmp_path, text), ['variants."v1.5".train.epochs=8']).variants
    assert [made.train.epochs for made in found.values()] == [8, 6]
    said = message(tmp_path, text, "train.epochs=9")
    assert said.endswith("as in --set 'variants.b.train.epochs=9'")


def test_a_change_of_a_table_that_some_variants_have_is_for_these(tmp_path: Path) -> None:
    text = BASE + "[variants.a]\n[variants.b.penalty]\nstrength = 1e-4\n"
    found = read(file(tmp_path, text), ["penalty.l1_ratio=0.25"]).variants
    assert found["a"].penalty == {}
    assert found["b"].penalty == {"name": "HGSR", "strength": 1e-4, "l1_ratio": 0.25}
    said = message(tmp_path, text, "penalty.strength=1")
    assert said.endswith("as in --set 'variants.b.penalty.strength=1'")


@pytest.mark.parametrize("variants", ["variants.x = 3", "variants = 3"])
def test_variants_that_are_none_with_a_change(variants: str, tmp_path: Path) -> None:
    text = BASE.replace("seeds = [3, 4]", variants)
    assert "expected a table" in message(tmp_path, text, "train.epochs=2")


def test_a_change_that_one_variant_takes_is_accepted(tmp_path: Path) -> None:
    text = BASE + "[variants.a]\ntrain.epochs = 9\n[variants.b]\n"
    found = read(file(tmp_path, text), ["train.epochs=4", "train.epochs=5", "finetune.epochs=1"]).variants
    assert [made.train.epochs for made in found.values()] == [9, 5]
    assert read(file(tmp_path, text), ["penalty.strength=1e-3"]).variants["a"].penalty["strength"] == 1e-3


@pytest.mark.parametrize("change", ["=1", "a..b=1", ".a=1", 'a."b=1', "train"])
def test_a_change_without_a_key(change: str) -> None:
    with pytest.raises(InputError, match=r"write key\.path=value, such as train\.epochs=3$"):
        read("digits", [change])


def test_no_such_recipe() -> None:
    with pytest.raises(InputError, match=r"^no recipe 'digit': pass a .toml or .yaml file, or one of .*'digits'\?\)$"):
        read("digit")


@pytest.mark.parametrize(
    ("value", "hint", "fitting"),
    [
        (1, float, True),
        (True, float, False),
        (1.0, int, False),
        (None, int | None, False),  # no file says None; what is not set is left out
        (2, int | None, True),
        ("a", Literal["a", "b"], True),
        (1, Literal[True], False),
        ([1, 2.0], tuple[float, float], True),
        (["a"], list[str], True),
        ("a", list[str], False),
        ({"a": 1}, dict[str, int], True),
        (1, torch.Tensor, False),
        (1, Any, False),
    ],
)
def test_types(value: object, hint: Any, fitting: bool) -> None:
    assert fits(value, hint) == fitting


def test_types_in_words() -> None:
    assert spell(float | torch.Tensor) == "a number"
    assert spell(list[torch.Tensor]) == ""
    assert spell(tuple[int, ...] | str | None) == "a list of a whole number or a text"


def test_arguments_that_come_from_elsewhere_may_not_be_set() -> None:
    def target(a: int, data: int) -> None:
        """Takes two."""

    assert check(target, {"a": 1}, Place("f"), ("data",)) == {"a": 1}
    with pytest.raises(InputError, match="no key 'data'; there are: a"):
        check(target, {"a": 1, "data": 1}, Place("f"), ("data",))
    with pytest.raises(InputError, match="expected a table, got 3"):
        check(target, 3, Place("f"))


def test_schedules() -> None:
    assert [Constant()(t) for t in (0, 0.5, 1)] == [1, 1, 1]
    assert [Cosine(0.5)(t) for t in (0, 0.5, 1)] == [1, 0.75, 0.5]
    found = [round(Steps()(t / 100), 4) for t in (0, 32, 33, 65, 66, 98, 99)]  # the first epoch is 0
    assert found == [1, 1, 0.2, 0.2, 0.04, 0.04, 0.008]
    cycle = OneCycle()
    assert [cycle(t) for t in (0, 0.15, 0.3, 1)] == pytest.approx([0.04, 0.52, 1, 4e-6])
    assert all(cycle(t / 100) < cycle((t + 1) / 100) for t in range(30))
    assert all(cycle(t / 100) > cycle((t + 1) / 100) for t in range(30, 100))


@pytest.mark.parametrize("batches", [1, 3, 7, 391, 1563])
def test_the_steps_fall_where_the_epochs_begin(batches: int) -> None:
    """As torch's own schedule by epochs has it, at the first batch of epochs 33, 66 and 99 of 100."""
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], 1.0)
    scheduler = torch.optim.lr_scheduler.MultiStepLR(optimizer, [33, 66, 99], 0.2)
    for epoch in range(100):
        rates = [Steps()(step / (100 * batches)) for step in (epoch * batches, (epoch + 1) * batches - 1)]
        assert rates == pytest.approx(scheduler.get_last_lr() * 2)
        optimizer.step(), scheduler.step()


@pytest.mark.parametrize("name", ["cifar10", "cifar100", "stl10", "tinyimagenet"])
def test_what_is_shipped_steps_as_the_source_does(name: str) -> None:
    for variant in read(name).variants.values():
        schedule = Steps(**{key: value for key, value in variant.train.schedule.items() if key != "name"})
        assert (schedule.factor, list(schedule.at)) == (0.2, [0.33, 0.66, 0.99])


@pytest.mark.parametrize("name", ["digits", "cifar10", "cifar100"])
def test_what_is_shipped_prunes_before_training_as_the_authors_of_sfp_do(name: str) -> None:
    variants = read(name).variants
    assert {key: one.soft.get("before_training", False) for key, one in variants.items() if one.soft} == {
        key: key == "sfp" for key in ("sfp", "asfp", "srfp", "asrfp", "hfp", "ghfp")
    }


def test_pruning_before_training_is_checked(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"before_training = 1: expected true or false$"):
        read("digits", ["variants.sfp.soft.before_training=1"])

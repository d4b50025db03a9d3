"""What save writes load reads, without inputs, too; and what it cannot read it says in a sentence."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import netsurgery
from netsurgery.capture.saved_inputs import described, made
from netsurgery.errors import InputError
from netsurgery.passes import MagnitudeScore, PruneChannels, RandomScore

HALF = [RandomScore(), PruneChannels(0.5)]
X = torch.randn(3, 6, generator=torch.Generator().manual_seed(0))


class Keywords(nn.Module):
    """Takes keyword inputs alone; a flag and a mask of whole numbers decide which way it takes."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(6, 8), nn.Linear(8, 12), nn.Linear(12, 2)

    def forward(self, *, x: Tensor, mask: Tensor | None = None, twice: bool = False, more: Any = None) -> Tensor:
        y = self.b(self.a(x).relu()).relu()
        if mask is not None and mask.all():
            y = y.view(len(x), 12) * 2
        if twice:
            y = y + self.b(self.a(x) + 1)
        if more is not None:
            y = y * more["scale"][0]
        out: Tensor = self.c(y)
        return out


def saved(model: nn.Module, inputs: Any, folder: Path) -> tuple[Any, netsurgery.Edit]:
    edit = netsurgery.plan(model, HALF, inputs)
    small = netsurgery.rewrite(model, edit)
    netsurgery.save(folder, small, edit)
    return small, edit


@pytest.mark.parametrize(
    "inputs",
    [
        {"x": X},
        {"x": X, "mask": torch.ones(3, dtype=torch.int64)},
        {"x": X, "mask": torch.tensor([1, 0, 1])},
        {"x": X, "mask": torch.ones(3, dtype=torch.bool), "twice": True},
        {"x": X, "more": {"scale": [torch.tensor(3.0), None, "text", 2.5, (1, True)]}},
    ],
)
def test_keyword_inputs_are_saved(inputs: dict[str, Any], tmp_path: Path) -> None:
    small, edit = saved(Keywords().eval(), inputs, tmp_path)
    assert edit.counts["a"] == 4
    again = netsurgery.load(tmp_path, Keywords().eval())
    assert torch.equal(small(**inputs), again(**inputs))


def test_inputs_of_every_kind_come_back() -> None:
    mask, other = torch.tensor([[True, False]]), torch.full((2, 2), 0.5, dtype=torch.float16)
    given = {
        "ids": torch.arange(6).reshape(2, 3), "mask": mask, "again": mask, "float": torch.randn(2, 3),
        "half": other, "nested": (1, [None, {"a": other}], "b", 2.5, True), "empty": torch.zeros(0, 3),
        "meta": torch.zeros(4, dtype=torch.int64, device="meta"), "z": torch.zeros(1, dtype=torch.complex64),
    }  # fmt: skip
    found = made(json.loads(json.dumps(described(((), given)))))
    assert [*found] == [*given] and found["again"] is found["mask"] and found["nested"][1][1]["a"] is found["half"]
    for name in ("ids", "mask", "half"):
        assert torch.equal(found[name], given[name]) and found[name].dtype == given[name].dtype  # type: ignore[arg-type, attr-defined]
    for name in ("float", "empty", "meta", "z"):
        want: Any = given[name]
        assert (found[name].shape, found[name].dtype) == (want.shape, want.dtype)
    assert found["nested"][0] == 1 and found["nested"][2:] == ("b", 2.5, True)
    positional = made(json.loads(json.dumps(described(((mask, 3), {})))))
    assert torch.equal(positional[0], mask) and positional[1] == 3


def test_large_whole_numbers_are_zeros() -> None:
    (found,) = made(described(((torch.arange(20_000),), {})))
    assert found.shape == (20_000,) and not found.any()


class Box:
    """An input that is no plain value."""

    def __init__(self, value: Tensor):
        self.value = value


class Boxed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(6, 8), nn.Linear(8, 2))

    def forward(self, box: Box) -> Tensor:
        out: Tensor = self.layers(box.value)
        return out


def test_inputs_that_cannot_be_saved_are_asked_for(tmp_path: Path) -> None:
    small, edit = saved(Boxed(), (Box(X),), tmp_path)
    assert json.loads(edit.to_json())["inputs"] is None
    with pytest.raises(netsurgery.NetsurgeryError, match="pass example_inputs"):
        netsurgery.load(tmp_path, Boxed())
    assert torch.equal(netsurgery.load(tmp_path, Boxed(), (Box(X),))(Box(X)), small(Box(X)))


@pytest.mark.parametrize("masked", [False, True])
def test_a_language_model_of_hugging_face(masked: bool, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.BertConfig(
        vocab_size=50, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24
    )
    fresh = lambda: transformers.BertForSequenceClassification(config).eval()  # noqa: E731
    inputs = {"input_ids": torch.arange(12).reshape(2, 6), "attention_mask": torch.ones(2, 6, dtype=torch.int64)}
    if masked:
        inputs["attention_mask"][1, 3:] = 0
    small, edit = saved(fresh(), inputs, tmp_path)
    assert edit.keep
    again = netsurgery.load(tmp_path, fresh())
    assert torch.equal(small(**inputs).logits, again(**inputs).logits)


def test_edits_of_the_first_format_are_read(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(6, 8), nn.Linear(8, 2))
    small, edit = saved(model, X, tmp_path)
    groups = {name: {"size": 8, "keep": list(units)} for name, units in edit.keep.items()}
    first = {"model": "Sequential", "inputs": [[[3, 6], "float32"]], "groups": groups}
    (tmp_path / "edit.json").write_text(json.dumps(first))
    assert torch.equal(netsurgery.load(tmp_path, model)(X), small(X))


# What cannot be read ------------------------------------------------------------------------------------------------


def net(**options: Any) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8, **options), nn.ReLU(), nn.Conv2d(8, 2, 1))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    saved(net(), torch.zeros(1, 3, 8, 8), tmp_path / "small")
    return tmp_path / "small"


def refused(folder: Path, model: nn.Module | None = None) -> str:
    before = {name: tensor.clone() for name, tensor in (model or net()).state_dict().items()}
    whole = model or net()
    with pytest.raises(InputError) as caught:
        netsurgery.load(folder, whole)
    assert "\n" not in str(caught.value) and [*whole.state_dict()] == [*before]
    return str(caught.value)


def weights(folder: Path, **changes: Any) -> None:
    """Change the saved weights; None takes one away."""
    state = torch.load(folder / "weights.pt", weights_only=True)
    for name, value in {name.replace("__", "."): value for name, value in changes.items()}.items():
        if value is None:
            del state[name]
        else:
            state[name] = value
    torch.save(state, folder / "weights.pt")


def test_a_key_that_is_missing(folder: Path) -> None:
    weights(folder, **{"0__bias": None, "1__running_mean": None})
    assert refused(folder) == (
        f"the weights in {folder} are not those of this Sequential: they lack 0.bias, 1.running_mean: "
        "pass a model of the constructor that was saved"
    )


def test_a_key_too_many(folder: Path) -> None:
    weights(folder, **{f"extra{i}": torch.zeros(1) for i in range(7)})
    assert "they have besides extra0, extra1, extra2, extra3, extra4 and 2 more: pass" in refused(folder)


def test_keys_of_other_shapes_names_and_both(folder: Path) -> None:
    weights(folder, **{"3__weight": torch.zeros(5, 4, 1, 1), "3__bias": None, "head__bias": torch.zeros(2)})
    said = refused(folder)
    assert "they lack 3.bias; they have besides head.bias; they have other shapes 3.weight [5, 4, 1, 1] for " in said
    assert "[2, 4, 1, 1]" in said


def test_weights_of_a_wrapped_model(folder: Path) -> None:
    state = torch.load(folder / "weights.pt", weights_only=True)
    torch.save({f"module.{name}": tensor for name, tensor in state.items()}, folder / "weights.pt")
    said = refused(folder)
    assert "they lack 0.weight, " in said and "they have besides module.0.weight, " in said


def test_a_model_that_another_constructor_made(folder: Path) -> None:
    assert "they have besides 1.running_mean, 1.running_var" in refused(folder, net(track_running_stats=False))
    assert "the edit is for another model: group '0' has 8 units there" in refused(
        folder, nn.Sequential(nn.Conv2d(3, 9, 3), nn.Conv2d(9, 2, 1))
    )


@pytest.mark.parametrize("name", ["weights.pt", "edit.json"])
@pytest.mark.parametrize("left", [0, 1, 0.5, 0.95])
def test_files_cut_short(folder: Path, name: str, left: float) -> None:
    path = folder / name
    content = path.read_bytes()
    path.write_bytes(content[: int(left if left == 1 else left * len(content))])
    said = refused(folder)
    assert "cannot be read" in said if name == "weights.pt" else "the text is no edit" in said


@pytest.mark.parametrize("content", [b"nothing like it", b"\x80\x02}q\x00.", b"PK\x03\x04" + bytes(100)])
def test_files_of_other_content(folder: Path, content: bytes) -> None:
    (folder / "weights.pt").write_bytes(content)
    assert f"{folder / 'weights.pt'} " in refused(folder) or "they lack" in refused(folder)
    (folder / "edit.json").write_bytes(content + b"\xff")
    said = refused(folder)
    assert "the text is no edit" in said or "edit.json cannot be read" in said


def test_weights_that_are_no_state_dict(folder: Path) -> None:
    for content in (torch.zeros(3), [1, 2], {1: torch.zeros(1)}):
        torch.save(content, folder / "weights.pt")
        assert f"holds a {type(content).__name__}, not a state dict" in refused(folder)
    torch.save(net(), folder / "weights.pt")  # classes are not unpickled
    assert "weights.pt cannot be read" in refused(folder)
    torch.save(dict.fromkeys(net().state_dict(), "text"), folder / "weights.pt")
    assert "which refuses them" in refused(folder)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("[]", "the text is no edit: it has no groups"),
        ("{}", "the text is no edit: it has no groups"),
        ('{"groups": {}}', "or no inputs"),
        ('{"groups": {"0": [1]}, "inputs": null}', "it has no groups with units"),
        ('{"groups": {"0": {"size": 8, "keep": 3}}, "inputs": null}', "it has no groups with units"),
        (
            '{"groups": {"0": {"size": 8, "keep": [0.5]}}, "inputs": null}',
            "a list of whole numbers, got (0.5,)",
        ),
        ('{"groups": {"0": {"size": 8, "keep": [9]}}, "inputs": null}', "in 0..7, got [9]"),
        ('{"groups": {}, "inputs": [[3, 4]]}', "the inputs of the edit cannot be read"),
        ('{"groups": {}, "inputs": {"tuple": [{"shape": [1], "dtype": "float99"}]}}', "cannot be read"),
        ('{"format": 5, "groups": {}}', "was written by a newer netsurgery (format 5; this one reads up to 4): update"),
    ],
)
def test_texts_that_are_no_edit_or_of_another_version(folder: Path, text: str, said: str) -> None:
    (folder / "edit.json").write_text(text)
    assert said in refused(folder)


@pytest.mark.parametrize("name", ["weights.pt", "edit.json"])
def test_a_folder_in_the_place_of_a_file(folder: Path, name: str) -> None:
    (folder / name).unlink()
    (folder / name).mkdir()
    assert refused(folder).startswith(f"{folder} holds no {name}: pass a folder that")
    edit = netsurgery.plan(net(), HALF, torch.zeros(1, 3, 8, 8))
    with pytest.raises(InputError, match=r"cannot be written to \(Is a directory\): pass another folder$"):
        netsurgery.save(folder, netsurgery.rewrite(net(), edit), edit)


def test_a_file_in_the_place_of_a_folder(folder: Path) -> None:
    assert "weights.pt holds no edit.json" in refused(folder / "weights.pt")
    edit = netsurgery.plan(net(), HALF, torch.zeros(1, 3, 8, 8))
    with pytest.raises(InputError, match=r"weights.pt cannot be written to \(File exists\): pass another folder$"):
        netsurgery.save(folder / "weights.pt", netsurgery.rewrite(net(), edit), edit)


def test_a_run_whose_file_is_damaged(folder: Path) -> None:
    shutil.copy(folder / "weights.pt", folder / "small.safetensors")
    assert "small.safetensors cannot be read" in refused(folder)
    (folder / "small.safetensors").write_bytes(b"")
    assert "small.safetensors cannot be read" in refused(folder)
    from safetensors.torch import save_file

    save_file({"a": torch.zeros(1)}, folder / "small.safetensors")
    assert "small.safetensors cannot be read" in refused(folder)
    save_file({}, folder / "small.safetensors", metadata={"state": '{"dict": [["epoch", 3]]}'})
    assert "small.safetensors holds no model: pass the folder of a run" in refused(folder)


def test_the_small_model_that_is_saved_is_the_edits(folder: Path) -> None:
    model = net()
    edit = netsurgery.plan(model, HALF, torch.zeros(1, 3, 8, 8))
    with pytest.raises(InputError, match=r"there '0.weight' is \[4, 3, 3, 3\], here it is \[8, 3, 3, 3\]$"):
        netsurgery.save(folder, model, edit)


def test_other_models_and_wrapped_ones_are_not_saved(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    edit = netsurgery.plan(model, [MagnitudeScore(), PruneChannels(0.5)], torch.randn(2, 4))
    small = netsurgery.rewrite(model, edit)
    for other in (nn.DataParallel(small), nn.Linear(3, 3), nn.Sequential(*small, nn.Linear(2, 2)), small[:1]):
        with pytest.raises(InputError, match=r"takes the model that the edit leads to: '.*' is in one of the two only"):
            netsurgery.save(tmp_path / "small", other, edit)
    assert not (tmp_path / "small").exists()


class Masked(nn.Module):
    """Attention whose code asks its mask for its way."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.t, self.o = nn.Linear(4, 16), nn.MultiheadAttention(16, 4, batch_first=True), nn.Linear(16, 2)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        h = self.a(x)
        if mask.isinf().any():
            h = self.t(h, h, h, attn_mask=mask)[0]
        return self.o(h)


def test_masks_of_floats_are_saved(tmp_path: Path) -> None:
    model = Masked().eval()
    inputs = {"x": torch.randn(2, 6, 4), "mask": nn.Transformer.generate_square_subsequent_mask(6)}
    edit = netsurgery.plan(model, [MagnitudeScore(), PruneChannels(0.5)], inputs)
    small = netsurgery.rewrite(model, edit)
    netsurgery.save(tmp_path, small, edit)
    again = netsurgery.load(tmp_path, model)
    assert (
        torch.equal(again(**inputs), small(**inputs)) and again.t.out_proj.weight.shape == small.t.out_proj.weight.shape
    )

"""The README's examples run and print what it says they print."""

from __future__ import annotations

import contextlib
import io
import re
from pathlib import Path
from typing import Any

from netsurgery.training.recipe import read

README = (Path(__file__).parent.parent / "README.md").read_text(encoding="utf-8")


def test_examples() -> None:
    blocks = re.findall(r"^```(python|text)\n(.*?)^```", README, re.DOTALL | re.MULTILINE)
    assert [kind for kind, _ in blocks] == ["python", "text"] * (len(blocks) // 2)
    names: dict[str, Any] = {}
    for (_, code), (_, expected) in zip(blocks[::2], blocks[1::2], strict=True):
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            exec(code, names)
        assert printed.getvalue() == expected


def test_the_recipe(tmp_path: Path) -> None:
    (text,) = re.findall(r"^```toml\n(.*?)^```", README, re.DOTALL | re.MULTILINE)
    (tmp_path / "recipe.toml").write_text(text, encoding="utf-8")
    found = read(str(tmp_path / "recipe.toml"))
    assert list(found.variants) == ["hgsr", "one-shot"] and list(found.seeds) == [0, 1, 2]

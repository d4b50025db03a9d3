"""The smallest model of every timm module, and the smallest image it takes: `python benchmarks/coverage_timm.py`.

The choice is written to coverage_timm.json, so that the page does not change with every new timm; a test compares the
modules in it with those of the installed timm. Modules that hold several architectures have more models.
"""

import json
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import timm
import torch
from torch import nn

CHOSEN = Path(__file__).with_name("coverage_timm.json")
SIDES = (64, 96, 128, 160, 192, 224, 256, 384, 512)
#: Other architectures of modules whose smallest model shows but one.
ALSO = (
    "beitv2_base_patch16_224", "botnet26t_256", "caformer_s18", "coatnet_nano_rw_224", "convformer_s18",
    "convnextv2_atto", "convnext_atto", "cs3sedarknet_l", "deit_tiny_distilled_patch16_224", "densenetblur121d",
    "ecaresnet26t", "eva02_tiny_patch14_224", "gcresnet33ts", "gernet_s", "haloregnetz_b", "lambda_resnet26t",
    "mixer_s32_224", "mixnet_s", "mobilenetv4_conv_blur_medium", "mobilevitv2_050", "nf_resnet26", "repvgg_a0",
    "resmlp_12_224", "resnet50d", "resnetaa34d", "resnetv2_50x1_bit", "seresnext26d_32x4d", "swin_s3_tiny_224",
    "tf_efficientnet_b0", "vit_relpos_small_patch16_224", "vit_small_patch16_dinov3", "vit_srelpos_small_patch16_224",
)  # fmt: skip
#: Modules whose smallest model is large: fewer layers show as much.
ARGUMENTS = {"deepseek_vit_412m": {"depth": 3}}
_REFUSALS = (RuntimeError, ValueError, TypeError, AssertionError, LookupError, AttributeError, ArithmeticError)


def modules() -> list[str]:
    """Every module of timm that registers models."""
    names = timm.list_modules()
    return sorted(name for name in names if timm.list_models(module=name))


def chosen() -> list[dict[str, Any]]:
    """For each: its module, the model's name, the side of its image and the arguments it is built with."""
    found: list[dict[str, Any]] = json.loads(CHOSEN.read_text())
    return found


def smallest(module: str) -> str:
    """The model of a module with the fewest parameters."""
    sizes = {}
    for name in timm.list_models(module=module, exclude_filters="test_*"):  # those of its own tests
        with torch.device("meta"):
            sizes[name] = sum(p.numel() for p in timm.create_model(name, pretrained=False).parameters())
    return min(sizes, key=lambda name: (sizes[name], name))


def described(name: str) -> dict[str, Any]:
    """What the list says of a model: the smallest image it takes, too.

    Raises:
        RuntimeError: no image fits.
    """
    for side, arguments in _attempts(name):
        if _runs(name, side, arguments):
            module = timm.model_entrypoint(name).__module__.rpartition(".")[2]
            return {"module": module, "model": name, "side": side, "arguments": arguments}
    raise RuntimeError(f"{name} takes no square image of sides {SIDES}")


def _attempts(name: str) -> Iterator[tuple[int, dict[str, Any]]]:
    """Sides in ascending order, first as they are, then told to the model when it is built; last its own side."""
    own = ARGUMENTS.get(name, {})
    for side in (*SIDES, timm.get_pretrained_cfg(name).input_size[-1]):
        yield side, own
        yield side, {**own, "img_size": side}


def _runs(name: str, side: int, arguments: dict[str, Any]) -> bool:
    """Whether the model takes such images; tried without data, so that this takes no time."""
    try:
        with torch.device("meta"), torch.no_grad():
            model: nn.Module = timm.create_model(name, pretrained=False, **arguments).eval()
            model(torch.empty(2, channels(model), side, side))
    except _REFUSALS:
        return False
    return True


def channels(model: nn.Module) -> int:
    """How many channels its images have."""
    return int(getattr(model, "pretrained_cfg", {}).get("input_size", (3,))[0])


def main() -> None:
    """Choose again for every module of the installed timm, or for those that are named."""
    warnings.simplefilter("ignore")
    wanted = sys.argv[1:] or modules()
    names = {smallest(module) for module in wanted}
    kept = {one["model"]: one for one in chosen() if one["module"] not in wanted} if sys.argv[1:] else {}
    found = {name: kept.get(name) or described(name) for name in sorted({*names, *kept, *ALSO})}
    CHOSEN.write_text(
        json.dumps(sorted(found.values(), key=lambda one: (one["module"], one["model"])), indent=1) + "\n"
    )


if __name__ == "__main__":
    main()

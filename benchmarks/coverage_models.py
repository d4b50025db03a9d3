"""The models of docs/coverage.md, by kind: how each is built with random weights, and the inputs it takes."""

import functools
import inspect
import warnings
from collections.abc import Callable
from typing import Any

import torch
import torchvision
from torch import Tensor, nn

Case = tuple[nn.Module, Any]  # a model and its inputs: a tuple, or a dictionary of keyword inputs
Build = Callable[[], Case]

#: Small images that a family accepts: the deep efficientnets lose too many digits where a map is one pixel wide,
#: inception's auxiliary head needs its own size, and windows of 7 need 224 pixels.
SIDES = {
    "alexnet": 63, "efficientnet": 64, "inception": 299, "maxvit": 224, "swin": 64, "vit_h_14": 56, "vit": 64,
}  # fmt: skip
CLIPS = {"s3d": (16, 224), "mvit": (16, 224), "swin3d": (8, 64)}  # frames and side; the others: 8 and 32


def normal(*shape: int) -> Tensor:
    """Standard normal numbers."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


def _fit(table: dict[str, Any], name: str, default: Any) -> Any:
    return next((value for family, value in table.items() if name.startswith(family)), default)


def _torchvision(name: str, **arguments: Any) -> nn.Module:
    builder = torchvision.models.get_model_builder(name)
    backbone = {"weights_backbone": None} if "weights_backbone" in inspect.signature(builder).parameters else {}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The default weight initialization", FutureWarning)
        model: nn.Module = builder(weights=None, **backbone, **arguments)
    return model


def _classifier(name: str) -> Case:
    side = _fit(SIDES, name, 32)
    arguments: dict[str, Any] = {"image_size": side} if name.startswith("vit") else {}
    if name.startswith(("googlenet", "inception", "vgg")):
        arguments = {"init_weights": False}  # slow, and drawn again
    return _torchvision(name, **arguments), (normal(2, 3, side, side),)


def _segmenter(name: str, **arguments: Any) -> Case:
    return _torchvision(name, **arguments), (normal(2, 3, 64, 64),)


def _detector(name: str) -> Case:
    side = _fit({"ssd300": 300, "ssdlite320": 320}, name, 96)
    sizes = {} if name.startswith("ssd") else {"min_size": side, "max_size": side}
    few = {"rpn_pre_nms_top_n_test": 80, "rpn_post_nms_top_n_test": 40, "box_detections_per_img": 10}
    limits: dict[str, Any] = {**few, "box_score_thresh": 0.0} if "rcnn" in name else {"score_thresh": 0.0}
    return _torchvision(name, **sizes, **limits), (
        [normal(3, side, side).sigmoid(), normal(3, side, side).cos().abs()],
    )


def _video(name: str) -> Case:
    frames, side = _fit(CLIPS, name, (8, 32))
    return _torchvision(name), (normal(1 if side > 100 else 2, 3, frames, side, side),)


def _flow(name: str) -> Case:
    first = normal(1, 3, 128, 128)
    return _torchvision(name), {"image1": first, "image2": first.roll(3, -1).tanh(), "num_flow_updates": 2}


def _timm(name: str, side: int, arguments: dict[str, Any]) -> Case:
    import timm
    from coverage_timm import channels

    model: nn.Module = timm.create_model(name, pretrained=False, **arguments)
    return model, (normal(2, channels(model), side, side),)


def _listed(module: Any) -> list[str]:
    listed: list[str] = torchvision.models.list_models(module=module)
    return listed


def _classification_cases() -> dict[str, Build]:
    return {name: functools.partial(_classifier, name) for name in _listed(torchvision.models)}


def _segmentation_cases() -> dict[str, Build]:
    names = _listed(torchvision.models.segmentation)
    return {
        **{name: functools.partial(_segmenter, name) for name in names},
        "fcn_resnet50 (auxiliary head)": functools.partial(_segmenter, "fcn_resnet50", aux_loss=True),
    }


def _detection_cases() -> dict[str, Build]:
    return {name: functools.partial(_detector, name) for name in _listed(torchvision.models.detection)}


def _video_cases() -> dict[str, Build]:
    return {name: functools.partial(_video, name) for name in _listed(torchvision.models.video)}


def _flow_cases() -> dict[str, Build]:
    return {name: functools.partial(_flow, name) for name in _listed(torchvision.models.optical_flow)}


def _timm_cases() -> dict[str, Build]:
    from coverage_timm import chosen

    return {
        f"{one['module']}: {one['model']}": functools.partial(_timm, one["model"], one["side"], one["arguments"])
        for one in chosen()
    }


def _hf_cases() -> dict[str, Build]:
    import coverage_hf

    return dict(coverage_hf.CASES)


KINDS: dict[str, Callable[[], dict[str, Build]]] = {
    "classification": _classification_cases,
    "timm": _timm_cases,
    "transformers": _hf_cases,
    "segmentation": _segmentation_cases,
    "detection": _detection_cases,
    "video": _video_cases,
    "flow": _flow_cases,
}


def names(kind: str) -> list[str]:
    """The models of a kind."""
    return list(KINDS[kind]())


def build(kind: str, name: str, seed: int = 0) -> Case:
    """The model in eval mode with its author's random weights, and its inputs."""
    torch.manual_seed(seed)
    model, inputs = KINDS[kind]()[name]()
    return model.eval(), inputs


def call(model: nn.Module, inputs: Any) -> Any:
    """The model's outputs, without gradients."""
    with torch.no_grad():
        return model(**inputs) if isinstance(inputs, dict) else model(*inputs)

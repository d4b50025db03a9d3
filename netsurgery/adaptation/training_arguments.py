"""Call functions of torch that act otherwise in training, such as dropout, as in eval mode."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F

from netsurgery.capture.inputs import Args, Kwargs, Tree

__all__ = ["call_in_eval"]

#: Functions that act otherwise in training: the argument that tells the mode, its position, its value in eval mode.
_TRAINING_ARGUMENTS: dict[object, tuple[str, int, float]] = {
    **dict.fromkeys(
        (F.dropout, F.dropout1d, F.dropout2d, F.dropout3d, F.alpha_dropout, F.feature_alpha_dropout),
        ("training", 2, False),
    ),
    **dict.fromkeys((torch.dropout, torch.dropout_, torch.alpha_dropout, torch.feature_dropout), ("train", 2, False)),
    F.rrelu: ("training", 3, False),
    F.batch_norm: ("training", 5, False),
    F.scaled_dot_product_attention: ("dropout_p", 4, 0.0),
}


def call_in_eval(func: Callable[..., Tree], args: Args, kwargs: Kwargs) -> Tree:
    """The result that a function has in eval mode, also where it acts otherwise in training."""
    if func not in _TRAINING_ARGUMENTS:
        return func(*args, **kwargs)
    name, position, value = _TRAINING_ARGUMENTS[func]
    if len(args) > position:
        args = (*args[:position], value, *args[position + 1 :])
    else:
        kwargs = {**kwargs, name: value}
    out = func(*args, **kwargs)
    unchanged = any(out is given for given in (*args, *kwargs.values()))
    return torch.ops.aten.alias.default(out) if unchanged else out  # in training it is another tensor

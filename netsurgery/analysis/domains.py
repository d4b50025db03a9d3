"""Operations that give no number for some values, such as logarithms, and the signs of their arguments.

A weight of zero does not hide a unit that is no number: zero times NaN is NaN.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping

from torch import Tensor, fx

from netsurgery.analysis.computed_weights import writers
from netsurgery.axes import Axis, leaves_in
from netsurgery.capture.operations import schema_of
from netsurgery.notation import Operation

__all__ = ["is_limited", "undefined"]

#: The least that an argument may be: "above" zero, or "zero"; None where no sign is enough.
_NEEDS = {
    "log": "above", "log2": "above", "log10": "above", "rsqrt": "above", "reciprocal": "above", "div": "above",
    "addcdiv": "above", "xlogy": "above", "sqrt": "zero", "log1p": "zero", "pow": "zero", "acos": None, "asin": None,
    "acosh": None, "atanh": None, "erfinv": None, "logit": None, "lgamma": None, "digamma": None,
}  # fmt: skip
_POSITIVE = {"exp", "exp2", "sigmoid", "softplus", "_softmax", "cosh", "rsqrt"}
_NOT_NEGATIVE = {"relu", "abs", "square", "var", "std", "linalg_vector_norm", "norm", "sqrt"}
_PLACE = {"div": 1, "xlogy": 1, "addcdiv": 2}  # of that argument, where it is not the first
#: Results of these are positive, or not negative, where their argument is.
_KEEPS = {
    "mean", "sum", "amax", "amin", "expand", "unsqueeze", "squeeze", "view", "_unsafe_view", "permute", "transpose",
    "t", "clone", "_to_copy", "alias", "detach", "select", "slice", "reciprocal", "sqrt", "cumsum",
}  # fmt: skip


def is_limited(node: fx.Node) -> bool:
    """True if an operation gives no number, or an infinite one, for some values; roots and quotients aside."""
    return schema_of(node) is not None and _name(node) in _NEEDS.keys() - {"div", "rsqrt", "sqrt", "reciprocal"}


def undefined(node: fx.Node, tensors: Mapping[str, Tensor]) -> set[Axis]:
    """The channels of units at which an operation may give no number, or an infinite one, for all that is known.

    Args:
        tensors: of the model, by name.
    """
    name = _name(node)
    if name not in _NEEDS or "params" in node.meta:
        return set()
    given = list(Operation(node).arguments.values())
    value, need = given[_PLACE.get(name, 0)], _NEEDS[name]
    if name == "pow":
        least = given[1] if isinstance(given[1], int | float) else -0.5
        if least >= 0 and least == int(least):
            return set()
        need = "zero" if least >= 0 else "above"
    if not isinstance(value, fx.Node) or (need is not None and _Sign(tensors)(value, need == "above")):
        return set()
    return set(leaves_in(value.meta["dims"]))


def _name(node: fx.Node) -> str:
    """The name of an operation, the same for the one in place."""
    schema = schema_of(node)
    return "" if schema is None else schema.name.partition("::")[2].removesuffix("_")


class _Sign:
    """Tells whether all values of a node are known to be positive, or not negative."""

    def __init__(self, tensors: Mapping[str, Tensor]):
        self.tensors = tensors
        self.memo: dict[tuple[fx.Node, bool], bool] = {}

    def __call__(self, value: object, above: bool) -> bool:
        if isinstance(value, int | float):
            return bool(value > 0 if above else value >= 0)
        if not isinstance(value, fx.Node) or writers(value):
            return False
        if (value, above) not in self.memo:
            self.memo[value, above] = self._of(value, above)
        return self.memo[value, above]

    def _of(self, node: fx.Node, above: bool) -> bool:
        if node.op == "get_attr":
            tensor = self.tensors.get(str(node.target))
            return tensor is not None and not tensor.is_meta and bool((tensor > 0 if above else tensor >= 0).all())
        if node.target is operator.getitem:
            (whole,) = node.all_input_nodes
            return bool(not above and node.args[1] == 0 and _name(whole) == "var_mean")
        if node.op != "call_function":
            return False
        name, given = _name(node), [*Operation(node).arguments.values()]
        if name in _POSITIVE or (name in _NOT_NEGATIVE and not above):
            return True
        if name in _KEEPS:
            return self(given[0], above)
        known: dict[str, Callable[[], bool]] = {
            "add": lambda: (
                self(given[2], True) and any(self(a, above) and self(b, False) for a, b in (given[:2], given[1::-1]))
            ),
            "mul": lambda: (given[0] is given[1] and not above) or all(self(one, above) for one in given[:2]),
            "div": lambda: len(given) == 2 and self(given[0], above) and self(given[1], True),
            "pow": lambda: (given[1] in (2, 4) and not above) or self(given[0], above),
            "clamp": lambda: self(given[1], above),
            "clamp_min": lambda: self(given[1], above),
            "hardtanh": lambda: self(given[1], above),
            "maximum": lambda: any(self(one, above) for one in given[:2]),
        }
        return name in known and known[name]()

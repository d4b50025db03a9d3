"""The criteria of hierarchical group sparse regularisation, as functions on norms of kernels.

Source: Mitsuno, Miyao, Kurita, "Hierarchical Group Sparse Regularization for Deep Convolutional Neural Networks",
IJCNN 2020, arXiv 2004.04394.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, NamedTuple

import torch
from torch import Tensor

__all__ = ["CRITERIA", "Criterion", "Name"]

Name = Literal[
    "l1", "group_lasso", "hierarchical_sqrt_group_lasso", "hierarchical_sq_group_lasso", "exclusive_sparsity",
    "hierarchical_sqrt_exclusive", "hierarchical_sq_exclusive", "group_l12", "hierarchical_sqrt_group_l12",
    "hierarchical_sq_group_l12",
]  # fmt: skip


class Criterion(NamedTuple):
    """``outer(sum over the kernels of an outer group of inner(norm of the kernel))``.

    Attributes:
        norm: 1 or 2, the norm over a kernel's spatial elements.
        inner: applied to each kernel's norm.
        outer: applied to each group's sum.
        degree: d in R(cW) = |c|^d R(W).
    """

    norm: int
    inner: Callable[[Tensor], Tensor]
    outer: Callable[[Tensor], Tensor]
    degree: float


def _same(x: Tensor) -> Tensor:
    return x


CRITERIA: dict[Name, Criterion] = {
    "l1": Criterion(1, _same, _same, 1),
    "group_lasso": Criterion(2, torch.square, torch.sqrt, 1),
    "hierarchical_sqrt_group_lasso": Criterion(2, _same, torch.sqrt, 0.5),
    "hierarchical_sq_group_lasso": Criterion(2, _same, torch.square, 2),
    "exclusive_sparsity": Criterion(1, _same, torch.square, 2),
    "hierarchical_sqrt_exclusive": Criterion(1, torch.square, torch.sqrt, 1),
    "hierarchical_sq_exclusive": Criterion(1, torch.square, torch.square, 4),
    "group_l12": Criterion(1, _same, torch.sqrt, 0.5),
    "hierarchical_sqrt_group_l12": Criterion(1, torch.sqrt, torch.sqrt, 0.25),
    "hierarchical_sq_group_l12": Criterion(1, torch.sqrt, torch.square, 1),
}

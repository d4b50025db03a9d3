"""Two readings of the change of the loss by a removal: its rise, and its absolute change."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Literal

from torch import Tensor

from netsurgery.tables import first_of

__all__ = ["Reading", "warn_of_falls"]

Reading = Literal["effect", "rise"]

_log = logging.getLogger("netsurgery")
_MANY = 0.1  # of the units of a group: LeNet on MNIST loses by the rise from a sixth on
_ROUNDING = 1e-6  # of the largest rise of a group


def warn_of_falls(who: str, loss_deltas: Mapping[str, Tensor], said: set[str]) -> None:
    """Warn, in one line, where the loss falls without many units of a group: ranked by the rise they go first.

    Args:
        who: the pass that scores by the rise.
        loss_deltas: the rise of the loss without each unit, ``(units,)`` for each group.
        said: lines that were logged before and are not repeated: a plan may run its passes several times.
    """
    falls = {name: int((one < -_ROUNDING * one.abs().max()).sum()) for name, one in loss_deltas.items() if len(one)}
    many = [name for name, count in falls.items() if count > _MANY * len(loss_deltas[name])]
    if not many:
        return
    count, units = sum(falls[name] for name in many), sum(len(loss_deltas[name]) for name in many)
    line = (
        f"{who}: the loss falls without {count} of {units} units ({count / units:.0%}) in {len(many)} of "
        f"{len(loss_deltas)} groups ({first_of(map(repr, many), 2)}): they go first, and together they may raise the "
        "loss by much; by='effect' ranks units by how much they change the loss of each sample, up or down"
    )
    if line not in said:
        said.add(line)
        _log.warning("%s", line)

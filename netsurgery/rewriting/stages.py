"""Stages of an edit one after the other: the network that each leaves, and the JSON of all."""

from __future__ import annotations

from netsurgery.analysis.network import Network
from netsurgery.analysis.tracing import network_of
from netsurgery.arguments import expect
from netsurgery.edit import Edit
from netsurgery.edit_json import stages_in
from netsurgery.rewriting.surgery import rewrite, with_same_names

__all__ = ["left", "read"]


def left(edit: Edit, close: bool = False) -> Network:
    """The network that an edit leads to.

    Args:
        close: True if lists close the gaps that blocks leave, as ``rewrite`` lets them.

    Example:
        >>> import torch, netsurgery
        >>> from netsurgery.rewriting.stages import left
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
        >>> left(netsurgery.Edit(netsurgery.trace(model), {"0": (0, 2, 5)}))["0"].size
        3
    """
    if edit.rewritten is not None:
        return edit.rewritten.network
    network = edit.network
    edit = edit.stages[-1]
    model = rewrite(network.model, edit) if close else with_same_names(network.model, edit)
    return network_of(model, network.inputs[0] or network.inputs[1])


def read(text: str, network: Network) -> Edit:
    """Read an edit back from JSON, whatever its stages: ``Edit.from_json`` reads those that change units last.

    Args:
        text: what ``edit.to_json()`` gave.
        network: of the model that the edit is for.

    Raises:
        InputError: as ``Edit.from_json`` does.
    """
    expect("read(text, network)", "the JSON of an edit and the Network of its model", (text, str), (network, Network))
    head, *more = stages_in(text)
    edit = Edit._read_stage(head, network)
    for before, stage in zip((head, *more), more, strict=False):
        edit = edit.then(Edit._read_stage(stage, left(edit, close=bool(before.get("closed")))))
    return edit

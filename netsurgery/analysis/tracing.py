"""From a model to its network, before its code is tried at other sizes."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Iterator

import torch
from torch import nn

from netsurgery.analysis.network import Network, analyse
from netsurgery.capture.copies import named_tensors
from netsurgery.capture.example_inputs import infer_inputs
from netsurgery.capture.inputs import Inputs, as_inputs
from netsurgery.capture.meta_run import reads_training
from netsurgery.capture.program import Program, names_used
from netsurgery.capture.recorder import record
from netsurgery.capture.refusals import refuse_unsupported
from netsurgery.errors import InputError, TraceError

__all__ = ["network_of", "undisturbed"]


@contextlib.contextmanager
def undisturbed() -> Iterator[None]:
    """Leave inference mode, in which nothing can be recorded, and pause the garbage collector.

    Thousands of new nodes would set that off again and again.
    """
    enabled = gc.isenabled()
    gc.disable()
    try:
        with torch.inference_mode(False) if torch.is_inference_mode_enabled() else contextlib.nullcontext():
            yield
    finally:
        if enabled:
            gc.enable()


@undisturbed()
def network_of(model: nn.Module, example_inputs: object) -> Network:
    """The network of a model, as ``netsurgery.trace`` returns it where it tries no sizes."""
    if not isinstance(model, nn.Module):
        raise InputError(f"expected a torch.nn.Module, got {type(model).__name__}")
    refuse_unsupported(model)
    parameters = {name: tensor for name, tensor in named_tensors(model) if isinstance(tensor, nn.Parameter)}
    if example_inputs is None:
        inputs, program = infer_inputs(model)
    else:
        inputs = as_inputs(example_inputs)
        program = record(model, inputs)
    programs = [program]
    used = names_used(programs)
    if any(name not in used for name in parameters):
        programs.append(_record_training(model, inputs))
    elif any(map(reads_training, model.modules())):
        programs.extend(_other_training(model, inputs, program))
    return analyse(model, tuple(programs), inputs)


def _record_training(model: nn.Module, inputs: Inputs) -> Program:
    """The run in training mode, for code that only runs there, such as auxiliary heads."""
    try:
        return record(model, inputs, "train")
    except TraceError as error:
        raise TraceError(f"some parameters are not used in eval mode, and in training mode {error}") from error


def _other_training(model: nn.Module, inputs: Inputs, program: Program) -> list[Program]:
    """The run in training mode, where it can be recorded on the same inputs and is another than in eval mode."""
    try:
        training = record(model, inputs, "train")
    except TraceError:  # it needs targets, say; nothing that eval mode uses depends on it
        return []
    lines = [[node.format_node() for node in one.graph.nodes] for one in (training, program)]
    return [] if lines[0] == lines[1] else [training]

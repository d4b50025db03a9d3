"""Record a model's own run, on tensors without data, as a torch.fx graph of ATen operations.

Every node knows the module and the line of source that it came from (``NodeMeta`` lists all that nodes know). Where the
code looks at values, it is run again with values behind the tensors without data, and its decisions are noted (see
``known_values``).
"""

from __future__ import annotations

import contextlib
import operator
from collections.abc import Callable

from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from netsurgery.capture.copies import named_tensors
from netsurgery.capture.inputs import Args, Inputs, Kwargs, Tree, is_namedtuple, meta_inputs, shapes_text, tensors_in
from netsurgery.capture.known_values import ConcreteValues, KnownValues, TensorMap, draw, needs_values
from netsurgery.capture.meta_run import bind, bind_inputs, home, meta_copy, run_guarded
from netsurgery.capture.meta_shapes import infer
from netsurgery.capture.op_observer import OpObserver
from netsurgery.capture.operations import OpCall
from netsurgery.capture.program import Call, Looks, Mode, Named, NodeMeta, Program
from netsurgery.capture.source_locations import format_where, location
from netsurgery.errors import TraceError

__all__ = ["NeedsValues", "record"]


class NeedsValues(BaseException):
    """The code looks at values, and there are none. No Exception, so that the code does not catch it."""


class _Recorder(OpObserver):
    def __init__(self, program: Program, names: dict[int, str], values: ConcreteValues | None):
        super().__init__(values)
        self.program, self.names = program, names
        self.nodes: TensorMap[fx.Node] = TensorMap()
        self.parts: TensorMap[tuple[fx.Node, int]] = TensorMap()  # results among several: a node once they are used
        self.count = 0  # operations so far
        self.memory: dict[int, int] = {}  # by id of the model's tensors: the memory that they are in
        self.need: NeedsValues | None = None

    def remember(self, tensor: Tensor, node: fx.Node) -> fx.Node:
        self.nodes[tensor] = node
        node.meta.setdefault("dtype", tensor.dtype)
        return node

    def read(self, meta: Tensor) -> Tensor:
        copied = None if self.values is None else super().read(meta)
        if copied is None or (copied.is_meta and self.program.values != "all"):
            raise self.needed(format_where(location()))
        return copied

    def needed(self, place: str) -> NeedsValues:
        """The exception to raise where the code looks at values that are not there.

        It is kept, since a scripted function turns it into another error.
        """
        self.need = NeedsValues(place)
        return self.need

    def note_alias(self, tensor: Tensor, other: Tensor) -> Tensor:
        self.remember(other, self.node_of(tensor))
        return other

    def call(self, path: str, forward: Callable[..., Tree], args: Args, kwargs: Kwargs) -> Tree:
        calls = self.program.calls
        call = Call(path, self.count, self.known(args), self.known(kwargs))
        calls.append(call)
        out = super().call(path, forward, args, kwargs)
        call.out, call.end, call.next = self.known(out), self.count, len(calls)
        call.kept = [self.known(tensor) for tensor in _in_objects((args, kwargs))]
        return out

    def known(self, value: Tree) -> Tree:
        """The same value with nodes in the place of tensors."""
        if isinstance(value, Tensor):
            found = self.nodes.get(value) or self.part(value)
            name = self.names.get(id(value))
            return found if found is not None or name is None else Named(name)
        if type(value) in (tuple, list):
            return type(value)([self.known(item) for item in value])
        if is_namedtuple(value):
            return value._make(map(self.known, value))
        if type(value) is dict:
            return {key: self.known(item) for key, item in value.items()}
        return value

    def describe(self, node: fx.Node) -> fx.Node:
        node.meta["module"] = self.modules[-1] if self.modules else ""
        node.meta["where"] = location()
        return node

    def assign(self, tensor: Tensor, value: Tensor) -> Tensor:
        meta = super().assign(tensor, value)
        self.memory[id(tensor)] = _memory(meta)
        return meta

    def node_of(self, value: Tree) -> Tree:
        if isinstance(value, Tensor):
            if self.memory.get(id(value)) not in (None, _memory(value)):  # something that nobody sees has moved it
                del self.memory[id(value)], self.names[id(value)]
                return self.attribute(value)
            return self.nodes.get(value) or self.part(value) or self.attribute(value)
        if isinstance(value, list | tuple):
            return [self.node_of(item) for item in value]
        return value

    def part(self, tensor: Tensor) -> fx.Node | None:
        found = self.parts.get(tensor)
        if found is None:
            return None
        whole, index = found
        node = self.program.graph.create_node("call_function", operator.getitem, (whole, index))
        node.meta.update(_kind(tensor), module=whole.meta["module"], where=whole.meta["where"])
        return self.remember(tensor, node)

    def attribute(self, tensor: Tensor) -> fx.Node:
        name = self.names.get(id(tensor))
        if name is None:
            name = f"constant:{len(self.program.constants)}"
            self.program.constants[name] = self.reals.get(id(tensor), tensor)
        node = self.describe(self.program.graph.get_attr(name))
        node.meta.update(_kind(tensor))
        return self.remember(tensor, node)

    def see(self, call: OpCall) -> Tree:
        args, kwargs = tuple(map(self.node_of, call.args)), {k: self.node_of(v) for k, v in call.kwargs.items()}
        decided = None
        try:
            if self.values is None:
                out = infer(call)
            else:
                out, decided = self.values.infer(call, self.reads)
        except RuntimeError as error:
            place = f"{call.target} in module '{self.modules[-1] if self.modules else ''}' {format_where(location())}"
            if self.program.values != "all" and needs_values(call.target, error):
                raise self.needed(place) from error
            data = "" if self.program.values == "all" else "tensors without data of "
            raise TraceError(
                f"{place} cannot run on {data}shapes {shapes_text(call[1:])}: {str(error).splitlines()[0]}"
            ) from error
        self.count += 1
        node = self.describe(self.program.graph.create_node("call_function", call.target, args, kwargs))
        node.meta["shape"] = None
        if decided is not None:
            node.meta["decided"] = decided
        if isinstance(out, Tensor):
            node.meta.update(_kind(out))
            self.remember(out, node)
        elif isinstance(out, list | tuple):
            node.meta["shape"] = [o.shape if isinstance(o, Tensor) else None for o in out]
            for index, item in enumerate(out):
                if isinstance(item, Tensor):
                    self.parts[item] = node, index
        return out


def _kind(tensor: Tensor) -> NodeMeta:
    """The facts about a tensor that are noted on its node."""
    return {"shape": tensor.shape, "dtype": tensor.dtype, "layout": (tensor.shape, tensor.stride())}


def _in_objects(value: Tree) -> list[Tensor]:
    """The tensors inside of objects among arguments, such as a cache; not those that are arguments themselves."""
    leaves = pytree.tree_leaves(value)
    return tensors_in([leaf for leaf in leaves if hasattr(leaf, "__dict__") and not isinstance(leaf, Tensor)])


def _memory(tensor: Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)


def record(model: nn.Module, inputs: Inputs, mode: Mode = "eval") -> Program:
    """Record one run of a model on inputs of the shapes of ``inputs``.

    Their values, and those of the model, are only looked at where its code does; inputs on the meta device are then
    drawn at random.

    Raises:
        TraceError: the model does not run on such inputs; the message names the module.
    """
    with contextlib.suppress(NeedsValues):
        return _record(model, inputs, mode, None)
    known, values = KnownValues(home(model)), ConcreteValues(home(model))
    inputs = draw(inputs, known.device)
    try:
        return _record(model, inputs, mode, known)
    except NeedsValues as need:
        if absent := [name for name, tensor in named_tensors(model) if tensor.is_meta]:
            raise TraceError(
                f"the code looks at values ({need}), but '{absent[0]}' has none: it is on the meta device"
            ) from need
    return _record(model, inputs, mode, values)


def _record(model: nn.Module, inputs: Inputs, mode: Mode, values: ConcreteValues | None) -> Program:
    meta, names = meta_copy(model, mode)
    looks: Looks = "none" if values is None else "known" if isinstance(values, KnownValues) else "all"
    program = Program(fx.Graph(), mode, values=looks)
    recorder = _Recorder(program, names, values)
    recorder.memory = {id(tensor): _memory(tensor) for _, tensor in named_tensors(meta)}
    on_meta_inputs = meta_inputs(inputs)
    if values is not None:
        bind(values, model, meta, names)
        bind_inputs(values, on_meta_inputs, inputs)
    given = tensors_in(on_meta_inputs)
    for index, tensor in enumerate(given):
        node = program.graph.placeholder(f"input_{index}")
        node.meta.update(_kind(tensor), module="", where=None)
        recorder.remember(tensor, node)
    try:
        out = run_guarded(meta, recorder, on_meta_inputs, home(model))
    except TraceError as error:
        if recorder.need is not None:
            raise recorder.need from error
        raise
    results = [recorder.node_of(recorder.stand_in(tensor)) for tensor in tensors_in(out)]
    if not results:
        raise TraceError(
            f"{type(model).__name__} returned no tensor ({type(out).__name__}): its outputs must hold tensors"
        )
    program.graph.output(tuple(results))
    _drop_unused(program)
    return program


def _drop_unused(program: Program) -> None:
    """Forget decisions that no operation reads, such as the place of the largest in a pooling window."""
    for node in program.operations:
        if isinstance(decided := node.meta.get("decided"), list):
            used = {user.args[1] for user in node.users}
            kept = [part if index in used else None for index, part in enumerate(decided)]
            if any(part is not None for part in kept):
                node.meta["decided"] = kept
            else:
                del node.meta["decided"]

"""Does the model's own code follow the new sizes? Run it without data and compare every operation with the prediction.

Code may hard-code a size (``view(b, 2, 58, h, w)``, ``x[:, :32]``), or compute a number from one
(``x / x.shape[1]``). Such an operation is found here, before anything is changed, and its groups are locked.
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable, Container, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import _disable_current_modes

from netsurgery.adaptation.attributes import follow
from netsurgery.adaptation.forwards import (
    Adaptation,
    by_mode,
    compiled,
    generate_forward,
    joined,
    kinds,
    merge,
    solve_attributes,
)
from netsurgery.adaptation.function_recorder import Untraceable
from netsurgery.adaptation.gradient_check import difference
from netsurgery.adaptation.module_tracer import ModuleTrace, trace_module
from netsurgery.adaptation.repeated_sizes import repeats, withdrawn
from netsurgery.analysis.costs import Sizes
from netsurgery.analysis.network import Group, Network
from netsurgery.analysis.rules import SIZED, Op
from netsurgery.axes import Axis, leaves
from netsurgery.capture.copies import named_modules, named_tensors
from netsurgery.capture.known_values import KnownValues, draw, is_number, select
from netsurgery.capture.lockstep import Lockstep, PathDiverged, source_of
from netsurgery.capture.meta_shapes import infer
from netsurgery.capture.recorder import (
    RAISED_BY_MODELS,
    Call,
    Inputs,
    Program,
    bind_inputs,
    format_where,
    home,
    is_namedtuple,
    meta_copy,
    meta_inputs,
    raised_at,
    run_guarded,
    tensors_in,
)
from netsurgery.errors import InputError, RewriteError

__all__ = ["channels_of", "fit_code", "follows", "with_repeats"]


def fit_code(model: nn.Module, network: Network, counts: Mapping[str, int]) -> tuple[Adaptation, dict[str, str]]:
    """What the model's code needs so that groups have these numbers of units, and the groups that it does not let, why.

    Raises:
        RewriteError: the code does not follow, and no group can be blamed for it.
    """
    adaptation, lost = _tried(model, network, counts)
    found: dict[str, str] = {}
    culprits: dict[tuple[type, type], tuple[str, list[str]]] = {}  # by class: where the code was looked into, and whose
    kinds = {path: type(module) for path, module in named_modules(model).items()}
    for path, (why, around) in lost.items():
        if len(why) <= _MANY or (around is None and len(why) > _FEW):
            found.update(why)
            continue
        around = path if around is None else around
        kind = kinds[path], kinds[around]
        if kind not in culprits:
            culprits[kind] = around, _bisect(model, network, counts, path, around)
        alike = _counterparts(network, culprits[kind][1], culprits[kind][0], around)
        reason = next(iter(why.values()))
        found.update({name: why.get(name, reason) for name in alike if name in counts})
    return adaptation, found or {name: reason for why, _ in lost.values() for name, reason in why.items()}


def with_repeats(model: nn.Module, network: Network, counts: Mapping[str, int], adaptation: Adaptation) -> Adaptation:
    """An adaptation with those numbers that repeat a size (see ``repeats.py``) that a run confirms."""
    needed = {(path, name) for path, values in adaptation.attributes.items() for name in values}
    found = repeats(model, network, network.sizes(counts), needed)
    changed = {network[name].channel: name for name, count in counts.items() if count != network[name].size}
    kinds: dict[str, Any] = {path: type(module) for path, module in named_modules(model).items()}
    while any(one.follows for one in found):
        attempt = _Attempt(model, network, network.sizes(counts), changed)
        attempt.adaptation = adaptation.joined(found)
        failures = attempt.failures()
        if not failures:
            break
        for path in failures:
            found = withdrawn(found, path, _mentioned(kinds[path]))
    return adaptation.joined(found)


def follows(model: nn.Module, network: Network, counts: Mapping[str, int]) -> bool:
    """Whether the modules that changed groups come near follow these numbers of units; False may be wrong."""
    return not _tried(model, network, counts, hurry=True)[1]


_MANY = 1  # groups; when the code of a module cannot say which of more than these it is about, they are tried in turn
_FEW = 4  # groups; when an operation is about more than these, it is about each of them
Lost = dict[str, tuple[dict[str, str], str | None]]


def _tried(
    model: nn.Module, network: Network, counts: Mapping[str, int], hurry: bool = False
) -> tuple[Adaptation, Lost]:
    """What the code needs; and where nothing helps the groups and why, by path.

    Where they are only suspects, the module stands there that holds them. In a hurry, modules that no changed group
    comes near are passed over.
    """
    changed = {network[name].channel: name for name, count in counts.items() if count != network[name].size}
    attempt = _Attempt(model, network, network.sizes(counts), changed)
    attempt.hurry = hurry
    while changed and (failures := attempt.failures()):
        if lost := {path: found for path, found in failures.items() if not attempt.remedy(path, found[0])}:
            return attempt.adaptation, lost
    return attempt.adaptation, {}


def _bisect(model: nn.Module, network: Network, counts: Mapping[str, int], path: str, around: str) -> list[str]:
    """Of all changed groups one that makes the code of a module fail, with those tied to it.

    Groups of the module ``around`` are tried by themselves first.
    """
    together = list(dict.fromkeys(network.equal_to(name) for name in counts))
    near = [names for names in together if any(_is_in(network[name], around) for name in names)]

    def fails(tried: list[Tied]) -> bool:
        some = {name: counts[name] for names in tried for name in names}
        return path in _tried(model, network, some, hurry=True)[1]

    return list(_last_needed(near, fails) or _last_needed(together, fails) or together[-1])


Tied = tuple[str, ...]  # names of groups that keep equally many units


def _last_needed(suspects: list[Tied], fails: Callable[[list[Tied]], bool]) -> Tied | None:
    """The last of the fewest first suspects with which the code fails; None where it does not with all of them."""
    low, high = 0, len(suspects)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if fails(suspects[:middle]) else (middle, high)
    return suspects[high - 1] if high < len(suspects) or (suspects and fails(suspects)) else None


def _is_in(group: Group, path: str) -> bool:
    return any(_within(member.module, path) for member in group.members)


def _counterparts(network: Network, names: Iterable[str], path: str, other: str) -> list[str]:
    """The groups that are in one module where those with ``names`` are in another of its class."""
    if path == other:
        return list(names)
    there = {place: name for name, place in _places_in(network, other).items()}
    here = _places_in(network, path)
    return [
        there[here[name]] if name in here else name for name in names if here.get(name) in there or name not in here
    ]


def _places_in(network: Network, path: str) -> dict[str, tuple[Any, int]]:
    """Where the groups of a module occur in it, and the how many-th to do so in just these places, by name."""
    seen: dict[Any, int] = {}
    found = {}
    for group in network.groups:
        own = [m for m in group.members if _within(m.module, path)]
        if own:
            place = tuple((m.parameter.removeprefix(f"{path}."), m.axis, m.role) for m in own)
            found[group.name] = place, seen.setdefault(place, 0)
            seen[place] += 1
    return found


class _Attempt:
    """Tries the model's code at some sizes, and mends the modules that do not follow."""

    def __init__(self, model: nn.Module, network: Network, sizes: Sizes, changed: Mapping[Axis, str]):
        self.model, self.network, self.sizes, self.changed = model, network, sizes, changed
        self.shapes = {name: tuple(map(sizes, axes)) for name, axes in network.axes.items()}
        self.kinds = {path: type(module) for path, module in named_modules(model).items()}
        self.adaptation = Adaptation(model=weakref.ref(model))
        self.tried: set[str] = set()
        self.more: set[str] = set()  # paths where the code does more with sizes than to write them down
        self.by_size: set[str] = set()
        self.hurry = False  # whether modules that no changed group comes near are passed over

    def failures(self) -> Lost:
        """The modules whose code does not follow, by path: groups and why; where these are suspects, their module."""
        found: Lost = {}
        for program in self.network.programs:
            meta, names = meta_copy(self.model, program.mode, self.shapes)
            follow(meta, self.network, self.sizes)
            self.adaptation.carry_out(meta)
            inputs = meta_inputs(self.network.inputs)
            looks = program.values != "none"
            known = _known(self.network, self.sizes, meta, names, inputs) if looks else None
            checker = _Checker(program, self.network, self.kinds, self.sizes, self.changed, known)
            checker.begin(names, inputs, meta)
            if self.hurry:
                checker.concerned = _concerned(program, self.changed)
            checker.finish(run_guarded(meta, checker, inputs, home(self.model)))
            self.more |= checker.more
            for path, why in checker.blamed.items():
                found.setdefault(path, (why, checker.suspected.get(path)))
        return found

    def remedy(self, path: str, why: dict[str, str]) -> bool:
        """Mend a module: by its attributes first, then by a rewritten graph; False where nothing is left to try."""
        if path in self.adaptation.code:
            return False
        try:
            runs = self.traces(path)
            if path not in self.tried:
                self.tried.add(path)
                found = [solve_attributes(run.recorded, self.model.get_submodule(path), self.sizes) for run in runs]
                agreed, enough = merge(found)
                if agreed:
                    self.adaptation.attributes[path] = agreed
                    if enough:
                        return True
                    if not path and agreed:  # the next try says whether they do
                        return True
            if not path and path in self.more:  # only sizes written in it are reason to touch the user's own class
                self.adaptation.attributes.pop(path, None)
                return False
            module, attributes = self.model.get_submodule(path), self.adaptation.attributes.get(path, {})
            self.adaptation.code[path] = self.written(path, module, attributes)
        except Untraceable as reason:
            if path not in self.by_size:
                self.by_size.add(path)
                if alike := self.adaptation.attributes.get(path) or self.of_these_sizes(path):
                    self.adaptation.attributes[path] = alike  # the next try says whether they are what they seem
                    return True
            for name in why:
                why[name] += f" (the code of {path or 'the model'} {reason})"
            return False
        self.adaptation.reasons[path] = next(iter(why.values()))
        return True

    def of_these_sizes(self, path: str) -> dict[str, int]:
        """New values of the integers that a module's code mentions and that are the size of changed groups.

        For code that cannot be traced. A size that groups have which change in different ways says nothing.
        """
        now: dict[int, set[int]] = {}
        for program in self.network.programs:
            for call in [call for call in program.calls if call.path == path]:
                for node in program.operations[call.begin : call.end]:
                    for channel in channels_of(node):
                        if channel in self.network.by_channel:
                            now.setdefault(channel.size, set()).add(self.sizes(channel))
        module = self.model.get_submodule(path)
        kind: Any = type(module)
        held = {name: n for name, n in module.__dict__.items() if type(n) is int and name in _mentioned(kind)}
        found = {name: (n, now.get(n, {n})) for name, n in held.items()}
        return {name: new for name, (n, sizes) in found.items() for new in sizes if len(sizes) == 1 and new != n}

    def written(self, path: str, module: nn.Module, attributes: Mapping[str, Any]) -> str:
        """The source of a module's ``forward`` at other sizes: of one that computes other things in training, both.

        Raises:
            Untraceable: its code cannot be followed, or has other gradients; the message says why.
        """
        code = self.code(path, module, self.sizes, attributes)
        self.prove(path, module)
        return code

    def code(self, path: str, module: nn.Module, sizes: Sizes, attributes: Mapping[str, Any]) -> str:
        """The source of a ``forward`` at some sizes."""

        def joined_code(graphs: list[fx.Graph]) -> str:
            by_channel = self.network.by_channel
            texts = [
                generate_forward(one, module, sizes, attributes, by_channel, written_only=not path) for one in graphs
            ]
            return joined(zip(map(kinds, graphs), texts, strict=True))

        in_eval, in_training = (
            joined_code([run.graph for run in self.traces(path, training)]) for training in (False, True)
        )
        return in_eval if in_eval == in_training else by_mode(in_eval, in_training)

    def prove(self, path: str, module: nn.Module) -> None:
        """Make sure that a rewritten ``forward`` has the gradients of the code, at the sizes that this has.

        Modules of one class whose code did the same are tried once.

        Raises:
            Untraceable: it has not; the message says where they part.
        """
        program = self.recorded(path)
        runs = [run for training in (False, True) for run in self.traces(path, training)]
        alike = type(module), *((str(run.recorded), run.code) for run in runs)
        if alike not in program.heard:
            forward = compiled(self.code(path, module, Sizes({}), {}))["forward"]
            calls = [call for call in program.calls if call.path == path]
            found = (
                difference(module, forward, call, self.network.tensors, training)
                for call in calls
                for training in (False, True)
            )
            program.heard[alike] = next((one for one in found if one is not None), None)
        if program.heard[alike] is not None:
            raise Untraceable(f"has other gradients as a graph, which {program.heard[alike]}")

    def recorded(self, path: str, training: bool = False) -> Program:
        """The first program in which a module runs; in training, one that was recorded in training if there is any."""
        programs = [p for p in self.network.programs if any(call.path == path for call in p.calls)]
        return next((p for p in programs if training and p.mode == "train"), programs[0])

    def traces(self, path: str, training: bool = False) -> list[ModuleTrace]:
        """The traces of a module's code, one for each call.

        Raises:
            Untraceable: it cannot be traced; the message says why.
        """
        program = self.recorded(path, training)
        module, key = self.model.get_submodule(path), (path, training)
        if key not in program.heard or program.heard[key][0]() is not module:
            try:
                calls = [call for call in program.calls if call.path == path]
                runs = [trace_module(module, program, call, self.network, training) for call in calls]
                program.heard[key] = weakref.ref(module), runs
            except Untraceable as reason:
                program.heard[key] = weakref.ref(module), str(reason)
        found: list[ModuleTrace] | str = program.heard[key][1]
        if isinstance(found, str):
            raise Untraceable(found)
        return found


@functools.cache
def _mentioned(kind: Any) -> frozenset[str]:
    """The names that the code of a class of modules mentions, but for how it is built and shown."""
    methods = {name: f for base in reversed(kind.__mro__) for name, f in vars(base).items() if hasattr(f, "__code__")}
    used = [f.__code__.co_names for name, f in methods.items() if name not in ("__init__", "extra_repr", "__repr__")]
    return frozenset(name for names in used for name in names)


def _first(sizes: Sizes) -> Callable[[Axis], Tensor]:
    """At other sizes, the first units stand for those that stay."""
    return lambda channel: torch.arange(sizes(channel))


def _known(network: Network, sizes: Sizes, meta: nn.Module, names: Mapping[int, str], inputs: Inputs) -> KnownValues:
    """What is known of a model's tensors at other sizes, and of its inputs: integers."""
    values = KnownValues(next((t.device for t in network.tensors.values()), torch.device("cpu")))
    for _, tensor in named_tensors(meta):
        if (name := names.get(id(tensor), "")) in network.tensors and not is_number(tensor):
            values.bind(tensor, select(network.tensors[name].detach(), network.axes[name], _first(sizes)))
    bind_inputs(values, inputs, draw(network.inputs, values.device))
    return values


_LINEAR = (nn.Linear, nn.modules.linear.NonDynamicallyQuantizableLinear)


class _Checker(Lockstep):
    def __init__(
        self,
        program: Program,
        network: Network,
        kinds: Mapping[str, type],
        sizes: Sizes,
        changed: Mapping[Axis, str],
        known: KnownValues | None,
    ):
        super().__init__(program, known)
        self.known = known
        self.calls = 0  # module runs so far
        self.sources: dict[int, Any] = {}  # by id of a tensor: what it was in the recorded run
        self.alive: list[Any] = []  # ids are only good while their tensors live
        self.network, self.kinds = network, kinds
        self.sizes, self.changed = sizes, changed
        self.blamed: dict[str, dict[str, str]] = {}  # by module path: groups, and why
        self.more: set[str] = set()  # paths where the code does more with sizes than to write them down
        self.concerned: list[int] | None = None  # if known, how many operations before each place need to run
        self.suspected: dict[str, str] = {}  # paths where these groups are only suspects: the module that holds them

    def call(self, path: str, forward: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        index, self.calls = self.calls, self.calls + 1
        call = self.program.calls[index] if index < len(self.program.calls) else None
        if call is None or call.path != path:
            raise PathDiverged(f"{path} runs where {call.path if call else 'nothing'} ran when it was traced")
        self.arrive(call.begin)
        if self.concerned is not None and self.concerned[call.begin] == self.concerned[call.end]:
            return self.passed_over(call)
        try:
            out = super().call(path, forward, args, kwargs)
            self.arrive(call.end)
        except (*RAISED_BY_MODELS, InputError) as error:
            if path not in self.blamed and not self.is_the_same(
                call, args
            ):  # what follows from a size already found wrong says nothing new
                first = str(error).strip().splitlines()[0] if str(error) else type(error).__name__
                left = isinstance(error, PathDiverged)
                does = "does other things at" if left else "refuses"
                shapes = isinstance(error, RuntimeError) and not left  # as torch raises where shapes do not fit
                place = f" {format_where(raised_at(error))}".rstrip()
                self.attribute_to_module(f"the code {does} other sizes ({first}){place}", path, more=not shapes)
            out = self.passed_over(call)
        return out

    def is_the_same(self, call: Call, args: tuple[Any, ...]) -> bool:
        """Whether a linear layer reads what it should: how memory is laid out decides by which operations it works."""
        given = call.args[0] if self.kinds[call.path] in _LINEAR and len(call.args) == 1 and not call.kwargs else None
        if not isinstance(given, fx.Node) or self.sources.get(id(args[0])) != self.origin(given):
            return False
        return tuple(args[0].shape) == tuple(map(self.sizes, given.meta["dims"]))

    def passed_over(self, call: Call) -> Any:
        """What a run of a module should have returned; the code goes on after it."""
        with _disable_current_modes():
            out = self.predicted(call.out)
        self.position, self.calls = call.end, call.next
        return out

    def arrive(self, position: int) -> None:
        """Make sure that all operations before this one have run."""
        while self.position < position and self.leave_out(self.program.operations[self.position]):
            pass
        if self.position != position:
            raise PathDiverged(f"{self.program.operations[min(self.position, position)].target} is left out")

    def predicted(self, out: Any) -> Any:
        """What a module should have returned, without data, to go on and find all obstacles in one run."""
        if isinstance(out, fx.Node):
            shape, strides = tuple(map(self.sizes, out.meta["dims"])), out.meta["layout"][1]
            order = sorted(range(len(shape)), key=lambda dim: -strides[dim])
            tensor = torch.empty_permuted(shape, order, dtype=out.meta["dtype"], device="meta")
            self.sources[id(tensor)] = source_of(out)
            self.alive.append(tensor)
            return tensor
        if type(out) in (tuple, list):
            return type(out)([self.predicted(item) for item in out])
        if is_namedtuple(out):
            return out._make(map(self.predicted, out))
        return {key: self.predicted(item) for key, item in out.items()} if type(out) is dict else out

    def attribute_failure(self, axes: Iterable[Axis], node: fx.Node, why: str) -> None:
        """Blame the changed groups in some axes, or else those of the module that an operation runs in."""
        path = self.modules[-1] if self.modules else ""
        names = [self.changed[leaf] for axis in axes for leaf in leaves(axis) if leaf in self.changed]
        reason = Op(node, None).reason(why)
        if names:
            self.blamed.setdefault(path, {}).update(dict.fromkeys(names, reason))
        else:
            self.attribute_to_module(reason, path, more=False)

    def attribute_to_module(self, reason: str, path: str, more: bool = True) -> None:
        """Blame the groups of the innermost module around that holds a changed one.

        Args:
            more: the code does more with sizes than to write them down.

        Raises:
            RewriteError: no module does.
        """
        if more:
            self.more.add(path)
        groups = [group for group in self.network.groups if group.channel in self.changed]
        parts = path.split(".") if path else []
        for around in [".".join(parts[:n]) for n in range(len(parts), -1, -1)]:
            if names := [group.name for group in groups if _is_in(group, around)]:
                why = dict.fromkeys(names, f"{reason} in {around or 'the model'}")
                self.blamed.setdefault(path, {}).update(why)
                self.suspected[path] = around
                return
        raise RewriteError(f"the model's code does not follow the new sizes: {reason}")

    def begin(self, names: Mapping[int, str], inputs: Any, model: nn.Module) -> None:
        """Note what the tensors are that the run starts from."""
        self.sources.update(names)
        placeholders = [node for node in self.program.graph.nodes if node.op == "placeholder"]
        self.sources.update((id(t), node) for t, node in zip(tensors_in(inputs), placeholders, strict=True))
        self.alive.extend((inputs, model))

    def finish(self, outputs: Any) -> None:
        """Compare what the run ended with."""
        *_, output = self.program.graph.nodes
        results = [self.sources.get(id(self.stand_in(tensor))) for tensor in tensors_in(outputs)]
        if not self.blamed and results != [*map(self.origin, output.args[0])]:
            self.attribute_to_module("the code does other things at other sizes", "")

    def same(self, tensor: Tensor, other: Tensor) -> Tensor:
        self.alive.append(other)
        if id(tensor) in self.reals:
            self.reals[id(other)] = self.reals[id(tensor)]
        elif id(tensor) in self.sources:
            self.sources[id(other)] = self.sources[id(tensor)]
        return other

    def see(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        node = self.expected(func)
        if node is None:
            source = self.sources.get(id(args[0]))
            if isinstance(source, fx.Node | tuple) and self.written_later(source):
                raise PathDiverged("a copy is made that was not made when it was traced")
            out = infer(func, args, kwargs) if self.known is None else self.known.infer(func, args, kwargs)[0]
            return self.same(args[0], out)
        out = self.answer(node, func, args, kwargs)
        parts = out if isinstance(out, list | tuple) else [out]
        self.sources.update((id(t), (node, i) if parts is out else node) for i, t in enumerate(parts))
        self.alive.append(out)
        return out

    def answer(self, node: fx.Node, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The result of an operation; where it is another than predicted, the predicted one."""
        dims = node.meta["dims"] if isinstance(node.meta["shape"], list) else [node.meta["dims"]]
        predicted = [None if axes is None else tuple(map(self.sizes, axes)) for axes in dims]
        if self.tensors_differ(node, args) or self.arguments_differ(node, func, args, kwargs):
            return self.substitute(node, args, predicted)
        try:
            if self.known is None:
                out = infer(func, args, kwargs)
            else:
                out = self.known.follow(node, func, args, kwargs, _first(self.sizes))
        except (RuntimeError, ValueError, IndexError) as error:
            asked = next((v for v in args if isinstance(v, list | tuple) and _is_number(list(v))), None)
            hard_coded = [] if asked is None or dims[0] is None else self.wrong([(dims[0], asked)], only_old=True)
            self.attribute_failure(
                hard_coded or _touched(node, *node.all_input_nodes),
                node,
                f"fails at other sizes ({str(error).splitlines()[0]})",
            )
            return self.substitute(node, args, predicted)
        actual = [t.shape if isinstance(t, Tensor) else None for t in (out if isinstance(out, list | tuple) else [out])]
        if len(actual) != len(predicted):
            self.attribute_failure(_flat(dims), node, "returns another number of parts")
            return self.substitute(node, args, predicted)
        pairs = [
            (axes, shape) for axes, shape in zip(dims, actual, strict=True) if axes is not None and shape is not None
        ]
        if any(len(axes) != len(shape) for axes, shape in pairs):
            self.attribute_failure(_flat(dims), node, "returns another number of dimensions")
            return self.substitute(node, args, predicted)
        if wrong := self.wrong(pairs):
            size = next(n for axes, shape in pairs for a, n in zip(axes, shape, strict=True) if a is wrong[0])
            self.attribute_failure(wrong, node, f"size {size} is fixed by the code")
            return self.substitute(node, args, predicted)
        return out

    def wrong(self, pairs: list[tuple[Any, Any]], only_old: bool = False) -> list[Axis]:
        """Axes with another size than predicted: those that have the size before the surgery, or else all of them."""
        found = [
            (axis, n)
            for axes, shape in pairs
            if len(axes) == len(shape)
            for axis, n in zip(axes, shape, strict=True)
            if n != self.sizes(axis)
        ]
        old = [axis for axis, n in found if n == axis.size]
        return old if old or only_old else [axis for axis, _ in found]

    def tensors_differ(self, node: fx.Node, args: tuple[Any, ...]) -> bool:
        """Whether an operation reads a constant with other values; the groups that it concerns are blamed.

        Raises:
            PathDiverged: it reads other results than when it was traced.
        """
        for now, then in zip(_tensors(args), _tensors(node.args), strict=False):
            source = self.origin(then)
            constant = self.program.constants.get(source) if isinstance(source, str) else None
            if constant is None:
                if self.sources.get(id(now)) != source:
                    raise PathDiverged(f"{node.target} reads something else than when it was traced")
                continue
            real = self.reals.get(id(now))
            if real is None or constant.is_meta:  # its values cannot be seen without data
                differs = node.target.overloadpacket is not torch.ops.aten.index  # type: ignore[union-attr]
            else:
                differs = real.shape != constant.shape or not torch.equal(real, constant)
            if differs:
                touched = _touched(node, *node.all_input_nodes)
                self.attribute_failure(touched, node, "a tensor that the code makes may follow a size")
                self.more.add(self.modules[-1] if self.modules else "")
                return True
        return False

    def arguments_differ(self, node: fx.Node, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        """Whether an argument is another than it should be at these sizes; the groups that it concerns are blamed."""
        expected: dict[str, Axis] = node.meta.get("expected", {})
        sized = SIZED.get(node.target.overloadpacket, frozenset())  # type: ignore[union-attr]
        values = [*zip(_names(func), args, node.args, strict=False)]
        for name, now, then in values + [(name, now, node.kwargs.get(name)) for name, now in kwargs.items()]:
            if isinstance(now, Tensor) or now is None:
                continue
            if name in expected:
                if name == "start" and isinstance(now, int):  # as slicing reads it
                    length = args[0].shape[Op(node, None)["dim"]]
                    now = min(max(now + length if now < 0 else now, 0), length)
                if isinstance(now, int) and now != self.sizes(expected[name]):
                    self.attribute_failure([expected[name]], node, f"{name}={now} is fixed by the code")
                    return True
            elif name not in sized and now != then and _is_number(now):
                reason = Op(node, None).reason(f"the code computes {name}={then} from a size")
                self.attribute_to_module(reason, self.modules[-1] if self.modules else "")
                return True
        return False

    def substitute(self, node: fx.Node, args: tuple[Any, ...], predicted: list[tuple[int, ...] | None]) -> Any:
        """Go on with tensors of the predicted sizes, to find all obstacles in one run."""
        given = next((value.dtype for value in pytree.tree_leaves(args) if isinstance(value, Tensor)), torch.float32)
        dtype = node.meta.get("dtype", given)
        out = [None if shape is None else torch.empty(shape, dtype=dtype, device="meta") for shape in predicted]
        return out if isinstance(node.meta["shape"], list) else out[0]


def channels_of(node: fx.Node) -> dict[Axis, None]:
    """The channels in the dimensions of an operation's arguments and results."""
    if "channels" not in node.meta:
        touched = _touched(node, *node.all_input_nodes)
        node.meta["channels"] = dict.fromkeys(leaf for axis in touched for leaf in leaves(axis))
    return node.meta["channels"]  # type: ignore[no-any-return]


def _concerned(program: Program, changed: Container[Axis]) -> list[int]:
    """How many operations before each place concern a changed group, or write to a tensor."""
    count = [0]
    for node in program.operations:
        schema: Any = getattr(node.target, "_schema", None)
        matters = getattr(schema, "is_mutable", False) or any(channel in changed for channel in channels_of(node))
        count.append(count[-1] + matters)
    return count


@functools.cache
def _names(func: Any) -> tuple[str, ...]:
    """The names of the arguments of an operation."""
    return tuple(argument.name for argument in func._schema.arguments)


def _tensors(value: Any) -> Iterator[Any]:
    """Tensors, or nodes in their place, among arguments."""
    for item in value:
        if isinstance(item, Tensor | fx.Node):
            yield item
        elif isinstance(item, list | tuple):
            yield from _tensors(item)


def _within(module: str, path: str) -> bool:
    return not path or module == path or module.startswith(f"{path}.")


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) or (
        isinstance(value, list) and all(isinstance(item, int | float) for item in value)
    )


def _touched(*nodes: fx.Node) -> list[Axis]:
    return [axis for node in nodes for axis in _flat(node.meta["dims"])]


def _flat(dims: Any) -> list[Axis]:
    if isinstance(dims, Axis):
        return [dims]
    return [axis for item in dims or () if item is not None for axis in _flat(item)]

"""Does the model's own code follow the new sizes? Run it without data and compare every operation with the prediction.

Code may hard-code a size (``view(b, 2, 58, h, w)``, ``x[:, :32]``), or compute a number from one
(``x / x.shape[1]``). Such an operation is found here, before anything is changed, and its groups are frozen.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import _disable_current_modes

from netsurgery.adapting import Adaptation, rebuild, solve
from netsurgery.alongside import Alongside, LeftPath, source_of
from netsurgery.attributes import follow
from netsurgery.axes import Axis, leaves
from netsurgery.copying import named_modules, named_tensors
from netsurgery.costs import Sizes
from netsurgery.errors import InputError, RewriteError
from netsurgery.listening import Deaf, Heard, hear
from netsurgery.network import Network
from netsurgery.rules import SIZED, Op
from netsurgery.shapes import infer
from netsurgery.tracing import (
    RAISED_BY_MODELS,
    Inputs,
    Program,
    bare_inputs,
    home,
    lend_inputs,
    run_guarded,
    skeleton,
    tensors_in,
)
from netsurgery.values import Known, draw, is_number, select

__all__ = ["adapt"]


def adapt(model: nn.Module, network: Network, counts: Mapping[str, int]) -> tuple[Adaptation, dict[str, str]]:
    """What the model's code needs so that groups have these numbers of units, and the groups that it does not let, why.

    Raises:
        RewriteError: the code does not follow, and no group can be blamed for it.
    """
    adaptation, lost = _tried(model, network, counts)
    found: dict[str, str] = {}
    for path, (why, vague) in lost.items():
        found.update(_culprit(model, network, counts, path) if vague and len(why) > _MANY else why)
    return adaptation, found


_MANY = 1  # groups; when the code of a module cannot say which of more than these it is about, they are tried in turn


def _tried(
    model: nn.Module, network: Network, counts: Mapping[str, int]
) -> tuple[Adaptation, dict[str, tuple[dict[str, str], bool]]]:
    """What the code needs; and where nothing helps the groups and why, by path, and whether they are only suspects."""
    changed = {network[name].channel: name for name, count in counts.items() if count != network[name].size}
    attempt = _Attempt(model, network, network.sizes(counts), changed)
    while changed and (failures := attempt.failures()):
        if lost := {path: found for path, found in failures.items() if not attempt.remedy(path, found[0])}:
            return attempt.adaptation, lost
    return attempt.adaptation, {}


def _culprit(model: nn.Module, network: Network, counts: Mapping[str, int], path: str) -> dict[str, str]:
    """Of all changed groups one that makes the code of a module fail, with those tied to it, and why."""
    tied = {name: names for names in network.ties for name in names}
    together = list(dict.fromkeys(tied.get(name, (name,)) for name in counts))

    def failure(n: int) -> dict[str, str] | None:
        some = {name: counts[name] for names in together[:n] for name in names}
        return _tried(model, network, some)[1].get(path, (None, False))[0]

    low, high, why = 0, len(together), failure(len(together))
    while high - low > 1:
        middle = (low + high) // 2
        if found := failure(middle):
            high, why = middle, found
        else:
            low = middle
    reason = next(iter((why or {}).values()), "the code refuses other sizes")
    return dict.fromkeys(together[high - 1], reason)


class _Attempt:
    """Tries the model's code at some sizes, and mends the modules that do not follow."""

    def __init__(self, model: nn.Module, network: Network, sizes: Sizes, changed: Mapping[Axis, str]):
        self.model, self.network, self.sizes, self.changed = model, network, sizes, changed
        self.shapes = {name: tuple(map(sizes, axes)) for name, axes in network.axes.items()}
        self.kinds = {path: type(module) for path, module in named_modules(model).items()}
        self.adaptation = Adaptation(model=weakref.ref(model))
        self.tried: set[str] = set()
        self.more: set[str] = set()  # paths where the code does more with sizes than to write them down

    def failures(self) -> dict[str, tuple[dict[str, str], bool]]:
        """The modules whose code does not follow, by path: groups and why, and whether these are only suspects."""
        found: dict[str, tuple[dict[str, str], bool]] = {}
        for program in self.network.programs:
            bare, names = skeleton(self.model, program.mode, self.shapes)
            follow(bare, self.network, self.sizes)
            self.adaptation.carry_out(bare)
            inputs = bare_inputs(self.network.inputs)
            looks = program.values != "none"
            known = _known(self.network, self.sizes, bare, names, inputs) if looks else None
            checker = _Checker(program, self.network, self.kinds, self.sizes, self.changed, known)
            checker.begin(names, inputs, bare)
            checker.finish(run_guarded(bare, checker, inputs, home(self.model)))
            self.more |= checker.more
            for path, why in checker.blamed.items():
                found.setdefault(path, (why, path in checker.vague))
        return found

    def remedy(self, path: str, why: dict[str, str]) -> bool:
        """Mend a module: by its attributes first, then by a rewritten graph; False where nothing is left to try."""
        if path in self.adaptation.code:
            return False
        try:
            runs = self.heard(path)
            if path not in self.tried:
                self.tried.add(path)
                found = [solve(run.usual, self.model.get_submodule(path), self.sizes) for run in runs]
                if all(one == found[0] for one in found) and found[0][0]:
                    self.adaptation.attributes[path], enough = found[0]
                    if enough:
                        return True
            if not path and path in self.more:  # only sizes written in it are reason to touch the user's own class
                self.adaptation.attributes.pop(path, None)
                return False
            module, attributes = self.model.get_submodule(path), self.adaptation.attributes.get(path, {})
            codes = {rebuild(run.whole, module, self.sizes, attributes, self.network.by_channel) for run in runs}
        except Deaf as reason:
            for name in why:
                why[name] += f" (the code of {path or 'the model'} {reason})"
            return False
        if len(codes) > 1:
            return False
        self.adaptation.code[path], self.adaptation.reasons[path] = codes.pop(), next(iter(why.values()))
        return True

    def heard(self, path: str) -> list[Heard]:
        """What the code of a module does, each time it runs."""
        program = next(p for p in self.network.programs if any(call.path == path for call in p.calls))
        module = self.model.get_submodule(path)
        if path not in program.heard or program.heard[path][0]() is not module:
            try:
                runs = [hear(module, program, call, self.network) for call in program.calls if call.path == path]
                program.heard[path] = weakref.ref(module), runs
            except Deaf as reason:
                program.heard[path] = weakref.ref(module), str(reason)
        found: list[Heard] | str = program.heard[path][1]
        if isinstance(found, str):
            raise Deaf(found)
        return found


def _first(sizes: Sizes) -> Callable[[Axis], Tensor]:
    """At other sizes, the first units stand for those that stay."""
    return lambda channel: torch.arange(sizes(channel))


def _known(network: Network, sizes: Sizes, bare: nn.Module, names: Mapping[int, str], inputs: Inputs) -> Known:
    """What is known of a model's tensors at other sizes, and of its inputs: integers."""
    values = Known(next((t.device for t in network.tensors.values()), torch.device("cpu")))
    for _, tensor in named_tensors(bare):
        if (name := names.get(id(tensor), "")) in network.tensors and not is_number(tensor):
            values.lend(tensor, select(network.tensors[name].detach(), network.axes[name], _first(sizes)))
    lend_inputs(values, inputs, draw(network.inputs, values.device))
    return values


class _Checker(Alongside):
    def __init__(
        self,
        program: Program,
        network: Network,
        kinds: Mapping[str, type],
        sizes: Sizes,
        changed: Mapping[Axis, str],
        known: Known | None,
    ):
        super().__init__(program, known)
        self.known = known
        self.calls = 0  # module runs so far
        self.sources: dict[int, Any] = {}  # by id of a tensor: what it was in the recorded run
        self.alive: list[Any] = []  # ids are only good while their tensors live
        self.network, self.kinds = network, kinds
        self.sizes, self.changed = sizes, changed
        self.blamed: dict[str, dict[str, str]] = {}  # by module path: groups, and why
        self.vague: set[str] = set()  # paths where these groups are only suspects
        self.more: set[str] = set()  # paths where the code does more with sizes than to write them down

    def call(self, path: str, forward: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        index, self.calls = self.calls, self.calls + 1
        call = self.program.calls[index] if index < len(self.program.calls) else None
        if call is None or call.path != path:
            raise LeftPath(f"{path} runs where {call.path if call else 'nothing'} ran when it was traced")
        self.arrive(call.begin)
        try:
            out = super().call(path, forward, args, kwargs)
            self.arrive(call.end)
        except (*RAISED_BY_MODELS, InputError) as error:
            if path not in self.blamed:  # what follows from a size already found wrong says nothing new
                first = str(error).splitlines()[0] if str(error) else type(error).__name__
                does = "does other things at" if isinstance(error, LeftPath) else "refuses"
                shapes = type(error) is RuntimeError  # as torch raises for shapes that do not fit
                self.blame_module(f"the code {does} other sizes ({first})", path, more=not shapes)
            with _disable_current_modes():
                out = self.predicted(call.out)
            self.position, self.calls = call.end, call.next
        return out

    def arrive(self, position: int) -> None:
        """Make sure that all operations before this one have run."""
        while self.position < position and self.leave_out(self.program.operations[self.position]):
            pass
        if self.position != position:
            raise LeftPath(f"{self.program.operations[min(self.position, position)].target} is left out")

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
        return {key: self.predicted(item) for key, item in out.items()} if type(out) is dict else out

    def blame(self, axes: Iterable[Axis], node: fx.Node, why: str) -> None:
        """Blame the changed groups in some axes, or else those of the module that an operation runs in."""
        path = self.modules[-1] if self.modules else ""
        names = [self.changed[leaf] for axis in axes for leaf in leaves(axis) if leaf in self.changed]
        reason = Op(node, None).reason(why)
        if names:
            self.blamed.setdefault(path, {}).update(dict.fromkeys(names, reason))
        else:
            self.blame_module(reason, path)

    def blame_module(self, reason: str, path: str, more: bool = True) -> None:
        """Blame the groups of the innermost module around that holds a changed one, and of all that run the same code.

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
            if not any(_within(member.module, around) for group in groups for member in group.members):
                continue
            kind = self.kinds[around]
            same = [other for other, own in self.kinds.items() if own is kind and kind is not nn.Sequential]
            for place in [around, *same]:
                names = [g.name for g in groups if any(_within(member.module, place) for member in g.members)]
                why = dict.fromkeys(names, f"{reason} in {place or 'the model'}")
                self.blamed.setdefault(path, {}).update(why)
            self.vague.add(path)
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
            self.blame_module("the code does other things at other sizes", "")

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
                raise LeftPath("a copy is made that was not made when it was traced")
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
            self.blame(
                hard_coded or _touched(node, *node.all_input_nodes),
                node,
                f"fails at other sizes ({str(error).splitlines()[0]})",
            )
            return self.substitute(node, args, predicted)
        actual = [t.shape if isinstance(t, Tensor) else None for t in (out if isinstance(out, list | tuple) else [out])]
        if len(actual) != len(predicted):
            self.blame(_flat(dims), node, "returns another number of parts")
            return self.substitute(node, args, predicted)
        pairs = [
            (axes, shape) for axes, shape in zip(dims, actual, strict=True) if axes is not None and shape is not None
        ]
        if any(len(axes) != len(shape) for axes, shape in pairs):
            self.blame(_flat(dims), node, "returns another number of dimensions")
            return self.substitute(node, args, predicted)
        if wrong := self.wrong(pairs):
            size = next(n for axes, shape in pairs for a, n in zip(axes, shape, strict=True) if a is wrong[0])
            self.blame(wrong, node, f"size {size} is fixed by the code")
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
            LeftPath: it reads other results than when it was traced.
        """
        for now, then in zip(_tensors(args), _tensors(node.args), strict=False):
            source = self.origin(then)
            constant = self.program.constants.get(source) if isinstance(source, str) else None
            if constant is None:
                if self.sources.get(id(now)) != source:
                    raise LeftPath(f"{node.target} reads something else than when it was traced")
                continue
            real = self.reals.get(id(now))
            if real is None or constant.is_meta:  # its values cannot be seen without data
                differs = node.target.overloadpacket is not torch.ops.aten.index  # type: ignore[union-attr]
            else:
                differs = real.shape != constant.shape or not torch.equal(real, constant)
            if differs:
                touched = _touched(node, *node.all_input_nodes)
                self.blame(touched, node, "a tensor that the code makes may follow a size")
                self.more.add(self.modules[-1] if self.modules else "")
                return True
        return False

    def arguments_differ(self, node: fx.Node, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        """Whether an argument is another than it should be at these sizes; the groups that it concerns are blamed."""
        expected: dict[str, Axis] = node.meta.get("expected", {})
        sized = SIZED.get(node.target.overloadpacket, frozenset())  # type: ignore[union-attr]
        values = [(a.name, now, then) for a, now, then in zip(func._schema.arguments, args, node.args, strict=False)]
        for name, now, then in values + [(name, now, node.kwargs.get(name)) for name, now in kwargs.items()]:
            if isinstance(now, Tensor) or now is None:
                continue
            if name in expected:
                if name == "start" and isinstance(now, int):  # as slicing reads it
                    length = args[0].shape[Op(node, None)["dim"]]
                    now = min(max(now + length if now < 0 else now, 0), length)
                if isinstance(now, int) and now != self.sizes(expected[name]):
                    self.blame([expected[name]], node, f"{name}={now} is fixed by the code")
                    return True
            elif name not in sized and now != then and _is_number(now):
                self.blame(_touched(*node.all_input_nodes), node, f"the code computes {name}={then} from a size")
                self.more.add(self.modules[-1] if self.modules else "")
                return True
        return False

    def substitute(self, node: fx.Node, args: tuple[Any, ...], predicted: list[tuple[int, ...] | None]) -> Any:
        """Go on with tensors of the predicted sizes, to find all obstacles in one run."""
        given = next((value.dtype for value in pytree.tree_leaves(args) if isinstance(value, Tensor)), torch.float32)
        dtype = node.meta.get("dtype", given)
        out = [None if shape is None else torch.empty(shape, dtype=dtype, device="meta") for shape in predicted]
        return out if isinstance(node.meta["shape"], list) else out[0]


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

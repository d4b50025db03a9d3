"""Find remedies for modules whose code does not follow new sizes: attributes first, then a rewritten ``forward``."""

from __future__ import annotations

import functools
import weakref
from collections.abc import Mapping

from torch import fx, nn

from netsurgery.adaptation.attributes import follow
from netsurgery.adaptation.forwards import (
    Adaptation,
    agreed_attributes,
    by_mode,
    compiled,
    generate_forward,
    joined,
    kinds,
    solve_attributes,
)
from netsurgery.adaptation.function_recorder import Untraceable
from netsurgery.adaptation.gradient_check import difference
from netsurgery.adaptation.model_code import ModelCode
from netsurgery.adaptation.module_tracer import ModuleTrace, trace_module
from netsurgery.adaptation.size_checker import Failure, SizeChecker, known_values
from netsurgery.analysis.costs import Sizes
from netsurgery.analysis.network import Network
from netsurgery.axes import Axis
from netsurgery.capture.inputs import meta_inputs
from netsurgery.capture.meta_run import home, meta_copy, run_guarded
from netsurgery.capture.program import Program

__all__ = ["Remedies", "mentioned_names"]


class Remedies:
    """Runs the model's code at some sizes, and collects in ``adaptation`` remedies for modules that do not follow."""

    def __init__(
        self, code: ModelCode, network: Network, sizes: Sizes, changed: Mapping[Axis, str], near_only: bool = False
    ):
        self.model_code, self.model = code, code.model
        self.network, self.sizes, self.changed = network, sizes, changed
        self.shapes = {name: tuple(map(sizes, axes)) for name, axes in network.axes.items()}
        self.adaptation = Adaptation(model=weakref.ref(code.model))
        self.solved: set[str] = set()  # paths whose attributes were solved for
        self.guessed: set[str] = set()  # paths whose attributes were chosen by their value
        self.branching: set[str] = set()  # paths where the code does more with sizes than to write them down
        self.near_only = near_only  # pass over modules that no changed group comes near

    def failures(self) -> dict[str, Failure]:
        """The modules whose code does not follow, by path."""
        found: dict[str, Failure] = {}
        for program in self.network.programs:
            checker = self.check(program)
            self.branching |= checker.branching
            for path, failure in checker.failures.items():
                found.setdefault(path, failure)
        return found

    def check(self, program: Program) -> SizeChecker:
        """Run the code, with the adaptation so far, in lockstep with one recorded run."""
        meta, names = meta_copy(self.model, program.mode, self.shapes)
        follow(meta, self.network, self.sizes)
        self.adaptation.carry_out(meta)
        inputs = meta_inputs(self.network.inputs)
        known = None if program.values == "none" else known_values(self.network, self.sizes, meta, names, inputs)
        checker = SizeChecker(program, self.network, self.model_code.kinds, self.sizes, self.changed, known)
        checker.begin(names, inputs, meta)
        if self.near_only:
            checker.relevant = self.model_code.relevant_operations(program, self.changed)
        checker.finish(run_guarded(meta, checker, inputs, home(self.model)))
        return checker

    def remedy(self, path: str, failure: Failure) -> Failure | None:
        """Find a remedy that may help a module; the next run tells.

        Returns:
            None; or the failure, where nothing is left to try, with the reason why the code cannot be rewritten.
        """
        if path in self.adaptation.code:
            return failure
        try:
            if self.by_attributes(path):
                return None
            if not path and path in self.branching:  # the user's own class is only rewritten for sizes written in it
                self.adaptation.attributes.pop(path, None)
                return failure
            module, attributes = self.model.get_submodule(path), self.adaptation.attributes.get(path, {})
            code = self.code(path, module, self.sizes, attributes)
            self.compare_gradients(path, module)
        except Untraceable as reason:
            if self.by_values(path):
                return None
            added = f" (the code of {path or 'the model'} {reason})"
            return Failure({name: why + added for name, why in failure.reasons.items()}, failure.suspected_in)
        self.adaptation.code[path] = code
        self.adaptation.reasons[path] = next(iter(failure.reasons.values()))
        return None

    def by_attributes(self, path: str) -> bool:
        """Try, once, the attributes that are sizes of dimensions. True if they may be enough.

        Raises:
            Untraceable: the code cannot be traced.
        """
        runs = self.traces(path)
        if path in self.solved:
            return False
        self.solved.add(path)
        module = self.model.get_submodule(path)
        agreed, enough = agreed_attributes([solve_attributes(run.recorded, module, self.sizes) for run in runs])
        if agreed:
            self.adaptation.attributes[path] = agreed
        return bool(agreed) and (enough or not path)  # the next run says if they are, for the outermost one

    def by_values(self, path: str) -> bool:
        """Try, once, the attributes that have the value of a size that changes, for code that cannot be rewritten."""
        if path in self.guessed:
            return False
        self.guessed.add(path)
        if alike := self.adaptation.attributes.get(path) or self.of_these_sizes(path):
            self.adaptation.attributes[path] = alike
        return bool(alike)

    def of_these_sizes(self, path: str) -> dict[str, object]:
        """New values of the integers that a module's code mentions and that are the size of changed groups.

        This serves code that cannot be traced. A size is left out if groups of that size change in different ways.
        """
        now: dict[int, set[int]] = {}
        for program in self.network.programs:
            for call in [call for call in program.calls if call.path == path]:
                for node in program.operations[call.begin : call.end]:
                    for channel in self.model_code.channels_of(node):
                        if channel in self.network.by_channel:
                            now.setdefault(channel.size, set()).add(self.sizes(channel))
        module = self.model.get_submodule(path)
        kind: type = type(module)
        held = {name: n for name, n in module.__dict__.items() if type(n) is int and name in mentioned_names(kind)}
        found = {name: (n, now.get(n, {n})) for name, n in held.items()}
        return {name: new for name, (n, sizes) in found.items() for new in sizes if len(sizes) == 1 and new != n}

    def code(self, path: str, module: nn.Module, sizes: Sizes, attributes: Mapping[str, object]) -> str:
        """The source of a ``forward`` at some sizes: one body, or one for each mode.

        Raises:
            Untraceable: the code cannot be followed.
        """

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

    def compare_gradients(self, path: str, module: nn.Module) -> None:
        """Make sure that a generated ``forward`` has the gradients of the original code, at the original sizes.

        Modules of one class whose code did the same are compared once.

        Raises:
            Untraceable: they differ; the message says where.
        """
        program = self.recorded(path)
        runs = [run for training in (False, True) for run in self.traces(path, training)]
        alike = program, type(module), *((str(run.recorded), run.code) for run in runs)
        if alike not in self.model_code.differences:
            forward = compiled(self.code(path, module, Sizes({}), {}))["forward"]
            found = (
                difference(module, forward, call, self.network.tensors, training)
                for training in (False, True)
                for call in self.recorded(path, training).calls
                if call.path == path
            )
            self.model_code.differences[alike] = next((one for one in found if one is not None), None)
        if (differs := self.model_code.differences[alike]) is not None:
            raise Untraceable(f"has other gradients as a graph, which {differs}")

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
        key = program, path, training
        if key not in self.model_code.traces:
            module, calls = self.model.get_submodule(path), [call for call in program.calls if call.path == path]
            try:
                runs = [trace_module(module, program, call, self.network, training) for call in calls]
                self.model_code.traces[key] = runs
            except Untraceable as reason:
                self.model_code.traces[key] = str(reason)
        found = self.model_code.traces[key]
        if isinstance(found, str):
            raise Untraceable(found)
        return found


@functools.cache
def mentioned_names(kind: type) -> frozenset[str]:
    """The names in the methods of a class of modules, except those that build and show it."""
    methods = {name: f for base in reversed(kind.__mro__) for name, f in vars(base).items() if hasattr(f, "__code__")}
    used = [f.__code__.co_names for name, f in methods.items() if name not in ("__init__", "extra_repr", "__repr__")]
    return frozenset(name for names in used for name in names)

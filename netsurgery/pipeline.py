"""From a model and a list of passes to a smaller model.

    model --trace--> Network --pass, pass, pass--> Edit --rewrite--> model

A pass reads a Network and returns it with scores laid on, or returns an Edit; it never changes a tensor. ``plan`` runs
the passes and makes sure that the model's own code follows the new sizes; ``rewrite`` alone cuts.
"""

from __future__ import annotations

import abc
import dataclasses
import logging
from collections.abc import Sequence
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from netsurgery.adaptation.fit_code import fit_code, with_repeats
from netsurgery.adaptation.model_code import ModelCode
from netsurgery.adaptation.one_by_one import settle_alone
from netsurgery.analysis.costs import Cost
from netsurgery.analysis.network import Network
from netsurgery.analysis.tracing import network_of, undisturbed
from netsurgery.edit import Edit
from netsurgery.errors import NetsurgeryError, PassError, RewriteError
from netsurgery.fidelity import Measured
from netsurgery.rewriting.dropping import depth_known
from netsurgery.rewriting.surgery import check_blocks, rewrite, with_same_names
from netsurgery.units import sources
from netsurgery.verification import oracles

__all__ = ["Pass", "apply", "cost", "plan", "trace"]

Model = TypeVar("Model", bound=nn.Module)
Locks = dict[int, dict[str, str]]  # by the number of a stage: reasons by group
_log = logging.getLogger("netsurgery")


class Pass(abc.ABC):
    """A decision about a network. Derive a frozen dataclass: its fields are its arguments.

    Attributes:
        needs: what earlier passes must have given: ``{"scores"}``; or ``{"edit"}``, of a pass that is run on that Edit
            instead of the network, and returns it with other units or values.
        gives: what this pass gives: ``{"scores"}``, ``{"block scores"}`` or ``{"edit"}``; nothing where it only locks
            groups (``network.with_locked``). Scores and locks hold for all passes that follow.
        advice: the pass to put before this one, in words for the error where there is none; empty for the usual one.
    """

    needs: ClassVar[frozenset[str]] = frozenset()
    gives: ClassVar[frozenset[str]] = frozenset()
    advice: ClassVar[str] = ""

    @property
    def groupwise(self) -> bool:
        """True if the scores of a group do not depend on which others are locked: then ``plan`` asks for them once."""
        return False

    @abc.abstractmethod
    def run(self, network: Any) -> Network | Edit:
        """Return the network with scores or locks laid on it, or an Edit of it. Must be pure."""

    def measure(self, model: nn.Module, edit: Edit) -> Measured | None:
        """Compare a model with what an edit leaves of it, on the data that the pass holds; None where it holds none.

        ``plan`` asks the passes in turn, and puts the first answer into ``edit.measured``.
        """
        return None


@undisturbed()
def trace(model: nn.Module, example_inputs: object = None, *, try_sizes: bool = True) -> Network:
    """Record a model's run without data and find which of its dimensions belong together.

    Args:
        model: any module. It is neither touched nor run; a copy without weights is, with its hooks.
        example_inputs: a tuple of the positional inputs, one tensor, or a dictionary of keyword inputs; only shapes
            and dtypes count, unless the code looks at values. None: inferred from the first layer.
        try_sizes: run the code with fewer units, too, and lock the groups that it does not follow. ``plan`` does
            without, and tries the sizes that it asks for.

    Raises:
        TraceError: the model does not run on such inputs; the message names the module and the line. Or its code
            looks at values of a model on the meta device.

    Example:
        >>> import torch, netsurgery
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
        >>> [(group.name, group.size) for group in netsurgery.trace(model).prunable]
        [('0', 8)]
    """
    network = network_of(model, example_inputs)
    if not try_sizes:
        return network
    code = ModelCode(model)
    halves = {group.name: group.size - group.size // 2 for group in network.prunable}
    while found := fit_code(code, network, halves)[1]:  # each round locks at least one group
        network = network.with_locked(found)
        halves = {group.name: halves[group.name] for group in network.prunable}
    return settle_alone(code, network)


@undisturbed()
def plan(model: nn.Module, passes: Sequence[Pass], example_inputs: object = None) -> Edit:
    """Decide what to remove; the model stays as it is. Passes after a removal get a copy that is cut.

    Args:
        model: any module; it stays as it is.
        passes: run in order; the last must return an Edit.
        example_inputs: as for ``trace``.

    Returns:
        An Edit that the model's own code is known to follow. A group whose size turns out to be hard-coded is locked
        and the passes are run again, but for those that are ``groupwise``. Where a pass holds data, ``measured`` says
        how far the smaller network is from the original on up to 512 of its samples (132 pictures of 224 pixels).

    Raises:
        PassError: the order of passes cannot work, or a pass returned something else.
        NetsurgeryError: whatever tracing and the passes raise.

    Example:
        >>> import torch, netsurgery
        >>> from netsurgery.passes import MagnitudeScore, PruneChannels
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
        >>> print(netsurgery.plan(model, [MagnitudeScore(), PruneChannels(0.5)]).diff())
        0.weight 8x4 -> 4x4
        0.bias 8 -> 4
        2.weight 2x8 -> 2x4
        parameters 58 -> 30 (51.7%)
        MACs 48 -> 24 (50.0%)
    """
    check_order(passes)
    network, code = trace(model, example_inputs, try_sizes=False), ModelCode(model)
    known: dict[Any, Network] = {}
    locks: Locks = {}
    while True:
        edit, found, stage = _run(passes, code, network.with_locked(locks.get(0, {})), known, locks)
        if not found:
            return dataclasses.replace(edit, measured=_measured(passes, model, edit))
        locks[stage] = {**locks.get(stage, {}), **found}


def _measured(passes: Sequence[Pass], model: nn.Module, edit: Edit) -> Measured | None:
    """The measure of the first pass that holds data, or the reason why it cannot measure."""
    try:
        return next((found for one in passes if (found := one.measure(model, edit)) is not None), None)
    except NetsurgeryError as error:
        return Measured(0, why=str(error))


@dataclasses.dataclass
class _Progress:
    """The edits of the passes so far. Where modules are rewritten a new stage begins, of another model.

    Attributes:
        code: of the model that the stage is of.
        begun: the edits of the stages before.
        stage: what is carried out at once after these; None where nothing is yet.
        earlier: that without the last edit, which passes may still change.
        last: the last edit, for the network that all before it leave.
        index: the number of the stage.
    """

    code: ModelCode
    begun: Edit | None = None
    stage: Edit | None = None
    earlier: Edit | None = None
    last: Edit | None = None
    index: int = 0

    @property
    def edit(self) -> Edit | None:
        """All of it."""
        return self.begun if self.stage is None else dataclasses.replace(self.stage, first=self.begun)

    def add(self, given: Edit, changed: bool) -> dict[str, str]:
        """Go on with an edit; returns the groups whose new sizes the model's code does not follow, if any.

        Args:
            changed: whether it is the last one, which a pass has changed.

        Raises:
            PassError: it rewrites modules of a model that would go on counting the blocks that are dropped before.
        """
        if given.rewritten is not None:
            if self.stage is not None and (why := depth_known(self.code.model, self.stage)) is not None:
                raise PassError(
                    f"modules cannot be rewritten after {', '.join(self.stage.dropped)} of this model goes in the same "
                    f"plan, since {why}: put RemoveBlocks last, or call apply once for it and once for the rest"
                )
            self.begun = given if self.edit is None else self.edit.then(given)
            self.code, self.index = ModelCode(given.rewritten.network.model), self.index + 1
            self.stage, self.earlier, self.last = None, None, given
            return {}
        if not changed:
            self.earlier = self.stage
        stage = given if self.earlier is None else self.earlier.then(given)
        if changed and self.stage is not None and stage.counts == self.stage.counts:
            adaptation = self.stage.adaptation
        else:
            adaptation, found = fit_code(self.code, stage.network, stage.counts)
            if found:
                return found
            adaptation = with_repeats(self.code, stage.network, stage.counts, adaptation, stage.dropped)
        self.stage = dataclasses.replace(stage, adaptation=adaptation)
        self.last = self.stage if self.earlier is None else given
        check_blocks(self.code.model, self.stage, [adaptation] if adaptation is not None else [])
        return {}


def _run(
    passes: Sequence[Pass], code: ModelCode, network: Network, known: dict[Any, Network], locks: Locks
) -> tuple[Edit, dict[str, str], int]:
    """The edit that passes lead to, and the groups whose new sizes the model's code does not follow, if any.

    Args:
        known: results of groupwise passes, by their place and the units that removals before them keep; gets more.
        locks: the groups that must stay as they are in later stages.

    Returns:
        The edit, the groups, and the number of the stage that these are of.
    """
    done = _Progress(code)
    kept: tuple[Any, ...] = ()
    for index, one in enumerate(passes):
        if "edit" in one.needs and done.last is not None and (done.last.dropped or done.last.modules):
            does = "rewrites modules" if done.last.modules else "drops blocks"
            raise PassError(f"{one!r} changes the units that an edit keeps, but the edit before it {does}")
        if (before := known.get((index, kept))) is not None and any(g.name in before.scores for g in network.prunable):
            result: Network | Edit = _again(network, before)
        else:
            result = one.run(done.last if "edit" in one.needs else network)
        if isinstance(result, Network) and "edit" not in one.gives:
            network = result
            if one.groupwise:
                known[index, kept] = network
        elif isinstance(result, Edit) and "edit" in one.gives:
            for stage in result.stages:
                if found := done.add(stage, "edit" in one.needs):
                    return stage, found, done.index
            if index + 1 < len(passes) and "edit" not in passes[index + 1].needs:  # it looks at what this edit leaves
                network, kept = _left(code.model, done, locks), (*kept, *map(_content, result.stages))
        else:
            raise PassError(f"{one!r} declares that it gives {sorted(one.gives)} but returned {type(result).__name__}")
    if done.edit is None:
        raise PassError("no pass returned an Edit: add a removal such as PruneChannels(0.5)")
    return done.edit, {}, done.index


def _content(edit: Edit) -> tuple[Any, ...]:
    return tuple(edit.keep.items()), tuple(map(repr, edit.modules.items()))


def _again(network: Network, before: Network) -> Network:
    """A network with the locks, and the scores of open groups, that a pass gave it before more groups were locked."""
    locked = network.with_locked({group.name: group.locked for group in before.groups if group.locked is not None})
    scores = {name: one for name, one in before.scores.items() if locked[name].locked is None}
    return locked.with_scores(scores, before.comparable, before.ordinal)


def _left(model: nn.Module, done: _Progress, locks: Locks) -> Network:
    """The network that edits leave, with the scores and locks that passes have laid on the one before.

    Args:
        model: the one that was given.
    """
    last, stage, dropped = done.last, done.stage, tuple[str, ...]()
    assert last is not None
    if last.rewritten is not None:
        network = last.rewritten.network
    else:
        assert stage is not None
        inputs, dropped = last.network.inputs, stage.dropped
        network = trace(with_same_names(done.code.model, stage), inputs[0] or inputs[1], try_sizes=False)
    names, before = last.names_in(network), last.network
    locked = {new: reason for new, old in names.items() if (reason := before[old].locked) is not None}
    if last.rewritten is not None:
        locked |= locks.get(done.index, {})
    units = {new: sources(last.keep.get(old, range(before[old].size))) for new, old in names.items()}
    scores = {
        new: before.scores[old][units[new]]
        for new, old in names.items()
        if isinstance(before.scores.get(old), Tensor) and len(before.scores[old]) == before[old].size
        if -1 not in units[new]  # a new unit has no score
    }
    scored = network.with_locked(locked).with_scores(scores, before.comparable, before.ordinal)
    blocks = {path: score for path, score in before.block_scores.items() if path not in dropped}
    return dataclasses.replace(scored, original=done.code.model, given=model, block_scores=blocks)


_ADVICE = {
    "block scores": "a score of blocks such as BlockInfluenceScore(data)",
    "edit": "a removal such as PruneChannels(0.5)",
    "scores": "a score such as HGSRScore() or MagnitudeScore()",
}


def check_order(passes: Sequence[Pass]) -> None:
    """Raise PassError unless each pass finds what it needs; nothing is computed before."""
    if isinstance(passes, Pass):
        raise PassError(f"expected a list of passes, got the single pass {passes!r}: put it into [...]")
    if isinstance(passes, nn.Module):
        raise PassError("expected a list of passes, got a model, which comes first: plan(model, passes)")
    if passes is not None and (isinstance(passes, str) or not isinstance(passes, Sequence)):
        raise PassError(
            f"expected a list of passes, got {type(passes).__name__}: for example [HGSRScore(), PruneChannels(0.5)]"
        )
    if not passes:
        raise PassError("no passes given: for example [HGSRScore(), PruneChannels(0.5)]")
    given: set[str] = set()
    for position, one in enumerate(passes, start=1):
        if not isinstance(one, Pass):
            raise PassError(
                f"pass {position} is {one!r}, not a netsurgery.Pass: passes are instances, such as HGSRScore()"
            )
        if missing := sorted(one.needs - given):
            advice = one.advice or _ADVICE.get(missing[0], _ADVICE["scores"])
            raise PassError(
                f"pass {position}, {one!r}, needs {', '.join(missing)}, which no pass before it gives: "
                f"put {advice} before it"
            )
        if "edit" in one.needs and "edit" not in passes[position - 2].gives:
            raise PassError(
                f"pass {position}, {one!r}, changes an edit, but pass {position - 1} gives none: "
                "put it right after the removal"
            )
        given |= one.gives
    if "edit" not in given:
        raise PassError("no pass gives an edit: add a removal such as PruneChannels(0.5)")


def apply(
    model: Model,
    passes: Sequence[Pass],
    example_inputs: object = None,
    *,
    inplace: bool = False,
    optimizer: Optimizer | Sequence[Optimizer] | None = None,
    ema: nn.Module | Sequence[nn.Module] | None = None,
    verify: bool | float = False,
) -> Model:
    """Run passes on a model and return it smaller: the user's own class, module names and state_dict keys.

    One line of the logger ``netsurgery`` says what was asked for and what was removed, as ``edit.summary()`` does, and
    where a pass holds data, loss and agreement before and after: a warning where groups fell short or are nearly
    emptied.

    Args:
        model: any module.
        passes: for example ``[HGSRScore(), PruneChannels(0.5)]``.
        example_inputs: as for ``trace``.
        inplace: change ``model`` itself instead of a copy.
        optimizer: one or several, as for ``rewrite``: they go on with the smaller model, their state cut.
        ema: averages of the weights, as for ``rewrite``: they are cut in place.
        verify: carry the edit out on a copy first, and hold it to ``netsurgery.verify``: what removes units to the
            silenced original, what only adds or rewrites to the same outputs. A number is the largest difference; by
            default the square root of the rounding error of the model's numbers, 3e-4 in float32.

    Raises:
        NetsurgeryError: as ``plan`` and ``rewrite`` do, and where outputs differ by more; the model, optimizers and
            averages are then as they were.

    Example:
        >>> import torch, netsurgery
        >>> from netsurgery.passes import HGSRScore, PruneChannels
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
        >>> netsurgery.apply(model, [HGSRScore(), PruneChannels(0.5)])
        Sequential(
          (0): Linear(in_features=4, out_features=4, bias=True)
          (1): ReLU()
          (2): Linear(in_features=4, out_features=2, bias=True)
        )
    """
    edit = plan(model, passes, example_inputs)
    if verify is not False:
        _hold(model, edit, example_inputs, None if verify is True else verify)
    short = any(outcome.short or outcome.few for stage in edit.stages for outcome in stage.outcomes)
    _log.log(logging.WARNING if short else logging.INFO, "%s", edit.summary().partition("\n")[0])
    return rewrite(model, edit, inplace=inplace, optimizer=optimizer, ema=ema)


def _hold(model: nn.Module, edit: Edit, example_inputs: Any, most: float | None) -> None:
    """Raise RewriteError where what an edit leads to, on a copy, is not what it claims to be."""
    if most is None:
        real = next((t.dtype for t in edit.network.tensors.values() if t.is_floating_point()), torch.float32)
        most = torch.finfo(real).eps ** 0.5
    found = oracles.verify(model, rewrite(model, edit), edit, example_inputs)
    if not found <= most:
        raise RewriteError(
            f"the result is not what the edit claims: outputs differ by {found:.1g} of the largest, and at most "
            f"{most:.1g} is allowed. A rewrite of modules that is to change outputs says so (exact = False)"
        )


def cost(model: nn.Module, example_inputs: Any = None) -> Cost:
    """Parameters and multiply-accumulates of one run, in all and per module.

    Example:
        >>> import torch, netsurgery
        >>> netsurgery.cost(torch.nn.Linear(4, 8), torch.randn(2, 4)).macs
        64
    """
    with torch.no_grad():
        return trace(model, example_inputs, try_sizes=False).cost()

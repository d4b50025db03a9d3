"""Features of modules of two networks, collected by hooks, and their distance."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from operator import methodcaller

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from netsurgery.arguments import near_names
from netsurgery.capture.inputs import as_inputs
from netsurgery.capture.meta_run import home
from netsurgery.errors import InputError
from netsurgery.kernels.criteria import accumulator
from netsurgery.passes.calibration import in_eval_mode, outputs_of
from netsurgery.passes.parameters import own_module

__all__ = ["Hints"]

# By the number of dimensions of features:
_CONVOLUTIONS: dict[int, type[nn.Conv2d] | type[nn.Conv3d]] = {4: nn.Conv2d, 5: nn.Conv3d}
_POOLS: dict[int, Callable[..., Tensor]] = {4: F.adaptive_avg_pool2d, 5: F.adaptive_avg_pool3d}
Seen = dict[str, tuple[int, object]]  # by path: how often a module ran, and its last output
_LEAST = 1e-12  # mean square of features, below which these are not divided: of zeros, gradients would be NaN


class Hints(nn.Module):
    """The squared differences of features of the last run of both networks.

    Args:
        paths: modules of the teacher by those of the student.
        normalize: divide the features of each sample by their root mean square.
        project: fit the student's channels by a layer, and sizes in space by pooling.
        example_inputs: run once to compare shapes and to make layers; without them, nothing is run.

    Raises:
        InputError: unknown paths, or features that cannot be compared.
    """

    def __init__(
        self,
        paths: Mapping[str, str],
        student: nn.Module,
        teacher: nn.Module,
        normalize: bool = False,
        project: bool = False,
        example_inputs: object = None,
    ):
        super().__init__()
        self.paths, self.normalize, self.project = dict(paths), normalize, project
        self.layers = nn.ModuleList(nn.Identity() for _ in self.paths)
        found = _places("student", student, self.paths), _places("teacher", teacher, self.paths.values())
        self.sides = _Side("student", student, found[0]), _Side("teacher", teacher, found[1])
        if example_inputs is not None:
            try:
                self._try([own_module(student), own_module(teacher)], example_inputs)
            except BaseException:
                self.close()
                raise

    def close(self) -> None:
        """Take the hooks away, and forget what they hold."""
        for side in self.sides:
            side.close()

    def forward(self) -> Tensor:
        """The sum over the hints of the mean squared difference; the features are forgotten."""
        pairs = [[side.take(path) for side, path in zip(self.sides, pair, strict=True)] for pair in self.paths.items()]
        with torch.autocast(pairs[0][0].device.type, enabled=False):
            return torch.stack([self._difference(index, *pair) for index, pair in enumerate(pairs)]).sum()

    def _difference(self, index: int, student: Tensor, teacher: Tensor) -> Tensor:
        dtype = accumulator(student, teacher)
        own, wanted = self._fitted(index, student.to(dtype), teacher.detach().to(dtype))
        if self.normalize:
            own, wanted = _normalized(own), _normalized(wanted)
        return (own - wanted).square().mean()

    def _fitted(self, index: int, own: Tensor, wanted: Tensor) -> tuple[Tensor, Tensor]:
        """The features of both, in one shape."""
        shapes = tuple(own.shape), tuple(wanted.shape)
        if self.project:
            own = self.layers[index](own)
            if own.dim() == wanted.dim() and own.shape[2:] != wanted.shape[2:] and own.dim() in _POOLS:
                size = [min(pair) for pair in zip(own.shape[2:], wanted.shape[2:], strict=True)]
                own, wanted = (_POOLS[own.dim()](features, size) for features in (own, wanted))
        if own.shape != wanted.shape:
            advice = "" if self.project else ", or pass project=True and example_inputs"
            raise InputError(f"{self._in_words(index, *shapes)}: name modules whose features have equal shapes{advice}")
        return own, wanted

    def _in_words(self, index: int, own: tuple[int, ...], wanted: tuple[int, ...]) -> str:
        path, other = [*self.paths.items()][index]
        return f"hint {path!r}: {other!r}: features are {own} in the student and {wanted} in the teacher"

    def _try(self, networks: Sequence[nn.Module], example_inputs: object) -> None:
        """Run both once, make the layers that channels need, and compare shapes."""
        for network in networks:
            device = home(network)
            inputs = pytree.tree_map_only(Tensor, methodcaller("to", device), as_inputs(example_inputs))
            with in_eval_mode(network), torch.no_grad():
                outputs_of(network, inputs, device)
        for index, pair in enumerate(self.paths.items()):
            own, wanted = (side.take(path) for side, path in zip(self.sides, pair, strict=True))
            if self.project:
                self.layers[index] = self._layer(index, own, wanted)
            with torch.no_grad():
                self._difference(index, own, wanted)

    def _layer(self, index: int, own: Tensor, wanted: Tensor) -> nn.Module:
        """The layer that gives the student's features as many channels as the teacher's have."""
        if own.dim() != wanted.dim() or not 2 <= own.dim() <= 5:
            raise InputError(f"{self._in_words(index, tuple(own.shape), tuple(wanted.shape))}: no layer fits these")
        dim = 1 if own.dim() in _CONVOLUTIONS else -1
        sizes = own.shape[dim], wanted.shape[dim]
        if sizes[0] == sizes[1]:
            return nn.Identity()
        layer: nn.Module = nn.Linear(*sizes) if dim == -1 else _CONVOLUTIONS[own.dim()](*sizes, 1)
        return layer.to(own.device, accumulator(own))


class _Side:
    """One of the two networks, and the outputs of its modules in its last run."""

    def __init__(self, who: str, network: nn.Module, places: Mapping[str, nn.Module]):
        self.who = who
        self.seen: Seen = {}
        self.handles = [own_module(network).register_forward_pre_hook(_forget(own_module(network), self.seen))]
        for path, place in places.items():
            self.handles.append(place.register_forward_hook(_keep(place, path, self.seen)))

    def take(self, path: str) -> Tensor:
        """The features of a module."""
        times, features = self.seen.pop(path, (0, None))
        said = f"hint: module {path!r} of the {self.who}"
        if not times:
            raise InputError(f"{said} did not run: run student and teacher, as given here, before each call")
        if times > 1:
            raise InputError(f"{said} ran {times} times: name one that runs once, since features of one run are meant")
        if not isinstance(features, Tensor) or not features.is_floating_point():
            raise InputError(f"{said} gives {type(features).__name__}, not a tensor of floating-point numbers")
        return features

    def close(self) -> None:
        for handle in self.handles:
            handle.remove()
        self.seen.clear()


def _places(who: str, network: nn.Module, paths: Iterable[str]) -> dict[str, nn.Module]:
    """Modules by path."""
    named = dict(own_module(network).named_modules(remove_duplicate=False))
    for path in paths:
        if path not in named:
            raise InputError(
                f"hints: the {who} {type(own_module(network)).__name__} has no module {path!r}{near_names(path, named)}"
            )
    return {path: named[path] for path in paths}


# Hooks look whether it is their own module that runs, since a copy of a network (an average of its weights) has them,
# too. They are functions because these are not copied with it.


def _forget(network: nn.Module, seen: Seen) -> Callable[[nn.Module, object], None]:
    def hook(module: nn.Module, _: object) -> None:
        if module is network:
            seen.clear()

    return hook


def _keep(place: nn.Module, path: str, seen: Seen) -> Callable[[nn.Module, object, object], None]:
    def hook(module: nn.Module, _: object, output: object) -> None:
        if module is place:
            first = output[0] if isinstance(output, tuple | list) and output else output
            kept = first.clone() if isinstance(first, Tensor) else first  # a layer after it may write into it
            seen[path] = (seen.get(path, (0, None))[0] + 1, kept)

    return hook


def _normalized(features: Tensor) -> Tensor:
    """Each sample's features divided by their root mean square."""
    squares = features.square().mean([*range(1, features.dim())], keepdim=True)
    return features * squares.clamp_min(_LEAST).rsqrt()

"""Networks drawn by hypothesis: a program is a list of steps over a growing pool of live tensors.

A program prints as the Python expression that makes it, so that a failing example can be replayed:

    from random_networks import Program, Step, example, build
    program = Program(...)  # as hypothesis printed it
    model, inputs = build(program), example(program)
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import isqrt
from typing import NamedTuple

import torch
import torch.nn.functional as F
from hypothesis import strategies as st
from torch import Tensor, nn


class Step(NamedTuple):
    """One operation on tensors of the pool; what it returns joins the pool."""

    op: str
    inputs: tuple[int, ...]
    args: tuple = ()

    def __repr__(self) -> str:
        return f"Step({self.op!r}, {self.inputs}{f', {self.args}' if self.args else ''})"


@dataclass(frozen=True)
class Program:
    """A network: ``shapes`` of its inputs (NCHW), its steps, which tensors of the pool it returns.

    ``inline`` runs operations without parameters in the network's own forward, not in a module each; the parameters of
    the steps named in ``untrained`` have requires_grad off.
    """

    shapes: tuple[tuple[int, ...], ...]
    steps: tuple[Step, ...]
    outputs: tuple[int, ...]
    inline: bool = False
    untrained: tuple[int, ...] = ()
    seed: int = 0


# What each operation does ------------------------------------------------------------------------------------

ACTIVATIONS = {
    "relu": F.relu,
    "silu": F.silu,
    "gelu": F.gelu,
    "sigmoid": torch.sigmoid,
    "tanh": torch.tanh,
    "hardswish": F.hardswish,
    "leaky": lambda x: F.leaky_relu(x, 0.1),
    "square": lambda x: x * x,
}


class Scale(nn.Module):
    """A weight and a bias per channel that live in no module of torch.nn."""

    def __init__(self, shape: tuple[int, ...]):
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(shape))
        self.beta = nn.Parameter(torch.ones(1, *shape))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gamma + self.beta


class Function(nn.Module):
    """An operation without parameters as a module of its own."""

    def __init__(self, step: Step):
        super().__init__()
        self.step = step

    def forward(self, *tensors: Tensor) -> Tensor | tuple[Tensor, ...]:
        return FUNCTIONS[self.step.op](*tensors, *self.step.args)


def grouped(x: Tensor, groups: int, per_group: int) -> Tensor:
    """View (b, c, h, w) as (b, groups, c / groups, h, w); with ``per_group`` the size is written out, else read."""
    b, c, h, w = x.shape
    return x.reshape(b, groups, per_group or c // groups, h, w)


def shuffle(x: Tensor, groups: int, per_group: int) -> Tensor:
    return grouped(x, groups, per_group).transpose(1, 2).flatten(1, 2)


def refine(x: Tensor, groups: int, per_group: int, what: str) -> Tensor:
    y = grouped(x, groups, per_group)
    y = {
        "relu": lambda: y.relu(),
        "softmax 1": lambda: y.softmax(1),
        "softmax 2": lambda: y.softmax(2),
        "center 1": lambda: y - y.sum(1, keepdim=True),
        "center 2": lambda: y - y.sum(2, keepdim=True),
        "flip": lambda: y.flip(1),
    }[what]()
    return y.reshape(x.shape)


def attend(q: Tensor, k: Tensor, v: Tensor, heads: int, scale: float, fused: bool) -> Tensor:
    q, k, v = (t.reshape(*t.shape[:2], heads, t.shape[2] // heads).transpose(1, 2) for t in (q, k, v))
    if fused:
        out = F.scaled_dot_product_attention(q, k, v, scale=scale)
    else:
        out = (q @ k.transpose(-2, -1) * scale).softmax(-1) @ v
    return out.transpose(1, 2).flatten(2)


def halves(x: Tensor, swap: bool) -> tuple[Tensor, ...]:
    """Two halves whose border the code works out from the size."""
    half = x.shape[1] // 2
    return (x[:, half:], x[:, :half]) if swap else (x[:, :half], x[:, half:])


def shift(x: Tensor, by: int) -> Tensor:
    """Roll by writing slices into zeros."""
    out = torch.zeros_like(x)
    out[:, by:], out[:, :by] = x[:, :-by], x[:, -by:]
    return out


def touch(x: Tensor, start: int, stop: int) -> Tensor:
    """Work in place on a view of a copy."""
    out = x.clone()
    out[:, start:stop].mul_(2).add_(out[:, start:stop])
    return out


FUNCTIONS: dict[str, Callable] = {
    "act": lambda x, name: ACTIVATIONS[name](x),
    "add": lambda a, b: a + b,
    "sub": lambda a, b: a - b,
    "mul": lambda a, b: a * b,
    "maximum": torch.maximum,
    "where": lambda a, b: torch.where(a > 0, a, b),
    "gate": lambda x, g: x * g.sigmoid()[:, :, None, None],
    "cat": lambda *args: torch.cat(args[:-1], args[-1]),
    "split": lambda x, dim, sizes, order: tuple(x.split(sizes, dim)[i] for i in order),
    "chunk": lambda x, dim, n, order: tuple(x.chunk(n, dim)[i] for i in order),
    "narrow": lambda x, dim, start, length: x.narrow(dim, start, length),
    "slice": lambda x, start, stop, step: x[:, start:stop:step],
    "index": lambda x, order: x[:, list(order)],
    "flip": lambda x, dim: x.flip(dim),
    "roll": lambda x, shift, dim: x.roll(shift, dim),
    "shuffle": shuffle,
    "refine": refine,
    "fold": lambda x, groups, per_group, dim: grouped(x, groups, per_group).sum(dim),
    "repeat": lambda x, n: x.repeat(1, n, 1, 1),
    "interleave": lambda x, n: x.repeat_interleave(n, 1),
    "expand": lambda x, n: x[:, :, None].expand(-1, -1, n, -1, -1).flatten(1, 2),
    "stack": lambda a, b, reduced: torch.stack([a, b], 1).sum(1) if reduced else torch.stack([a, b], 2).flatten(1, 2),
    "to_nhwc": lambda x: x.permute(0, 2, 3, 1),
    "to_nchw": lambda x: x.permute(0, 3, 1, 2),
    "tokens": lambda x: x.flatten(2).transpose(1, 2),
    "untokens": lambda x, side, channels: x.transpose(1, 2).reshape(x.shape[0], channels, side, side),
    "flatten": lambda x: x.flatten(1),
    "gap": lambda x: x.mean((2, 3)),
    "adaptive": lambda x: F.adaptive_avg_pool2d(x, 1)[:, :, 0, 0],
    "token_mean": lambda x: x.mean(1),
    "channel_mean": lambda x, dim: x.mean(dim, keepdim=True),
    "channel_max": lambda x, dim: x.amax(dim, keepdim=True),
    "channel_sum": lambda x, dim: x.sum(dim, keepdim=True),
    "softmax": lambda x, dim: x.softmax(dim),
    "normalize": lambda x, dim: F.normalize(x, dim=dim),
    "max_pool": lambda x: F.max_pool2d(x, 2),
    "avg_pool": lambda x: F.avg_pool2d(x, 3, 1, 1),
    "upsample": lambda x, mode: F.interpolate(x, scale_factor=2, mode=mode),
    "pad": lambda x, front, back: F.pad(x, (0, 0, 0, 0, front, back)),
    "pixel_shuffle": lambda x: F.pixel_shuffle(x, 2),
    "pixel_unshuffle": lambda x: F.pixel_unshuffle(x, 2),
    "detach": lambda x: x.detach(),
    "halves": halves,
    "shift": shift,
    "touch": touch,
    "bump": lambda x: x.add_(1),
    "scaled": lambda x, dim: x / x.shape[dim] ** 0.5,
    "centre": lambda x: x - x.mean(),
    "zeros": lambda x, n: torch.cat([x, x.new_zeros(x.shape[0], n or x.shape[1], *x.shape[2:])], 1),
    "attend": attend,
}


def conv(channels: int, out: int, kernel: int, stride: int, groups: int, bias: bool) -> nn.Module:
    return nn.Conv2d(channels, out, kernel, stride, kernel // 2, groups=groups, bias=bias)


def transposed(channels: int, out: int, stride: int, groups: int, bias: bool) -> nn.Module:
    kernel, padding = (2, 0) if stride == 2 else (3, 1)
    return nn.ConvTranspose2d(channels, out, kernel, stride, padding, groups=groups, bias=bias)


#: Operations with parameters: (shape of the input, channels of the input, *args) to a module.
LAYERS: dict[str, Callable[..., nn.Module]] = {
    "conv": lambda shape, channels, *args: conv(channels, *args),
    "depthwise": lambda shape, channels, times, kernel, bias: conv(
        channels, channels * times, kernel, 1, channels, bias
    ),
    "transposed": lambda shape, channels, *args: transposed(channels, *args),
    "linear": lambda shape, channels, out, bias: nn.Linear(channels, out, bias=bias),
    "bn": lambda shape, channels, affine: (nn.BatchNorm2d if len(shape) == 4 else nn.BatchNorm1d)(
        channels, affine=affine
    ),
    "gn": lambda shape, channels, groups, affine: nn.GroupNorm(groups, channels, affine=affine),
    "ln": lambda shape, channels, affine: nn.LayerNorm(channels, elementwise_affine=affine),
    "ln_all": lambda shape, channels: nn.LayerNorm(shape[1:]),
    "in": lambda shape, channels, affine: nn.InstanceNorm2d(channels, affine=affine),
    "prelu": lambda shape, channels: nn.PReLU(channels),
    "scale": lambda shape, channels, dim: Scale((shape[dim], *[1] * (len(shape) - 1 - dim))),
}


def operate(steps: Sequence[Step], step: Step, shapes: Sequence[tuple[int, ...]]) -> nn.Module:
    """The module of a step on inputs of these shapes, without data."""
    if step.op in ("again", "tied"):
        step = steps[step.args[0]]
    if step.op not in LAYERS:
        return Function(step)
    last = len(shapes[0]) == 3 or step.op in ("ln", "linear")
    with torch.device("meta"):
        return LAYERS[step.op](shapes[0], shapes[0][-1 if last else 1], *step.args)


def shapes_of(operation: nn.Module, shapes: Sequence[tuple[int, ...]]) -> list[tuple[int, ...]]:
    """The shapes of what an operation returns."""
    with torch.no_grad():
        out = operation.eval()(*(torch.empty(shape, device="meta") for shape in shapes))
    return [tuple(t.shape) for t in (out if isinstance(out, tuple) else (out,))]


class Net(nn.Module):
    """The network of a program."""

    def __init__(self, program: Program):
        super().__init__()
        self.program = program
        shapes = list(program.shapes)
        for index, step in enumerate(program.steps):
            operation = operate(program.steps, step, [shapes[i] for i in step.inputs])
            shapes.extend(shapes_of(operation, [shapes[i] for i in step.inputs]))
            if step.op == "again":  # a module applied a second time
                continue
            if step.op == "tied":  # a second module with the same weight
                operation.weight = self.get_submodule(self.path(*step.args)).weight
            if not (program.inline and isinstance(operation, Function)):
                self.add_module(self.path(index), operation)

    def path(self, index: int) -> str:
        return f"{self.program.steps[index].op}_{index}"

    def forward(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        pool = list(inputs)
        for index, step in enumerate(self.program.steps):
            tensors = [pool[i] for i in step.inputs]
            path = self.path(*step.args) if step.op == "again" else self.path(index)
            layer = self._modules.get(path)
            out = layer(*tensors) if layer else FUNCTIONS[step.op](*tensors, *step.args)
            pool.extend(out if isinstance(out, tuple) else (out,))
        return tuple(pool[i] for i in self.program.outputs)


@torch.no_grad()
def build(program: Program) -> Net:
    """The network of a program in float64 and eval mode, every parameter and statistic random."""
    model = Net(program).to_empty(device="cpu").double().eval()
    for index, step in enumerate(program.steps):  # to_empty unties
        if step.op == "tied":
            model.get_submodule(model.path(index)).weight = model.get_submodule(model.path(*step.args)).weight
    generator = torch.Generator().manual_seed(program.seed)
    for name, tensor in model.state_dict(keep_vars=True).items():
        if name.endswith("num_batches_tracked"):
            tensor.fill_(3)
        elif tensor.dim() > 1 and not name.endswith(("gamma", "beta")):
            tensor.normal_(0.0, (1.5 / tensor[0].numel()) ** 0.5, generator=generator)
        elif name.endswith(("running_var", "weight", "gamma")):
            tensor.uniform_(0.5, 1.5, generator=generator)
        else:
            tensor.normal_(0.0, 0.3, generator=generator)
    for index in program.untrained:
        model.get_submodule(model.path(index)).requires_grad_(False)
    return model


def example(program: Program) -> tuple[Tensor, ...]:
    """Random inputs of a program."""
    generator = torch.Generator().manual_seed(program.seed + 1)
    return tuple(torch.randn(shape, dtype=torch.float64, generator=generator) for shape in program.shapes)


# How programs are drawn --------------------------------------------------------------------------------------


class Value(NamedTuple):
    """A live tensor: nchw, nhwc, nlc (tokens) or nc."""

    index: int
    layout: str
    shape: tuple[int, ...]

    @property
    def dim(self) -> int:
        return 1 if self.layout in ("nchw", "nc") else len(self.shape) - 1

    @property
    def channels(self) -> int:
        return self.shape[self.dim]

    @property
    def rest(self) -> tuple[str, tuple[int, ...]]:
        return self.layout, (*self.shape[: self.dim], *self.shape[self.dim + 1 :])


WIDTHS = (4, 6, 8, 12)
MOST_CHANNELS = 48


class Pool:
    """The live tensors while a program is drawn."""

    def __init__(self, draw: Callable, shapes: Sequence[tuple[int, ...]]):
        self.draw = draw
        self.steps: list[Step] = []
        self.shapes = tuple(shapes)
        self.values = [Value(i, "nchw", tuple(shape)) for i, shape in enumerate(shapes)]
        self.made: dict[Value, Step] = {}  # the step that made each value

    def one(self, of: Sequence) -> object:
        return self.draw(st.sampled_from(list(of)))

    def flag(self) -> bool:
        return self.draw(st.booleans())

    def pick(self, *layouts: str, where: Callable[[Value], bool] = lambda v: True) -> Value | None:
        """A value of these layouts (any, if none are named), the latest as likely as all others together."""
        fitting = [v for v in self.values if (v.layout in layouts or not layouts) and where(v)][::-1]
        if not fitting:
            return None
        return fitting[max(0, self.draw(st.integers(1 - len(fitting), len(fitting) - 1)))]

    def divisor(self, n: int) -> int:
        return self.one([d for d in range(1, n + 1) if n % d == 0])

    def put(self, op: str, inputs: Sequence[Value], args: tuple = (), layout: str | None = None) -> list[Value]:
        """Append a step, and what it returns to the pool."""
        step = Step(op, tuple(v.index for v in inputs), args)
        shapes = [v.shape for v in inputs]
        made = [
            Value(len(self.values) + i, layout or inputs[0].layout, shape)
            for i, shape in enumerate(shapes_of(operate(self.steps, step, shapes), shapes))
        ]
        self.steps.append(step)
        self.values.extend(made)
        self.made.update(dict.fromkeys(made, step))
        return made


def twin(pool: Pool, a: Value) -> Value:
    """Another value of the shape of ``a``; made by a convolution or linear layer if there is none."""
    fitting = [v for v in pool.values if v.shape == a.shape and v.layout == a.layout and v.index != a.index]
    if fitting and (pool.draw(st.integers(0, 3)) or a.layout == "nc"):
        return pool.one(fitting[::-1])
    if a.layout == "nchw":
        source = pool.one([v for v in pool.values if v.layout == "nchw" and v.shape[2:] == a.shape[2:]][::-1])
        return pool.put("conv", [source], (a.channels, pool.one([1, 3]), 1, 1, pool.flag()))[0]
    return pool.put("linear", [a], (a.channels, pool.flag()))[0]


def draw_conv(pool: Pool, _: str) -> None:
    if a := pool.pick("nchw"):
        stride = pool.one([1, 1, 2]) if min(a.shape[2:]) >= 4 else 1
        pool.put("conv", [a], (pool.one(WIDTHS), pool.one([1, 3]), stride, 1, pool.flag()))


def draw_grouped(pool: Pool, _: str) -> None:
    if a := pool.pick("nchw", where=lambda v: v.channels > 1):
        groups = pool.one([d for d in range(2, a.channels + 1) if a.channels % d == 0])
        out = groups * pool.one([n for n in (1, 2, 3, 4) if n == 1 or n * groups <= 16])
        pool.put("conv", [a], (out, pool.one([1, 3]), 1, groups, pool.flag()))


def draw_depthwise(pool: Pool, _: str) -> None:
    if a := pool.pick("nchw", where=lambda v: v.channels <= 16):
        pool.put("depthwise", [a], (pool.one([1, 1, 2, 3]), pool.one([1, 3]), pool.flag()))


def draw_transposed(pool: Pool, _: str) -> None:
    if a := pool.pick("nchw"):
        groups = pool.one([1, pool.divisor(a.channels)])
        out = groups * pool.one([n for n in (1, 2, 3, 4) if n == 1 or n * groups <= 16])
        stride = pool.one([1, 2]) if a.shape[2] <= 4 else 1
        pool.put("transposed", [a], (out, stride, groups, pool.flag()))


def draw_linear(pool: Pool, _: str) -> None:
    if a := pool.pick("nhwc", "nlc", "nc"):
        pool.put("linear", [a], (pool.one(WIDTHS), pool.flag()))


def draw_bn(pool: Pool, _: str) -> None:
    if a := pool.pick("nchw", "nc"):
        pool.put("bn", [a], (pool.flag(),))


def draw_gn(pool: Pool, _: str) -> None:
    if a := pool.pick("nchw", where=lambda v: min(v.shape[2:]) > 1):
        pool.put("gn", [a], (pool.divisor(a.channels), pool.flag()))


def draw_ln(pool: Pool, _: str) -> None:
    if a := pool.pick("nhwc", "nlc", "nc", where=lambda v: v.channels > 1):
        pool.put("ln", [a], (pool.flag(),))


def draw_ln_all(pool: Pool, _: str) -> None:
    if a := pool.pick("nchw", where=lambda v: min(v.shape[2:]) > 1):
        pool.put("ln_all", [a])


def draw_in(pool: Pool, _: str) -> None:
    if a := pool.pick("nchw", where=lambda v: min(v.shape[2:]) > 1):
        pool.put("in", [a], (pool.flag(),))


def draw_prelu(pool: Pool, _: str) -> None:
    if a := pool.pick("nchw", "nc"):
        pool.put("prelu", [a])


def draw_scale(pool: Pool, _: str) -> None:
    if a := pool.pick():
        pool.put("scale", [a], (a.dim,))


def draw_act(pool: Pool, _: str) -> None:
    if a := pool.pick():
        pool.put("act", [a], (pool.one(ACTIVATIONS),))


def draw_pair(pool: Pool, op: str) -> None:
    """Two tensors of one shape, or a tensor and what broadcasts against it."""
    if a := pool.pick():
        thin = [v for v in pool.values if v.rest == a.rest and v.channels == 1 != a.channels]
        b = pool.one(thin) if thin and pool.flag() else twin(pool, a)
        pool.put(op, [a, b])


def draw_stack(pool: Pool, _: str) -> None:
    if a := pool.pick("nchw", where=lambda v: v.channels <= MOST_CHANNELS // 2):
        pool.put("stack", [a, twin(pool, a)], (pool.flag(),))


def draw_gate(pool: Pool, _: str) -> None:
    """Squeeze and excite."""
    if a := pool.pick("nchw"):
        squeezed = pool.put(pool.one(["gap", "adaptive"]), [a], layout="nc")
        hidden = pool.put("linear", squeezed, (pool.one([2, 4]), True))
        gate = pool.put("linear", pool.put("act", hidden, ("relu",)), (a.channels, True))
        pool.put("gate", [a, *gate])


def draw_residual(pool: Pool, _: str) -> None:
    """Two or three residual blocks in a chain."""
    if a := pool.pick("nchw", where=lambda v: v.channels > 1):
        for _ in range(pool.one([2, 3])):
            inner = pool.put("conv", [a], (pool.one(WIDTHS), 1, 1, 1, False))
            inner = pool.put("act", pool.put("bn", inner, (True,)), ("relu",))
            (a,) = pool.put("add", [a, *pool.put("conv", inner, (a.channels, 3, 1, 1, True))])


def draw_cat(pool: Pool, _: str) -> None:
    if a := pool.pick():
        fitting = [v for v in pool.values if v.rest == a.rest]  # the network's input and ``a`` itself among them
        others = [pool.one(fitting) for _ in range(pool.one([1, 1, 2]))]
        chosen = pool.draw(st.permutations([a, *others]))
        if sum(v.channels for v in chosen) <= MOST_CHANNELS:
            pool.put("cat", chosen, (a.dim,))


def draw_split(pool: Pool, _: str) -> None:
    if a := pool.pick(where=lambda v: v.channels > 1):
        first = pool.draw(st.integers(1, a.channels - 1))
        second = pool.draw(st.integers(0, a.channels - first - 1))
        sizes = tuple(n for n in (first, second, a.channels - first - second) if n)
        pool.put("split", [a], (a.dim, sizes, tuple(pool.draw(st.permutations(range(len(sizes)))))))


def draw_chunk(pool: Pool, _: str) -> None:
    if a := pool.pick(where=lambda v: v.channels > 1):
        n = pool.one([2, 2, 3])
        parts = len(torch.empty(a.channels, device="meta").chunk(n))
        pool.put("chunk", [a], (a.dim, n, tuple(pool.draw(st.permutations(range(parts))))))


def draw_shifted(pool: Pool, _: str) -> None:
    """The parts of a tensor, each through its own layer, joined in another order (as in ShuffleNet and CSP nets)."""
    if a := pool.pick("nchw", where=lambda v: v.channels >= 4):
        half = a.channels // 2
        parts = pool.put("split", [a], (1, (half, a.channels - half), pool.one([(0, 1), (1, 0)])))
        parts[0] = pool.put("conv", [parts[0]], (pool.one([4, half]), 1, 1, 1, True))[0]
        pool.put("cat", pool.draw(st.permutations(parts)), (1,))


def draw_slice(pool: Pool, op: str) -> None:
    if a := pool.pick("nchw", where=lambda v: v.channels > 1):
        start = pool.draw(st.integers(0, a.channels - 1))
        stop = pool.draw(st.integers(start + 1, a.channels))
        if op == "narrow":
            pool.put("narrow", [a], (1, start, stop - start))
        else:
            stop = pool.one([stop, None]) if stop == a.channels else pool.one([stop, stop - a.channels])
            pool.put("slice", [a], (start, stop, pool.one([1, 1, 1, 2])))


def draw_index(pool: Pool, _: str) -> None:
    if a := pool.pick("nchw"):
        pool.put("index", [a], (tuple(pool.draw(st.permutations(range(a.channels)))),))


def draw_flip(pool: Pool, _: str) -> None:
    if a := pool.pick():
        pool.put("flip", [a], (pool.one([a.dim, len(a.shape) - 1]),))


def draw_roll(pool: Pool, _: str) -> None:
    if a := pool.pick():
        pool.put("roll", [a], (1, a.dim))


def draw_grouping(pool: Pool, op: str) -> None:
    if a := pool.pick("nchw", where=lambda v: v.channels > 1):
        groups = pool.divisor(a.channels)
        per_group = a.channels // groups if pool.flag() else 0
        what: tuple = ()
        if op == "refine":
            what = (pool.one(["relu", "softmax 1", "softmax 2", "center 1", "center 2", "flip"]),)
        elif op == "fold":
            what = (pool.one([1, 2]),)
        pool.put(op, [a], (groups, per_group, *what))


def draw_repeat(pool: Pool, op: str) -> None:
    if a := pool.pick("nchw", where=lambda v: v.channels <= MOST_CHANNELS // 2):
        pool.put(op, [a], (2,))


def draw_relayout(pool: Pool, _: str) -> None:
    if a := pool.pick("nchw", "nhwc", "nlc"):
        if a.layout == "nchw":
            op = pool.one(["to_nhwc", "tokens"])
            pool.put(op, [a], layout={"to_nhwc": "nhwc", "tokens": "nlc"}[op])
        elif a.layout == "nhwc":
            pool.put("to_nchw", [a], layout="nchw")
        elif isqrt(a.shape[1]) ** 2 == a.shape[1]:
            pool.put("untokens", [a], (isqrt(a.shape[1]), pool.one([-1, a.channels])), layout="nchw")


def draw_pooled(pool: Pool, _: str) -> None:
    if a := pool.pick("nchw", "nlc"):
        pool.put("token_mean" if a.layout == "nlc" else pool.one(["gap", "adaptive"]), [a], layout="nc")


def draw_flatten(pool: Pool, _: str) -> None:
    if a := pool.pick("nchw", "nhwc", "nlc", where=lambda v: v.channels * v.shape[1] * v.shape[2] <= 512):
        flat = pool.put("flatten", [a], layout="nc")
        pool.put("linear", flat, (pool.one(WIDTHS), pool.flag()))


def draw_across(pool: Pool, op: str) -> None:
    if a := pool.pick():
        pool.put(op, [a], (pool.one([a.dim, a.dim, len(a.shape) - 1]),))


def draw_space(pool: Pool, op: str) -> None:
    if a := pool.pick("nchw", where=lambda v: min(v.shape[2:]) >= 4):
        pool.put(op, [a])


def draw_upsample(pool: Pool, _: str) -> None:
    if a := pool.pick("nchw", where=lambda v: v.shape[2] <= 4):
        pool.put("upsample", [a], (pool.one(["nearest", "bilinear"]),))


def draw_pad(pool: Pool, _: str) -> None:
    if a := pool.pick("nchw"):
        pool.put("pad", [a], (pool.one([0, 1, 2]), pool.one([0, 1])))


def draw_pixels(pool: Pool, op: str) -> None:
    def fits(v: Value) -> bool:
        return (
            (v.channels % 4 == 0 and v.shape[2] <= 4)
            if op == "pixel_shuffle"
            else (v.channels <= 12 and min(v.shape[2:]) >= 4)
        )

    if a := pool.pick("nchw", where=fits):
        pool.put(op, [a])


def draw_detach(pool: Pool, _: str) -> None:
    if a := pool.pick():
        pool.put("detach", [a])


def draw_code(pool: Pool, op: str) -> None:
    """What user code does with sizes, slices and memory."""
    if op == "bump":  # in place, on a tensor that others may read, but not on an input or an expanded one
        fresh = [v for v, step in pool.made.items() if step.op in ("conv", "bn", "act", "add", "linear")]
        if fresh:
            pool.put("bump", [pool.one(fresh[::-1])])
    elif op == "scaled":
        if a := pool.pick():
            pool.put("scaled", [a], (pool.one([a.dim, len(a.shape) - 1]),))
    elif a := pool.pick("nchw", where=lambda v: 1 < v.channels <= MOST_CHANNELS // 2):
        cut = pool.draw(st.integers(1, a.channels - 1))
        arguments = {
            "halves": (pool.flag(),),
            "shift": (cut,),
            "touch": (cut - 1, a.channels - 1),
            "centre": (),
            "zeros": (pool.one([0, 3]),),
        }
        pool.put(op, [a], arguments[op])


def draw_attend(pool: Pool, _: str) -> None:
    if a := pool.pick("nlc"):
        q, k, v = (pool.put("linear", [a], (a.channels, pool.flag()))[0] for _ in range(3))
        heads = pool.divisor(a.channels)
        pool.put("attend", [q, k, v], (heads, 0.5, pool.flag()))


def draw_again(pool: Pool, op: str) -> None:
    """A layer met before, as a shared module or through a tied weight, on a tensor that fits it."""
    layers = [i for i, step in enumerate(pool.steps) if step.op in ("conv", "linear", "bn", "ln", "depthwise")]
    if op == "tied":
        layers = [i for i in layers if pool.steps[i].op in ("conv", "linear", "depthwise")]
    if not layers:
        return
    first = pool.one(layers)
    old = pool.values[pool.steps[first].inputs[0]]
    if a := pool.pick(old.layout, where=lambda v: v.channels == old.channels):
        pool.put(op, [a], (first,))


DRAW: dict[str, Callable[[Pool, str], None]] = {
    "conv": draw_conv,
    "grouped": draw_grouped,
    "depthwise": draw_depthwise,
    "transposed": draw_transposed,
    "linear": draw_linear,
    "bn": draw_bn,
    "gn": draw_gn,
    "ln": draw_ln,
    "ln_all": draw_ln_all,
    "in": draw_in,
    "prelu": draw_prelu,
    "scale": draw_scale,
    "act": draw_act,
    **dict.fromkeys(("add", "sub", "mul", "maximum", "where"), draw_pair),
    "stack": draw_stack,
    "gate": draw_gate,
    "residual": draw_residual,
    "cat": draw_cat,
    "split": draw_split,
    "chunk": draw_chunk,
    "shifted": draw_shifted,
    "slice": draw_slice,
    "narrow": draw_slice,
    "index": draw_index,
    "flip": draw_flip,
    "roll": draw_roll,
    **dict.fromkeys(("shuffle", "refine", "fold"), draw_grouping),
    **dict.fromkeys(("repeat", "interleave", "expand"), draw_repeat),
    "relayout": draw_relayout,
    "pooled": draw_pooled,
    "flatten": draw_flatten,
    **dict.fromkeys(("channel_mean", "channel_max", "channel_sum", "softmax", "normalize"), draw_across),
    **dict.fromkeys(("max_pool", "avg_pool"), draw_space),
    "upsample": draw_upsample,
    "pad": draw_pad,
    **dict.fromkeys(("pixel_shuffle", "pixel_unshuffle"), draw_pixels),
    "detach": draw_detach,
    **dict.fromkeys(("halves", "shift", "touch", "bump", "scaled", "centre", "zeros"), draw_code),
    "attend": draw_attend,
    "again": draw_again,
    "tied": draw_again,
}

#: Themes: each draws its steps from some operations only, so that these meet often.
THEMES: dict[str, tuple[str, ...]] = {
    "branches": ("conv", "bn", "act", "add", "mul", "sub", "residual", "gate", "cat", "again", "detach", "depthwise"),
    "joins": (
        "conv",
        "bn",
        "act",
        "cat",
        "split",
        "chunk",
        "shifted",
        "slice",
        "narrow",
        "add",
        "flip",
        "pad",
        "stack",
    ),
    "groups": ("conv", "grouped", "depthwise", "transposed", "gn", "shuffle", "act", "add", "cat", "refine", "fold"),
    "layouts": (
        "conv",
        "relayout",
        "relayout",
        "relayout",
        "linear",
        "linear",
        "ln",
        "flatten",
        "pooled",
        "scale",
        "add",
        "act",
        "attend",
        "mul",
        "cat",
    ),
    "code": (
        "conv",
        "bn",
        "act",
        "halves",
        "shift",
        "touch",
        "bump",
        "centre",
        "zeros",
        "scaled",
        "cat",
        "chunk",
        "add",
    ),
    "everything": tuple(DRAW),
}


def draw_head(pool: Pool, a: Value) -> Value:
    """An output: a tensor as it is, or what a classifier makes of it."""
    head = pool.one(["linear", "conv", "flatten", "none"])
    if head == "none" or (a.layout == "nc" and head != "linear"):
        return a
    if head == "conv" and a.layout == "nchw":
        return pool.put("conv", [a], (2, 1, 1, 1, True))[0]
    if head == "flatten":
        return pool.put("linear", pool.put("flatten", [a], layout="nc"), (2, True))[0]
    if a.layout == "nchw":
        (a,) = pool.put("gap", [a], layout="nc")
    return pool.put("linear", [a], (2, True))[0]


@st.composite
def programs(draw: Callable, theme: str = "everything", most: int = 12) -> Program:
    """Programs of a theme with at most ``most`` draws of an operation (some are several steps)."""
    side = draw(st.sampled_from([4, 8]))
    shapes = [(2, channels, side, side) for channels in draw(st.sampled_from([(3,), (4,), (2, 4)]))]
    pool = Pool(draw, shapes)
    pool.put("conv", pool.values[-1:], (draw(st.sampled_from(WIDTHS)), 3, 1, 1, draw(st.booleans())))
    for _ in range(draw(st.integers(4, most))):
        op = draw(st.sampled_from(THEMES[theme]))
        DRAW[op](pool, op)
    used = {i for step in pool.steps for i in step.inputs}
    loose = [v for v in pool.values[len(shapes) :] if v.index not in used]
    chosen = [loose[-1], *(v for v in loose[:-1] if draw(st.integers(0, 2)))]
    outputs = tuple(draw_head(pool, v).index for v in chosen)
    trained = [i for i, step in enumerate(pool.steps) if step.op in LAYERS]
    untrained = tuple(i for i in trained if draw(st.integers(0, 5)) == 5)
    return Program(tuple(shapes), tuple(pool.steps), outputs, draw(st.booleans()), untrained, draw(st.integers(0, 99)))

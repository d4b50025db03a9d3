"""What the benchmarks run on and how they measure: networks, inputs, both tools' calls, memory, tables."""

import os
import platform
import resource
import sys
from collections.abc import Iterable, Mapping, Sequence
from itertools import chain

import torch
from torch import Tensor, nn

import netsurgery
from netsurgery.passes import MagnitudeScore, PruneChannels

COMPARED = ("resnet50", "densenet121", "efficientnet_b0", "convnext_tiny")
HALF = [MagnitudeScore(), PruneChannels(0.5)]


class DenseStack(nn.Module):
    """x <- cat([x, relu(conv(x))]), again and again: each layer reads what every layer before it made."""

    def __init__(self, layers: int = 64, growth: int = 16, width: int = 16) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, width, 3, padding=1)
        self.convs = nn.ModuleList(nn.Conv2d(width + i * growth, growth, 3, padding=1) for i in range(layers))
        self.head = nn.Linear(width + layers * growth, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for conv in self.convs:
            x = torch.cat([x, torch.relu(conv(x))], 1)
        logits: Tensor = self.head(x.mean((2, 3)))
        return logits


def build(name: str, seed: int = 0) -> nn.Module:
    """A network in eval mode with random weights: `dense_stack_64` and its like, or a torchvision name."""
    torch.manual_seed(seed)
    if name.startswith("dense_stack_"):
        return DenseStack(int(name.rsplit("_", 1)[1])).eval()
    import torchvision

    model: nn.Module = torchvision.models.get_model(name, weights=None)
    return model.eval()


def image(name: str, batch: int = 1) -> Tensor:
    """A batch of images of the size the network is meant for."""
    side = 32 if name.startswith("dense_stack_") else 224
    return torch.randn(batch, 3, side, side, generator=torch.Generator().manual_seed(0))


def prune_ours(model: nn.Module, x: Tensor, *, inplace: bool = True) -> nn.Module:
    """Trace, plan and rewrite at ratio 0.5; in place unless told otherwise, as the peer does."""
    return netsurgery.rewrite(model, netsurgery.plan(model, HALF, (x,)), inplace=inplace)


def prune_peer(model: nn.Module, x: Tensor) -> nn.Module:
    """torch-pruning at ratio 0.5: build the dependency graph, prune in one step, leave the output layer alone."""
    import torch_pruning as tp

    head = [module for module in model.modules() if isinstance(module, nn.Linear)][-1]
    pruner = tp.pruner.MagnitudePruner(
        model,
        x,
        importance=tp.importance.MagnitudeImportance(p=2),
        pruning_ratio=0.5,
        ignored_layers=[head],
        in_channel_groups={},  # its defaults are dictionaries that all pruners of a process share
        out_channel_groups={},
    )
    pruner.step()
    return model


def parameters(model: nn.Module) -> int:
    """Number of parameters, a tied one counted once."""
    return sum(p.numel() for p in model.parameters())


def resident_mb(key: str) -> float:
    """Resident memory of this process in MiB: key `VmRSS` for now, `VmHWM` for the peak since `reset_peak` (Linux)."""
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) / 1024 for line in status if line.startswith(key))


def reset_peak() -> None:
    """Start the peak of the resident memory anew (Linux)."""
    if sys.platform != "linux":
        raise SystemExit("the memory figure is read from /proc and needs Linux")
    with open("/proc/self/clear_refs", "w") as refs:
        refs.write("5")


def print_table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """Print a markdown table, each row as soon as it is there; all columns but the first stand to the right."""
    for row in chain((header, ["---", *["---:"] * (len(header) - 1)]), rows):
        print("| " + " | ".join(row) + " |", flush=True)


def machine() -> str:
    """One line that says what the figures were measured on."""
    with open("/proc/cpuinfo") as cpuinfo:
        cpus = [line.split(":")[1].strip() for line in cpuinfo if line.startswith("model name")]
    cpu = f"{cpus[0] if cpus else platform.processor()}, {os.cpu_count()} cores, {torch.get_num_threads()} thread(s)"
    load = f"load average {os.getloadavg()[0]:.1f} at the start"
    return f"{cpu}, Python {platform.python_version()}, torch {torch.__version__}, {load}"


def cpu_seconds() -> float:
    """CPU seconds of this process so far, user and system time of all threads."""
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


class Known(netsurgery.Pass):
    """Scores that were worked out before, so that several removals share them."""

    gives = frozenset({"scores"})

    def __init__(self, scores: Mapping[str, Tensor], comparable: bool = True, ordinal: bool = False) -> None:
        self.scores, self.comparable, self.ordinal = scores, comparable, ordinal

    def run(self, network: netsurgery.Network) -> netsurgery.Network:
        """Lay the scores on the network."""
        return network.with_scores(self.scores, comparable=self.comparable, ordinal=self.ordinal)

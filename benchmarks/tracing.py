"""How long does it take to see a large network? `python benchmarks/tracing.py [--rounds 5]`

ViT-B/16 with weights, a Llama of 1.2 billion parameters on the meta device, and tiny ones of several depths, in each
layer of which code locks a group: time should grow with the depth, and no faster. Peak memory is that of the process,
before and after: weights that were allocated would show.
"""

import argparse
import resource
import statistics
import time
from functools import partial
from typing import Any

import coverage_hf
import torch
from models import build, image, machine, print_table
from torch import nn

import netsurgery


def vit() -> tuple[nn.Module, Any]:
    """ViT-B/16 and an image."""
    return build("vit_b_16"), (image("vit_b_16"),)


def llama() -> tuple[nn.Module, Any]:
    """A Llama of the size of Llama 3.2 1B, without weights, and 64 tokens."""
    hf = coverage_hf.hf
    config = hf.LlamaConfig(
        hidden_size=2048, num_hidden_layers=16, num_attention_heads=32, num_key_value_heads=8, head_dim=64,
        intermediate_size=8192, vocab_size=128256, tie_word_embeddings=True, use_cache=False,
    )  # fmt: skip
    with torch.device("meta"):
        model: nn.Module = hf.LlamaForCausalLM(config).eval()
    return model, (torch.randint(0, 1000, (1, 64)),)


def tiny_llama(layers: int) -> tuple[nn.Module, Any]:
    """A Llama with two queries for each key, whose code does not follow their number."""
    hf = coverage_hf.hf
    config = hf.LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=layers, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64, use_cache=False,
    )  # fmt: skip
    return hf.LlamaForCausalLM(config).eval(), (torch.arange(8)[None],)


def peak() -> float:
    """Peak memory of this process, MiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def main() -> None:
    """Print one row for each network."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    rounds = parser.parse_args().rounds
    rows = []
    made = {"vit_b_16": vit, "llama, 1.2 billion, on meta": llama}
    made |= {f"tiny llama, {layers} layers": partial(tiny_llama, layers) for layers in (7, 14, 28)}
    for name, make in made.items():
        model, inputs = make()
        before, taken = peak(), []
        for _ in range(rounds):
            start = time.perf_counter()
            network = netsurgery.trace(model, inputs)
            taken.append(time.perf_counter() - start)
        spread = f"{min(taken):.2f} to {max(taken):.2f}"
        share = f"{100 * network.prunable_share:.1f} %"
        rows.append([name, f"{statistics.median(taken):.2f}", spread, f"{peak() - before:.0f}", share])
    print(f"{machine()}\n")
    print_table(("network", "trace, median s", "spread", "peak memory added, MiB", "parameters in open groups"), rows)


if __name__ == "__main__":
    main()

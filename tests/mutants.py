"""Plant one fault at a time in a copy of the package and see the tests turn red: `python tests/mutants.py [WORD ...]`

Each fault is a replacement of text that must be there exactly once: in its file or, where the code has moved since, in
the whole package; line breaks and indentation may be others. With words, only the faults whose name has one of them
are planted. The script fails if any fault survives, or if its text is not found.
"""

import os
import re
import shutil
import subprocess
import sys
import tempfile
import textwrap
import time
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
CODE = ("netsurgery", "passes", "kernels")

#: The quickest first: pytest stops at the first failure.
TESTS = (
    "test_by_hand.py",
    "test_hgsr.py",
    "test_penalty.py",
    "test_scores.py",
    "test_selection.py",
    "test_pipeline.py",
    "test_second_run.py",
    "test_known_values.py",
    "test_custom_rules.py",
    "test_operations.py",
    "test_silent.py",
    "test_random_networks.py",
)

#: Of the files that these alone look at.
TESTS_OF = {
    "kernels/hgsr_flat.py": ("test_hgsr_flat.py",),
    "kernels/hgsr_triton.py": ("test_hgsr_triton.py",),
    "kernels/placed.py": ("test_placed.py",),
    "netsurgery/cli.py": ("test_cli.py",),
    "netsurgery/capture/side_effects.py": ("test_rewritten_forwards.py",),
    "netsurgery/adaptation/gradient_check.py": ("test_rewritten_forwards.py",),
    "netsurgery/capture/reachable.py": ("test_rewritten_forwards.py",),
    "netsurgery/rewriting/optimizers.py": ("test_optimizers.py",),
    "netsurgery/rewriting/dropping.py": ("test_blocks.py",),
    "netsurgery/analysis/blocks.py": ("test_blocks.py",),
    "passes/gradmax.py": ("test_gradmax.py",),
    "netsurgery/rewriting/added.py": ("test_growth.py", "test_gradmax.py"),
    "netsurgery/analysis/inner_products.py": ("test_inner_products.py",),
    "netsurgery/capture/paths.py": ("test_blocks.py",),
    "passes/block_influence.py": ("test_blocks.py",),
    "passes/remove_blocks.py": ("test_blocks.py",),
    "netsurgery/analysis/graph_patterns.py": ("test_graph_patterns.py",),
    "passes/fold_batch_norm.py": ("test_graph_rewrites.py",),
    "passes/insert_layer.py": ("test_graph_rewrites.py",),
    "passes/branch_conv.py": ("test_graph_rewrites.py",),
    "passes/factorise.py": ("test_graph_rewrites.py",),
    "passes/whole_layers.py": ("test_graph_rewrites.py",),
    "netsurgery/module_rewrites.py": ("test_module_rewrites.py",),
    "netsurgery/rewriting/modules.py": ("test_module_rewrites.py",),
    "netsurgery/rewriting/undo.py": ("test_module_rewrites.py",),
    "netsurgery/outputs.py": ("test_cli.py",),
    "netsurgery/search/growing.py": ("test_grow.py",),
    "netsurgery/search/journal.py": ("test_grow.py",),
    "netsurgery/search/rounds.py": ("test_grow.py", "test_width_search.py"),
    "netsurgery/search/split.py": ("test_grow.py",),
    "netsurgery/search/trials.py": ("test_grow.py",),
    "netsurgery/search/widths.py": ("test_width_search.py",),
    "netsurgery/training/data.py": ("test_training_data.py",),
    "netsurgery/training/engine.py": ("test_training.py",),
    "netsurgery/training/schedules.py": ("test_training_recipe.py",),
    "netsurgery/axes.py": ("test_share.py", "test_random_networks.py"),
    "netsurgery/weight_sources.py": ("test_weight_sources.py",),
    "netsurgery/analysis/low_rank.py": ("test_adapters.py", "test_computed_weights.py"),
    "netsurgery/analysis/computed_weights.py": ("test_computed_weights.py",),
    "netsurgery/rewriting/kept_weights.py": ("test_computed_weights.py",),
    "netsurgery/adaptation/repeated_sizes.py": ("test_repeats.py",),
    "netsurgery/analysis/weights.py": ("test_computed_weights.py",),
    "passes/bundles.py": ("test_selection.py", "test_factors.py", "test_targets.py"),
    "passes/compensation.py": ("test_compensation.py",),
    "passes/least_squares.py": ("test_compensation.py",),
    "passes/readers.py": ("test_compensation.py",),
    "netsurgery/analysis/proportional.py": ("test_gradients.py",),
    "passes/entries.py": ("test_unit_scores.py",),
    "passes/distillation.py": ("test_distillation.py",),
    "passes/hints.py": ("test_distillation.py",),
    "passes/taylor_fisher.py": ("test_taylor_fisher.py",),
    "passes/gradients.py": ("test_gradients.py",),
    "passes/score_checkpoint.py": ("test_loss_increase.py",),
    "passes/loss_increase.py": ("test_loss_increase.py",),
    "passes/prefixes.py": ("test_prefixes.py",),
    "passes/forecast.py": ("test_sieve.py",),
    "passes/progress.py": ("test_sieve.py",),
    "passes/racing.py": ("test_loss_increase.py",),
    "passes/readings.py": ("test_readings.py",),
    "passes/portions.py": ("test_reconstruction.py",),
    "passes/reconstruction.py": ("test_reconstruction.py",),
    "passes/reporting.py": ("test_calibration.py",),
    "passes/scope.py": ("test_sieve.py",),
    "passes/sieve.py": ("test_sieve.py",),
    "passes/calibration.py": ("test_calibration.py",),
    "passes/selection.py": ("test_factors.py", "test_targets.py"),
    "passes/partial_replay.py": ("test_loss_increase.py", "test_taylor_fisher.py", "test_prefixes.py"),
    "passes/ablation.py": ("test_prefixes.py",),
    "passes/planting.py": ("test_planting.py",),
    "passes/split_tensors.py": ("test_planting.py",),
    "passes/held_buffers.py": ("test_planting.py",),
    "passes/held_states.py": ("test_planting.py",),
}


@dataclass(frozen=True)
class Mutant:
    """A fault: in ``file``, ``old`` becomes ``new``; ``tests`` where these are others than for the file's faults.

    ``file`` is where the code was when the fault was written. It need not follow the code, unless the tests must.
    """

    name: str
    file: str
    old: str
    new: str
    tests: tuple[str, ...] = ()


MUTANTS = (
    # modules that are rewritten
    Mutant(
        "sizes that are worked out become those of the example",
        "netsurgery/adaptation/forwards.py",
        "if (held if index is None else held[index]) != -1:",
        "if True:",
        ("test_hard_coded.py",),
    ),
    Mutant(
        "branches share their hooks",
        "passes/whole_layers.py",
        "            new.__dict__[key] = copy.copy(value)",
        "            new.__dict__[key] = value",
    ),
    Mutant(
        "branches give fewer filters than there were",
        "passes/branch_conv.py",
        "each + (index < more) for index",
        "each for index",
    ),
    Mutant(
        "products keep the smallest singular values",
        "passes/factorise.py",
        "full_matrices=False)\n        root",
        "full_matrices=False)\n        left, values, right = left.flip(1), values.flip(0), right.flip(0)\n        root",
    ),
    Mutant(
        "products lose the bias",
        "passes/factorise.py",
        "if own.bias is not None:\n            second.bias = nn.Parameter(own",
        "if False:\n            second.bias = nn.Parameter(own",
    ),
    Mutant(
        "an inserted batch norm does not undo itself",
        "passes/insert_layer.py",
        "nn.init.constant_(new.weight, (1 + norm.eps) ** 0.5)",
        "nn.init.constant_(new.weight, 1 + norm.eps)",
    ),
    Mutant(
        "an identity gets an activation though something else reads what it passes on",
        "passes/insert_layer.py",
        "_limits(readers[0]) if len(readers) == 1 else None",
        "next(filter(None, map(_limits, readers)), None)",
    ),
    Mutant(
        "the branch of a new shortcut is not zero",
        "passes/insert_layer.py",
        "_new(like, zero=True)]",
        "_new(like, draw)]",
    ),
    Mutant(
        "new channels stand in front of the old ones",
        "passes/insert_layer.py",
        "torch.cat([y, self.new(y)], self.dim)",
        "torch.cat([self.new(y), y], self.dim)",
    ),
    Mutant(
        "a batch norm folds though something else reads the layer",
        "netsurgery/analysis/graph_patterns.py",
        "if step.alone and len(readers) > 1:",
        "if False:",
    ),
    Mutant(
        "what is computed as a weight counts as read",
        "netsurgery/analysis/graph_patterns.py",
        """_INPUTS.get(_name(user), (0,)) if place""",
        """_INPUTS.get(_name(user), (0, 1)) if place""",
    ),
    Mutant(
        "a folded batch norm forgets the layer's bias",
        "passes/fold_batch_norm.py",
        "if module.bias is None else module.bias.detach() - norm",
        "if True else module.bias.detach() - norm",
    ),
    Mutant(
        "filters of grouped transposed convolutions are scaled as if there were one group",
        "passes/fold_batch_norm.py",
        "parts * scale.reshape(groups, 1, -1, *[1] * (weight.dim() - 2))",
        "parts * scale.reshape(-1, groups, 1, *[1] * (weight.dim() - 2)).transpose(0, 1).transpose(1, 2)",
    ),
    Mutant(
        "a batch norm that another run reads otherwise is folded",
        "passes/fold_batch_norm.py",
        "path not in found or found[path]",
        "path in found and found[path]",
    ),
    Mutant(
        "layers with hooks are replaced",
        "passes/whole_layers.py",
        'which would see something else" if has_hooks(module) else None',
        'which would see something else" if False else None',
    ),
    Mutant(
        "layers whose bias something else reads are replaced",
        "passes/whole_layers.py",
        "_readers(nodes[name]) <= self.ran(path) for name",
        "True for name",
    ),
    Mutant(
        "hooks of replaced modules are forgotten",
        "netsurgery/module_rewrites.py",
        "            _take_hooks(old, new)\n",
        "            pass\n",
    ),
    Mutant(
        "new modules train whatever mode the old one is in",
        "netsurgery/module_rewrites.py",
        "        module.training = old.training\n",
        "",
    ),
    Mutant(
        "rewrites of modules get the weights themselves to try on",
        "netsurgery/module_rewrites.py",
        "like(tensor, tensor.detach().clone()) if any(",
        "tensor if any(",
    ),
    Mutant(
        "an old module that code holds elsewhere is not missed",
        "netsurgery/module_rewrites.py",
        "    _check_calls(network, found, modules)\n",
        "",
    ),
    Mutant(
        "new parameters join any param group",
        "netsurgery/rewriting/modules.py",
        "for alike in ([one for one in old if (one.dim() <= 1) == vector], old):",
        "for alike in (old,):",
    ),
    Mutant(
        "new parameters join behind all others",
        "netsurgery/rewriting/modules.py",
        "    return sum(number < order[id(parameter)] for number in numbers)\n",
        "    return len(params)\n",
    ),
    Mutant(
        "optimizers stay as a failed later stage found them",
        "netsurgery/rewriting/undo.py",
        "        for one in held:\n            one.put_back()\n        raise",
        "        raise",
    ),
    Mutant(
        "models stay as a failed later stage found them",
        "netsurgery/rewriting/undo.py",
        "        for module in modules:\n            module.put_back()\n",
        "",
    ),
    Mutant(
        "rewrites that change outputs are verified by themselves",
        "netsurgery/verification/oracles.py",
        "model if edit.exact else rewrite(model, edit)",
        "rewrite(model, edit)",
        ("test_module_rewrites.py",),
    ),
    # searches that grow a network in rounds
    Mutant(
        "of the candidates of a round the worst stays",
        "netsurgery/search/rounds.py",
        "name = min(found, key=",
        "name = max(found, key=",
    ),
    Mutant(
        "a search that goes on takes what it tried before for what it tries now",
        "netsurgery/search/rounds.py",
        "if trial is None or trial[0] != name:",
        "if trial is None:",
    ),
    Mutant(
        "gain is the loss that is left, not how much lower it is",
        "netsurgery/search/rounds.py",
        "return (loss - last.loss) / max(1,",
        "return loss / max(1,",
    ),
    Mutant(
        "a worker keeps the network of the round before",
        "netsurgery/search/trials.py",
        "if not _opened or _opened[0].keys != keys:",
        "if not _opened:",
    ),
    Mutant(
        "old entries are trained in a search, too",
        "netsurgery/search/trials.py",
        "plant = Planting(model, edit=edit) if setting.only_new else None",
        "plant = None",
    ),
    Mutant(
        "the last network is given back, not the best",
        "netsurgery/search/rounds.py",
        "if not self.history or done.loss < min(one.loss for one in self.history): self.best_weights = weights",
        "self.best_weights = weights",
    ),
    Mutant(
        "seeds of candidates do not differ by round",
        "netsurgery/search/rounds.py",
        "trial_seed(self.search.seed, number, one.name)",
        "trial_seed(self.search.seed, one.name)",
    ),
    Mutant(
        "a line that a kill cut short stays in the log of a search",
        "netsurgery/search/journal.py",
        "self._cut(whole)",
        "self._cut(len(text))",
    ),
    Mutant(
        "samples that are held out are learnt from",
        "netsurgery/search/split.py",
        "return Split(samples.of((~held).nonzero().flatten()), samples.of(held.nonzero().flatten()))",
        "return Split(samples, samples.of(held.nonzero().flatten()))",
    ),
    Mutant(
        "uniform widths take no account of the parameters that were found",
        "netsurgery/search/widths.py",
        "low, high = (middle, high) if priced(middle) <= most else (low, middle)",
        "low, high = (middle, high) if priced(middle) <= 2 * most else (low, middle)",
    ),
    # planting: old entries stay, new ones live
    Mutant(
        "planting leaves parameters without new entries in reach of optimizers that nobody speaks of",
        "passes/split_tensors.py",
        "set_data(one, held[id(one)].new_empty(0) if at is None else",
        "set_data(one, held[id(one)] if at is None else",
    ),
    Mutant(
        "planting takes what reads new units for old",
        "netsurgery/positions.py",
        """        for dim, one in enumerate(found):
            if one is not None:
                entries""",
        """        for dim, one in enumerate(found[:1]):
            if one is not None:
                entries""",
        ("test_planting.py",),
    ),
    Mutant(
        "a recurrent network under planting reads its own list of weights",
        "passes/split_tensors.py",
        "if isinstance(module, nn.RNNBase): properties",
        "if False: properties",
    ),
    Mutant(
        "running statistics of old units follow the batches",
        "passes/held_buffers.py",
        "modules[path].register_forward_hook(owner.put_back, always_call=True)",
        "pass",
    ),
    Mutant(
        "buffers that the model hands to functions are not put back",
        "passes/held_buffers.py",
        "model.register_forward_hook(self.put_back, always_call=True)",
        "pass",
    ),
    Mutant(
        "buffers are put back to what they were before a checkpoint was loaded",
        "passes/held_buffers.py",
        "modules[path].register_load_state_dict_post_hook(owner.take)",
        "pass",
    ),
    Mutant(
        "putting buffers back counts as a change of what autograd has saved",
        "passes/held_buffers.py",
        "buffer.data.copy_(kept)",
        "torch.no_grad()(buffer.copy_)(kept)",
    ),
    Mutant(
        "planted units are normalised by statistics that they do not have yet",
        "passes/held_buffers.py",
        "return held if free is None else",
        "return held if True else",
    ),
    Mutant(
        "norms of old units alone take the statistics of the batch while planting",
        "passes/held_buffers.py",
        "return held if free is None else",
        "return output if free is None else",
    ),
    Mutant(
        "old entries of averages are what the averaging made of them",
        "passes/planting.py",
        "*((one, held) for one in copies), *self._averages]",
        "*((one, held) for one in copies), *((one, held) for one, _ in self._averages)]",
    ),
    Mutant(
        "copies of a planted model go on to put buffers back",
        "passes/planting.py",
        "own.forget(one)",
        "own.forget(self.model)",
    ),
    Mutant(
        "planted units begin with the momentum and the steps of old ones",
        "passes/held_states.py",
        "kept = {one: optimizer.state.pop(one) for one in ours}",
        "kept = {one: optimizer.state[one] for one in ours}",
    ),
    Mutant(
        "what an optimizer has kept of new entries is lost at the end",
        "passes/held_states.py",
        "if one in late:",
        "if not entry and one in late:",
    ),
    # rewritten forwards: gradients and effects
    Mutant(
        "custom autograd functions are not seen",
        "netsurgery/capture/side_effects.py",
        "if not isinstance(context, torch._C._FunctionBase) or isinstance(context, type):",
        "if True:",
    ),
    Mutant(
        "what helpers write is not compared",
        "netsurgery/capture/side_effects.py",
        "self.missed = not self.ran <= self.known",
        "self.missed = False",
    ),
    Mutant(
        "gradients of a rewritten forward are not compared",
        "netsurgery/adaptation/gradient_check.py",
        "if twins.setdefault(one, other) is not other or _kind(one) != _kind(other):",
        "if False:",
    ),
    Mutant(
        "closures are not looked into",
        "netsurgery/capture/reachable.py",
        "found += zip(value.__code__.co_freevars, value.__closure__ or (), strict=True)",
        "pass",
    ),
    # residual blocks
    Mutant(
        "a block runs several times",
        "netsurgery/analysis/blocks.py",
        "if len(calls) != 1 or calls[0].end <= calls[0].begin:",
        "if not calls or calls[0].end <= calls[0].begin:",
    ),
    Mutant(
        "a block's intermediate results are read elsewhere",
        "netsurgery/analysis/blocks.py",
        "if node is not result and outside and not (node in kept",
        "if False and not (node in kept",
    ),
    Mutant(
        "a block writes where others read",
        "netsurgery/analysis/blocks.py",
        "if any(self._read_later(root, call, inside) for root in _written(node) if root not in inside):",
        "if False:",
    ),
    Mutant(
        "a block's input and output are written to",
        "netsurgery/analysis/blocks.py",
        "return all(users) and any(written for some in users for _, written in some)",
        "return False",
    ),
    Mutant(
        "any sum is a stream",
        "netsurgery/analysis/blocks.py",
        "if other in self.computed and (count := self._count(one)) >= 0:",
        "if (count := self._count(one)) >= 0:",
    ),
    Mutant(
        "shared parameters belong to one block",
        "netsurgery/analysis/blocks.py",
        "shared = [own for own in places.values() if len(own) > 1]",
        "shared: list[list[str]] = []",
    ),
    Mutant(
        "a series of blocks is a block",
        "netsurgery/analysis/blocks.py",
        "if path in self.repeated and not self._is_series(path):",
        "if path in self.repeated:",
    ),
    Mutant(
        "an odd layer is taken apart",
        "netsurgery/analysis/blocks.py",
        "if self._is_part(path):",
        "if False:",
    ),
    Mutant(
        "what stays keeps its number",
        "netsurgery/capture/paths.py",
        "found[place] = str(int(parts[place]) - len(before))",
        "found[place] = parts[place]",
    ),
    Mutant(
        "lists close the gap without a trial",
        "netsurgery/rewriting/dropping.py",
        "if lists and trial.fails(found := Dropping(blocks, lists)) is None:",
        "if lists and (found := Dropping(blocks, lists)):",
    ),
    Mutant(
        "a trial compares no numbers",
        "netsurgery/rewriting/dropping.py",
        "if given != asked or node.meta",
        "if node.meta",
    ),
    Mutant(
        "layers keep the place that they know",
        "netsurgery/rewriting/dropping.py",
        "part.__dict__[key] = new",
        "pass",
    ),
    Mutant(
        "the configuration of other models changes",
        "netsurgery/rewriting/dropping.py",
        "new = copy.copy(config)\n    for key",
        "new = config\n    for key",
    ),
    Mutant(
        "a decoder's depth is the encoder's",
        "netsurgery/rewriting/dropping.py",
        "return [] if not configs or _other_lists(modules, path, length, configs[-1]) else configs",
        "return configs",
    ),
    Mutant(
        "a skipped block returns its first input for every tensor",
        "netsurgery/rewriting/dropping.py",
        "found.get(block.source if value is block.result else value)",
        "found.get(block.source)",
    ),
    Mutant(
        "the optimizer keeps what is gone",
        "netsurgery/rewriting/optimizers.py",
        "return name is None or self.renamed(name) is not None",
        "return True",
        ("test_blocks.py",),
    ),
    Mutant(
        "blocks cost what they did",
        "netsurgery/edit.py",
        "return self.network.cost(self.counts, self.dropped)",
        "return self.network.cost(self.counts)",
        ("test_blocks.py",),
    ),
    Mutant(
        "verify forgets that blocks go",
        "netsurgery/verification/oracles.py",
        "program = shortened(whole, edit.dropped) if edit.dropped else whole",
        "program = whole",
        ("test_blocks.py",),
    ),
    Mutant(
        "a later edit finds the blocks under their new numbers",
        "netsurgery/edit.py",
        "return [names[path] for path in later.dropped]",
        "return [*later.dropped]",
        ("test_blocks.py",),
    ),
    Mutant(
        "the input of a block is compared after the block wrote to it",
        "passes/block_influence.py",
        "at(self.block.given, (args, kwargs)).detach().clone()",
        "at(self.block.given, (args, kwargs)).detach()",
    ),
    Mutant(
        "pixels are features",
        "passes/block_influence.py",
        "return [i for i, axis in enumerate(dims) if any(map(inner, leaves(axis)))] or [len(dims) - 1]",
        "return [len(dims) - 1]",
    ),
    Mutant(
        "the most influential blocks go",
        "passes/remove_blocks.py",
        "sorted(paths, key=network.block_scores.__getitem__)[:count]",
        "sorted(paths, key=network.block_scores.__getitem__)[::-1][:count]",
    ),
    # distillation
    Mutant(
        "gradients shrink with the temperature",
        "passes/distillation.py",
        "self.alpha * self.temperature**2 * found",
        "self.alpha * found",
    ),
    Mutant(
        "the teacher learns, too",
        "passes/distillation.py",
        '_logits_of("teacher", teacher).detach()',
        '_logits_of("teacher", teacher)',
    ),
    Mutant(
        "the teacher's term counts positions without a label",
        "passes/distillation.py",
        "return _mean(terms.sum(1), counted)",
        "return _mean(terms.sum(1), None)",
    ),
    Mutant(
        "masked classes make the divergence NaN",
        "passes/distillation.py",
        "torch.where(share > 0, share * (known - found), 0.0)",
        "share * (known - found)",
    ),
    Mutant(
        "the divergence is computed in low precision",
        "passes/distillation.py",
        "return own.movedim(dim, 1).to(dtype), wanted.movedim(dim, 1).to(dtype)",
        "return own.movedim(dim, 1), wanted.movedim(dim, 1)",
    ),
    Mutant(
        "the teacher's features are moved towards the student's",
        "passes/hints.py",
        "teacher.detach().to(dtype)",
        "teacher.to(dtype)",
    ),
    Mutant(
        "features of an earlier run are kept",
        "passes/hints.py",
        "seen.clear()\n\n    return hook",
        "pass\n\n    return hook",
    ),
    Mutant(
        "a copy of a network is looked at, too",
        "passes/hints.py",
        "if module is place:",
        "if True:",
    ),
    Mutant(
        "features are those that later layers wrote into",
        "passes/hints.py",
        "first.clone() if isinstance(first, Tensor) else first",
        "first",
    ),
    Mutant(
        "hooks stay where the first run fails",
        "passes/hints.py",
        "except BaseException:\n                self.close()",
        "except BaseException:",
    ),
    # rewriting: which positions stay
    Mutant(
        "the last n inputs instead of the chosen ones",
        "netsurgery/positions.py",
        "new = new.index_select(dim, positions.to(tensor.device))",
        "new = new.index_select(dim, positions if dim != 1 else torch.arange(axis.size)[-len(positions) :])",
    ),
    Mutant(
        "the first n units in norms and biases",
        "netsurgery/positions.py",
        "new = new.index_select(dim, positions.to(tensor.device))",
        "new = new.index_select(dim, positions if tensor.dim() > 1 else torch.arange(len(positions)))",
    ),
    Mutant(
        "a bias one unit off",
        "netsurgery/positions.py",
        "new = new.index_select(dim, positions.to(tensor.device))",
        "new = new.index_select(dim, positions if tensor.dim() > 1 else (positions + 1) % axis.size)",
    ),
    Mutant(
        "the wrong depthwise filters",
        "netsurgery/positions.py",
        "new = new.index_select(dim, positions.to(tensor.device))",
        "new = new.index_select(dim, positions.flip(0) if dim == 0 and new.dim() == 4 == 3 + new.shape[1] else positions)",
    ),
    Mutant(
        "running_var cut out of running_mean",
        "netsurgery/rewriting/surgery.py",
        "_copy(t, values.get(name, t), name, edit)",
        "_copy(t, tensors[name.replace('running_var', 'running_mean')], name, edit)",
    ),
    Mutant(
        "concatenations one position off",
        "netsurgery/positions.py",
        "torch.cat([start + part for start, part in zip(_starts(axis), parts, strict=True)])",
        "torch.cat([start + part - int(start > 0) for start, part in zip(_starts(axis), parts, strict=True)])",
    ),
    Mutant(
        "the stride of a flattened map",
        "netsurgery/positions.py",
        "found = (found[:, None] * find(term).size + part).flatten()",
        "found = (found[:, None] * len(part) + part).flatten()",
    ),
    Mutant(
        "products in the wrong order",
        "netsurgery/positions.py",
        "found = (found[:, None] * find(term).size + part).flatten()",
        "found = (found[:, None] * find(term).size + part).T.flatten()",
    ),
    Mutant(
        "gradients left uncut",
        "netsurgery/rewriting/surgery.py",
        "new.grad = gradient(tensor.grad, name, edit)",
        "new.grad = tensor.grad[: len(new)]",
    ),
    Mutant(
        "an edit made by hand goes unchecked",
        "netsurgery/rewriting/surgery.py",
        "    if refused:\n",
        "    if False:\n",
    ),
    # optimizers
    Mutant(
        "momentum left at the first units",
        "netsurgery/rewriting/optimizers.py",
        "cut[what] = self.positions.cut(value, axes)",
        "cut[what] = value[tuple(slice(len(self.positions.cut(value.movedim(d, 0), (a,)))) for d, a in enumerate(axes))]",
    ),
    Mutant(
        "states stay with the old parameters",
        "netsurgery/rewriting/optimizers.py",
        "state.update((new.get(id(key), key), entry) for key, entry in items if self._stays(key))",
        "state.update(items)",
    ),
    Mutant(
        "a state of one dimension is taken for the first that fits",
        "netsurgery/rewriting/optimizers.py",
        "return choices[0] if choices and alike else None",
        "return choices[0] if choices else None",
    ),
    # compensation
    Mutant(
        "the running mean moves the wrong way",
        "passes/readers.py",
        "return (name, -1) if alone else None",
        "return (name, 1) if alone else None",
    ),
    Mutant(
        "layers are listed from the last to the first",
        "passes/readers.py",
        "key=lambda reader: order.get(reader.path, -1))",
        "key=lambda reader: -order.get(reader.path, -1))",
    ),
    Mutant(
        "a layer is changed whatever samples say that were held back",
        "passes/fits.py",
        "return min(allowed, key=lambda level: self.errors[level])",
        "return allowed[-1]",
        ("test_compensation.py",),
    ),
    Mutant(
        "layers are fitted one after the other whatever comes of it",
        "passes/compensation.py",
        "if gap < after:",
        "if True:",
        ("test_compensation.py",),
    ),
    Mutant(
        "the ridge pulls the constant too",
        "passes/least_squares.py",
        "diagonal = gram.diagonal(dim1=1, dim2=2)[:, :width]",
        "diagonal = gram.diagonal(dim1=1, dim2=2)",
    ),
    Mutant(
        "dilation forgotten in the refit",
        "passes/least_squares.py",
        "x.unfold(dim, apart * (size - 1) + 1, step)[..., ::apart]",
        "x.unfold(dim, apart * (size - 1) + 1, step)[..., :size]",
    ),
    Mutant(
        "new values lost where the model itself is changed",
        "netsurgery/rewriting/surgery.py",
        "cuts.append(_cut_all(tensors, edit, positions, _valued(tensors, edit, edit.values)))",
        "cuts.append(_cut_all(tensors, edit, positions, {}))",
        ("test_compensation.py",),
    ),
    # copying: what the model keeps
    Mutant(
        "requires_grad lost",
        "netsurgery/capture/copies.py",
        "nn.Parameter(new, requires_grad=old.requires_grad)",
        "nn.Parameter(new)",
    ),
    Mutant(
        "tied weights untied",
        "netsurgery/rewriting/surgery.py",
        "        follow(one, network, network.sizes(edit.counts))\n",
        "        follow(one, network, network.sizes(edit.counts))\n"
        "        for module in () if inplace else result.modules():\n"
        "            module._parameters = {k: p if p is None else like(p, p.data.clone()) for k, p in module._parameters.items()}\n",
    ),
    Mutant(
        "train mode lost",
        "netsurgery/rewriting/surgery.py",
        "        follow(one, network, network.sizes(edit.counts))\n",
        "        follow(one, network, network.sizes(edit.counts))\n        one.eval()\n",
    ),
    Mutant(
        "hooks lost",
        "netsurgery/capture/copies.py",
        "if kind is OrderedDict and not value:",
        "if kind is OrderedDict:",
    ),
    # attributes
    Mutant(
        "the groups of a convolution not updated",
        "netsurgery/adaptation/attributes.py",
        '_OF_OPERATION = {"groups": "g", "num_groups": "g", ',
        '_OF_OPERATION = {"num_groups": "g", ',
    ),
    Mutant(
        "channels of grouped convolutions not updated",
        "netsurgery/adaptation/attributes.py",
        "                if len(within) > 1:  # channels within a group\n",
        "                if False:\n",
        ("test_repeats.py",),
    ),
    # the algebra
    Mutant(
        "a cut one position off",
        "netsurgery/axes.py",
        "left, right = channel(at), channel(axis.size - at)",
        "left, right = channel(max(1, at - 1)), channel(axis.size - max(1, at - 1))",
    ),
    Mutant(
        "locked units forgotten when channels meet",
        "netsurgery/axes.py",
        "    if leaf.locked is not None:\n        lock(axis, leaf.locked)\n    leaf.bound = axis",
        "    leaf.bound = axis",
    ),
    Mutant(
        "factors taken from the wrong end",
        "netsurgery/axes.py",
        "_bind(axis, product([outer, last]))",
        "_bind(axis, product([last, outer]))",
    ),
    # rules
    Mutant(
        "add unifies nothing",
        "netsurgery/analysis/rules.py",
        "            else:\n                op.unify(known, axis)\n",
        "",
    ),
    Mutant(
        "split parts swapped",
        "netsurgery/analysis/rules.py",
        "        parts.append(part)\n        out.append((*dims[:at], part, *dims[at + 1 :]))\n",
        "        parts.append(part)\n        out.insert(0, (*dims[:at], part, *dims[at + 1 :]))\n",
    ),
    Mutant(
        "parts of a chunk not kept equal",
        "netsurgery/analysis/rules.py",
        'op.findings.equate(parts, op.reason("parts of equal size are built differently"))',
        "pass",
    ),
    Mutant(
        "cat in reverse order",
        "netsurgery/analysis/rules.py",
        "concat(dims[at] for dims in tensors)",
        "concat(dims[at] for dims in tensors[::-1])",
    ),
    Mutant(
        "permute as its inverse",
        "netsurgery/analysis/rules.py",
        'return [tuple(dims[d] for d in op["dims"])]',
        'return [tuple(dims[list(op["dims"]).index(d)] for d in range(len(dims)))]',
    ),
    Mutant(
        "the axes of a transposed convolution swapped",
        "netsurgery/analysis/rules.py",
        '("(g i) o *k", "*s") if op["transposed"]',
        '("(g o) i *k", "*s") if op["transposed"]',
    ),
    Mutant(
        "channel shuffle passes through",
        "netsurgery/analysis/rules.py",
        '"b (g c) *s -> b (c g) *s"',
        '"b (g c) *s -> b (g c) *s"',
    ),
    Mutant(
        "flip, sort and select pass through",
        "netsurgery/analysis/rules.py",
        'op.lock(op.dims(op["self"])[at], BY_POSITION)',
        "pass",
    ),
    Mutant(
        "unknown operations pass through",
        "netsurgery/analysis/rules.py",
        'return locked(op, "the operation has no rule (add one with netsurgery.rule)")',
        "return filled(op)",
    ),
    Mutant(
        "the positions of a block may go",
        "netsurgery/analysis/rules.py",
        "op.lock(within, BY_POSITION)",
        "pass",
    ),
    Mutant(
        "brackets lock nothing",
        "netsurgery/notation.py",
        "                    self.op.lock(axis, BY_POSITION)",
        "                    pass",
    ),
    Mutant(
        "indices lock nothing",
        "netsurgery/analysis/rules.py",
        "            op.lock(axis, BY_POSITION)\n        starts.add",
        "            pass\n        starts.add",
    ),
    Mutant(
        "indices that stand apart stay where they are",
        "netsurgery/analysis/rules.py",
        "start = starts.pop() if len(starts) == 1 else 0",
        "start = min(starts)",
    ),
    Mutant(
        "gathering passes through",
        "netsurgery/analysis/rules.py",
        "        op.lock(dims[i], BY_POSITION)\n        op.lock(index[i], BY_POSITION)\n",
        "        pass\n",
    ),
    Mutant(
        "the place of a maximum is not looked at",
        "netsurgery/analysis/rules.py",
        "return along(op) if indexed else reduction(op)",
        "return reduction(op)",
    ),
    Mutant(
        "inputs that share an offset are not blocks",
        "netsurgery/analysis/rules.py",
        "op.unify(product([channel(blocks, op.reason(BY_POSITION)), channel(given.size // blocks)]), given)",
        "pass",
    ),
    Mutant(
        "what is added to a product is not aligned",
        "netsurgery/analysis/rules.py",
        "out[0] = aligned(op, [out[0] or (), op.dims(op[plus])], op.shapes()[0] or ())",
        "pass",
    ),
    Mutant(
        "windows in the wrong order",
        "netsurgery/analysis/rules.py",
        '"*b c h w -> *b (c p q) l"',
        '"*b c h w -> *b (p q c) l"',
    ),
    Mutant(
        "tensors that a custom rule does not name pass through",
        "netsurgery/analysis/custom_rules.py",
        'op.lock(axis, "the rule does not name this tensor")',
        "pass",
    ),
    Mutant(
        "custom rules are never taken away",
        "netsurgery/analysis/custom_rules.py",
        "            book.pop(self.key, None)\n",
        "",
    ),
    Mutant(
        "the network's output is not locked",
        "netsurgery/analysis/network.py",
        'lock(axis, Edge("the network output has this dimension"))',
        "pass",
    ),
    Mutant(
        "a matrix counts whole where one of its axes is free",
        "netsurgery/analysis/network.py",
        "* sum(share_with(axis, channels) for axis in dims)",
        "* max(share_with(axis, channels) for axis in dims)",
    ),
    Mutant(
        "a product counts once for each of its factors",
        "netsurgery/axes.py",
        "return 1 - prod(1 - part for part in parts)",
        "return sum(parts)",
    ),
    Mutant(
        "ties not kept by edits",
        "netsurgery/edit.py",
        "if len(set(counts.values())) > 1:",
        "if False:",
    ),
    # does the code follow?
    Mutant(
        "the start of a slice goes unchecked",
        "netsurgery/adaptation/size_checker.py",
        "if isinstance(now, int) and now != self.sizes(expected[name]):",
        "if False:",
    ),
    Mutant(
        "a number computed from a size goes unchecked",
        "netsurgery/adaptation/size_checker.py",
        "elif name not in sized and now != then and _is_number(now):",
        "elif False:",
    ),
    Mutant(
        "hard-coded sizes go unchecked",
        "netsurgery/adaptation/size_checker.py",
        "if wrong := self.wrong(pairs):",
        "if (wrong := self.wrong(pairs)) and False:",
    ),
    Mutant(
        "a constant made from a size goes unchecked",
        "netsurgery/adaptation/size_checker.py",
        "differs = real.shape != constant.shape or not torch.equal(real, constant)",
        "differs = False",
    ),
    Mutant(
        "operations that read other tensors go unchecked",
        "netsurgery/adaptation/size_checker.py",
        "if self.sources.get(id(now)) != source:",
        "if False:",
    ),
    Mutant(
        "other results at other sizes go unchecked",
        "netsurgery/adaptation/size_checker.py",
        "if not self.failures and results != [*map(self.origin, output.args[0])]:",
        "if False:",
    ),
    # scores and selection
    Mutant(
        "the sign of a score",
        "passes/bundles.py",
        "found = [_checked(self.network, group).sort(stable=True) for group in groups]",
        "found = [_checked(self.network, group).sort(stable=True, descending=True) for group in groups]",
    ),
    Mutant(
        "budgets one removal short",
        "netsurgery/passes/removal.py",
        "_first(ranked, lambda n: price(n) <= limit)",
        "max(0, _first(ranked, lambda n: price(n) <= limit) - 1)",
    ),
    Mutant(
        "units of all layers by their score alone, whatever they cost",
        "passes/removal.py",
        "(float(bundle.scores[k - 1]) / price if price else inf, index, k)",
        "(float(bundle.scores[k - 1]), index, k)",
        ("test_cost_aware.py",),
    ),
    Mutant(
        "a tied pair costs twice what it scores",
        "passes/removal.py",
        ") / len(counts) for counts in fewer]",
        ") for counts in fewer]",
        ("test_cost_aware.py",),
    ),
    Mutant(
        "groups that are nearly emptied are not named",
        "passes/bundles.py",
        "10 * stay <= bundle.whole or",
        "stay < 0 or",
        ("test_cost_aware.py",),
    ),
    Mutant(
        "a model is measured beside itself",
        "passes/agreement.py",
        "small = rewrite(model, edit)",
        "small = model",
        ("test_measured.py",),
    ),
    Mutant(
        "positions without a label count",
        "passes/agreement.py",
        "logits, others = logits[said], others[said]",
        "pass",
        ("test_measured.py",),
    ),
    Mutant(
        "a unit more than the ratio says",
        "passes/bundles.py",
        "int(self.whole * ratio + _EPSILON)",
        "int(self.whole * ratio + 1)",
    ),
    Mutant(
        "multiples of units, not of channels",
        "passes/bundles.py",
        "settings.multiple_of // gcd(settings.multiple_of, channels)",
        "settings.multiple_of",
    ),
    Mutant(
        "the fewest units, not channels",
        "passes/bundles.py",
        "max(ceil(settings.min_channels / channels),",
        "max(settings.min_channels,",
    ),
    Mutant(
        "a share of what is left, not of the original",
        "passes/bundles.py",
        "- (self.whole - self.size))",
        "- 0)",
    ),
    Mutant(
        "layers may be emptied",
        "passes/bundles.py",
        "_MOST = 0.9",
        "_MOST = 1.0",
    ),
    Mutant(
        "what falls short of all together is not said",
        "passes/bundles.py",
        "due = bundle.size if self.missing else 0",
        "due = 0",
    ),
    Mutant(
        "a width that is no multiple",
        "passes/bundles.py",
        "while removed > 0 and (self.size - removed) % self.step:",
        "while removed > 0 and removed % self.step:",
    ),
    Mutant(
        "both factors of a product",
        "passes/selection.py",
        "if not any(other.channel in beside for other in taken.values() if other not in together):",
        "if True:",
    ),
    Mutant(
        "a stream goes with any module that writes to it",
        "passes/selection.py",
        "alone = all(held) if any(held)",
        "alone = any(held) if any(held)",
    ),
    Mutant(
        "only what parameters consume is protected",
        "passes/selection.py",
        "        found.update(group.name for group in network.groups if group.channel in channels)\n",
        "",
    ),
    # growth
    Mutant(
        "copies without shares",
        "netsurgery/rewriting/added.py",
        "new.mul_(_along(shares.to(new), dim, new.dim()))",
        "new.mul_(_along(shares.to(new).ceil(), dim, new.dim()))",
        ("test_growth.py",),
    ),
    Mutant(
        "new units read as the first",
        "netsurgery/positions.py",
        "new.index_fill_(dim, planted.nonzero().flatten().to(tensor.device), 0)",
        "planted.nonzero().flatten().to(tensor.device)",
        ("test_growth.py",),
    ),
    Mutant(
        "statistics over unequal copies",
        "netsurgery/analysis/growth.py",
        "return len({*counts}) <= 1 and at.new(axis) is None",
        "return at.new(axis) is None",
        ("test_growth.py",),
    ),
    Mutant(
        "tied tensors grow",
        "netsurgery/analysis/growth.py",
        '(name, "consumes")]) != 1:',
        '(name, "consumes")]) > 1:',
        ("test_growth.py",),
    ),
    Mutant(
        "shares of a tensor that is used otherwise, too",
        "netsurgery/analysis/growth.py",
        "if packet_of(user) not in _FACTORS or leaf not in worked_across(user):",
        "if False:",
        ("test_growth.py",),
    ),
    Mutant(
        "logarithms of new units",
        "netsurgery/analysis/growth.py",
        "for leaf in at.planted.keys() & undefined(node, network.tensors):",
        "for leaf in at.planted.keys() & set():",
        ("test_growth.py",),
    ),
    Mutant(
        "state of new units at zero",
        "netsurgery/rewriting/optimizers.py",
        "start = group.get(_STARTS[what], 0.0)",
        "start = 0.0",
        ("test_growth.py",),
    ),
    Mutant(
        "shares of an earlier edit forgotten",
        "netsurgery/units.py",
        "found.append(Copy(unit, before * share))",
        "found.append(Copy(unit, share))",
        ("test_growth.py",),
    ),
    Mutant(
        "norms of new units at zero",
        "netsurgery/analysis/growth.py",
        'return 1.0 if scales or given == "running_var" else None',
        "return 0.0",
        ("test_growth.py",),
    ),
    Mutant(
        "scores of the first units, where others stay",
        "netsurgery/pipeline.py",
        "new: before.scores[old][units[new]]",
        "new: before.scores[old][: last.counts.get(old, before[old].size)]",
        ("test_targets.py",),
    ),
    Mutant(
        "locks are forgotten after a removal",
        "netsurgery/pipeline.py",
        "network.with_locked(locked).with_scores(",
        "network.with_scores(",
        ("test_targets.py",),
    ),
    Mutant(
        "scores that depend on locks are kept",
        "netsurgery/pipeline.py",
        "            if one.groupwise:\n",
        "            if True:\n",
        ("test_groupwise.py",),
    ),
    Mutant(
        "a trial takes statistics over everything",
        "netsurgery/analysis/replay_without.py",
        "if not fixed and at.changes(op.dims(source)):",
        "if False:",
        ("test_partial_replay.py",),
    ),
    Mutant(
        "a code's traces are written onto the network",
        "netsurgery/adaptation/remedies.py",
        "        found = self.model_code.traces[key]\n",
        "        found = program.traces = self.model_code.traces[key]\n",
        ("test_unchanged.py",),
    ),
    # prices, and what is no channel
    Mutant(
        "output positions of transposed convolutions",
        "netsurgery/analysis/rules.py",
        '("(g i) o *k", "*s") if op["transposed"]',
        '("(g i) o *k", "*t") if op["transposed"]',
        ("test_prices.py",),
    ),
    Mutant(
        "the columns of a table may go",
        "netsurgery/analysis/network.py",
        "if leaf not in made and leaf.size > 1:",
        "if False:",
        ("test_factors.py",),
    ),
    Mutant(
        "groups of a norm are channels",
        "netsurgery/analysis/units.py",
        'yield names["g"], "group"',
        'yield names["g"], "channel"',
        ("test_factors.py",),
    ),
    Mutant(
        "any bottleneck beside a layer is a rank",
        "netsurgery/analysis/units.py",
        "if beside and rank.size < min(given.size * _window(down), out.size):",
        "if beside:",
        ("test_factors.py",),
    ),
    Mutant(
        "branches of the outermost code are rewritten",
        "netsurgery/adaptation/remedies.py",
        "if not path and path in self.branching:",
        "if False:",
        ("test_second_run.py",),
    ),
    Mutant(
        "scores of a product summed along the wrong factor",
        "netsurgery/positions.py",
        "for place, term in enumerate(axis.terms):",
        "for place, term in enumerate(reversed(axis.terms)):",
    ),
    # code that looks at values
    Mutant(
        "decisions are taken anew in each run",
        "netsurgery/capture/known_values.py",
        "    if all(part is None for part in found):\n",
        "    if True:\n",
    ),
    Mutant(
        "decisions about units keep the units that are gone",
        "netsurgery/capture/known_values.py",
        "tensor = tensor.index_select(dim, positions(axis, units).to(tensor.device))",
        "tensor = tensor.index_select(dim, torch.arange(len(positions(axis, units))).to(tensor.device))",
    ),
    Mutant(
        "numbers that were chosen are not chosen anew",
        "netsurgery/capture/known_values.py",
        'if [result.name for result in schema.returns] == ["values", "indices"]:',
        "if False:",
    ),
    Mutant(
        "the user's tensors are written to",
        "netsurgery/capture/known_values.py",
        "if storage.data_ptr() not in self.shared:",
        "if True:",
    ),
    Mutant(
        "what a run has decided is known at any size",
        "netsurgery/capture/known_values.py",
        "        if self.knows(call):\n"
        "            return self.keep(call, self.run(call))\n"
        "        if self.knows_lengths(call)",
        "        if self.knows_lengths(call)",
    ),
    Mutant(
        "values stay known when something unknown is written to them",
        "netsurgery/capture/known_values.py",
        "                del self.of.items[key]\n",
        "                pass\n",
    ),
    Mutant(
        "numbers that decisions are taken from go unchecked",
        "netsurgery/verification/oracles.py",
        "worst = max(worst, _difference(read, _chosen(numbers, units)))",
        "pass",
    ),
    Mutant(
        "activations are kept to the end",
        "netsurgery/capture/known_values.py",
        "        self.items[ref.key] = ref, value\n",
        "        self.items[ref.key] = ref, value\n        self.all = [*getattr(self, 'all', []), tensor]\n",
    ),
    # the oracles themselves
    Mutant(
        "statistics of silenced norms taken over everything",
        "netsurgery/verification/silencing.py",
        "    full = stays.expand_as(x)\n",
        "    full = torch.ones_like(stays).expand_as(x)\n",
    ),
    Mutant(
        "reductions taken over everything",
        "netsurgery/verification/silencing.py",
        '"self": a["self"].masked_select(stays).reshape(sizes)',
        '"self": a["self"]',
    ),
    Mutant(
        "nothing is silenced",
        "netsurgery/verification/silencing.py",
        "            stays[units_in({} if axis in whole else keep)(axis)] = True\n",
        "            stays[:] = True\n",
    ),
    # the penalty: which kernels, which groups, which factors
    Mutant(
        "a layer's blocks share outer groups",
        "kernels/criteria.py",
        "    return WeightView(groups, (int(",
        "    return WeightView(1, (int(",
    ),
    Mutant(
        "transposed weights read as others",
        "kernels/criteria.py",
        '(int((grouping == "feature") != transposed),)',
        '(int(grouping == "feature"),)',
    ),
    Mutant(
        "kernels cut into pieces",
        "kernels/hgsr_cpu.py",
        "step = max(1, shape[axis] if axis == self.window else min(shape[axis], room))",
        "step = max(1, min(shape[axis], room))",
    ),
    Mutant(
        "a piece's sums replace those before",
        "kernels/hgsr_cpu.py",
        "laid[own].add_(kernels.sum(walk.rows, keepdim=True))",
        "laid[own].copy_(kernels.sum(walk.rows, keepdim=True))",
    ),
    Mutant(
        "the gradient replaces what was there",
        "kernels/hgsr_cpu.py",
        "goal.add_(step) if accumulate else goal.copy_(step)",
        "goal.copy_(step)",
    ),
    Mutant(
        "no guard at zero kernels",
        "kernels/hgsr_cpu.py",
        "kernels.clamp_min_(torch.finfo(walk.dtype).tiny).rsqrt_()",
        "kernels.rsqrt_()",
    ),
    Mutant(
        "a copy of strange strides is not written back",
        "kernels/hgsr_cpu.py",
        "            view.copy_(target.reshape(view.shape))\n",
        "            view.shape\n",
    ),
    Mutant(
        "columns of no group are in the first",
        "kernels/hgsr_cpu.py",
        "index.where(index >= 0, groups)",
        "index.where(index >= 0, 0)",
    ),
    Mutant(
        "small weights of no group are in the first",
        "kernels/hgsr_flat.py",
        "index.where(index >= 0, groups)",
        "index.where(index >= 0, 0)",
    ),
    Mutant(
        "the gradient of small weights replaces what was there",
        "kernels/hgsr_flat.py",
        "torch._foreach_add_ if accumulate else torch._foreach_copy_",
        "torch._foreach_copy_",
    ),
    Mutant(
        "kernels that were read for other weights are taken",
        "kernels/hgsr_flat.py",
        "self.slopes is slopes, None",
        "self.slopes is not None, None",
    ),
    Mutant(
        "small weights are not counted apart",
        "kernels/hgsr_flat.py",
        "None if bool(given.all()) else given.float()",
        "None",
    ),
    Mutant(
        "what has moved is taken for what was there",
        "kernels/placed.py",
        "now.places == self.places and now.forms == self.forms",
        "now.forms == self.forms",
    ),
    Mutant(
        "what has another form is taken for what was there",
        "kernels/placed.py",
        "now.places == self.places and now.forms == self.forms",
        "now.places == self.places",
    ),
    Mutant(
        "tables of graphs are kept for good",
        "kernels/hgsr_triton.py",
        "_CAPTURED.setdefault(lasting.untyped_storage(), {})[id(made)] = made",
        "_CAPTURED_FOR_GOOD.append(made)",
    ),
    Mutant(
        "absolute values counted at each reading",
        "passes/layers.py",
        "return tuple(name not in names[:i] for i, name in enumerate(names))",
        "return tuple(True for i, name in enumerate(names))",
    ),
    Mutant(
        "a unit's group only in the first part of a concatenation",
        "netsurgery/positions.py",
        "padded[start : start + len(units)] = units",
        "padded[: len(units)] = units",
    ),
    Mutant(
        "shortcuts are convolutions like others",
        "passes/layers.py",
        "shortcuts |= alone",
        "shortcuts |= 0",
    ),
    Mutant(
        "NaN is taken for zero",
        "kernels/hgsr_reference.py",
        "other = x != 0  # also",
        "other = x > 0  # also",
    ),
    Mutant(
        "a weight read in two ways counts in one",
        "passes/layers.py",
        ".setdefault((layer.inputs, layer.outputs), layer)",
        ".setdefault((), layer)",
    ),
    Mutant(
        "the share of L1 is the other one",
        "passes/penalty.py",
        "[self.now * (1 - self.l1_ratio), self.now * self.l1_ratio]",
        "[self.now * self.l1_ratio, self.now * (1 - self.l1_ratio)]",
    ),
    # the rise of the loss
    Mutant(
        "what units do to a stream stays in it",
        "passes/partial_replay.py",
        "if run.zeroes and isinstance(out, Tensor):",
        "if run.zeroes and out is None:",
    ),
    Mutant(
        "a layer norm does not mix its units",
        "passes/partial_replay.py",
        "return tuple(self.dims[step.inputs[0]][-len(step.args[1]) :])",
        "return ()",
    ),
    Mutant(
        "a folded norm loses its mean",
        "passes/partial_replay.py",
        "else of.constants[bias].double()) - mean) * scale",
        "else of.constants[bias].double())) * scale",
    ),
    Mutant(
        "computed weights are the same without units",
        "passes/partial_replay.py",
        "of.constants[node] = made  # and a step, for where it lacks units",
        "of.constants[node] = made\n                return",
    ),
    Mutant(
        "samples that depend on each other are stacked",
        "passes/partial_replay.py",
        "blocks = blocks and not any(self.mixes(step, row) for step in steps for row in self.rows)",
        "blocks = blocks or False",
    ),
    Mutant(
        "classes as they come",
        "passes/calibration.py",
        "return turn.argsort(stable=True)",
        "return torch.arange(len(turn))",
    ),
    Mutant(
        "a file of another model is gone on from",
        "passes/score_checkpoint.py",
        'if known.get("key") != self.key:',
        'if "key" not in known:',
    ),
    Mutant(
        "a prefix that recovers counts",
        "passes/prefixes.py",
        ".nan_to_num(math.inf).cummax(0).values",
        ".nan_to_num(math.inf)",
    ),
    Mutant(
        "a lower rise later on hides a higher one",
        "passes/prefixes.py",
        "self.highest, self.last = max(self.highest, loss_delta), loss_delta",
        "self.highest, self.last = loss_delta, loss_delta",
    ),
    Mutant(
        "what others have lost is whole again",
        "passes/prefixes.py",
        "if heights and other is not self.bundles[index]:",
        "if heights and other is self.bundles[-1] is not bundle:",
    ),
    Mutant(
        "trials before one that is refused count twice",
        "passes/ablation.py",
        "indices[tried:]",
        "indices",
    ),
    Mutant(
        "of groups that are gone already the results keep units",
        "passes/partial_replay.py",
        "gone = gone.beside(before)",
        "gone = gone.beside({})",
    ),
    Mutant(
        "the second order has the wrong sign",
        "passes/taylor_fisher.py",
        "else slopes.square() / 2 - slopes",
        "else slopes.square() / 2 + slopes",
    ),
    Mutant(
        "of effects on samples the signs cancel in Taylor's score",
        "passes/taylor_fisher.py",
        'changes.abs() if self.by == "effect" else changes',
        "changes",
        ("test_taylor_fisher.py", "test_readings.py"),
    ),
    Mutant(
        "of effects on samples the signs cancel",
        "passes/loss_increase.py",
        "loss_deltas.abs().sum(1)[None]",
        "loss_deltas.sum(1)[None].abs()",
        ("test_readings.py",),
    ),
    Mutant(
        "races by the effect sum rises",
        "passes/racing.py",
        "        loss_deltas = self.read(loss_deltas)\n",
        "",
        ("test_readings.py",),
    ),
    Mutant(
        "a mean stands for the loss of each sample",
        "passes/loss_increase.py",
        "self.block = 1",
        "self.block = None",
        ("test_readings.py",),
    ),
    Mutant(
        "one file holds scores by either reading",
        "passes/loss_increase.py",
        'key = f"{self.reading} {ablation.fingerprint(self.mode, race_of, tolerance)}"',
        "key = ablation.fingerprint(self.mode, race_of, tolerance)",
        ("test_readings.py",),
    ),
    Mutant(
        "an elimination leaves the inverse as it was",
        "passes/reconstruction.py",
        "    inverse -= rows.mT @ share\n",
        "",
    ),
    Mutant(
        "an elimination leaves the weights as they were",
        "passes/reconstruction.py",
        "    weights -= weights[:, some] @ share\n",
        "",
    ),
    Mutant(
        "every group weighs the same",
        "passes/reconstruction.py",
        "effects[names] = [effect]",
        "effects[names] = [1.0]",
    ),
    Mutant(
        "groups are measured on what they were fitted to",
        "passes/reconstruction.py",
        "rest = draw_inputs(self.held_back, self.samples, self.seed)",
        "rest = fitted",
    ),
    Mutant(
        "no constant stands for what is gone",
        "passes/reconstruction.py",
        "means[place] = self.sums / self.rows",
        "means[place] = 0 * self.sums",
    ),
    Mutant(
        "matrices of all groups are held at once",
        "passes/portions.py",
        "        if portion and used + size > memory:\n",
        "        if not portion and used + size > memory:\n",
    ),
    Mutant(
        "places are drawn by what runs beside a layer",
        "passes/reconstruction.py",
        "_rows(module, t, generators[path])",
        "_rows(module, t, next(iter(generators.values())))",
    ),
    Mutant(
        "a pass takes what can be read once",
        "passes/reporting.py",
        "if reads_once(data := getattr(self, name)):",
        "if reads_once(data := getattr(self, name)) and False:",
    ),
    Mutant(
        "the first batch of an iterator is lost to measure",
        "passes/calibration.py",
        "itertools.tee(data) if reads_once(data) else (data, data)",
        "(data, data)",
    ),
    Mutant(
        "ranks are divided by costs",
        "passes/removal.py",
        " and network.comparable and not network.ordinal)",
        " and network.comparable)",
        ("test_cost_aware.py",),
    ),
    Mutant(
        "classes that are masked make KL NaN",
        "passes/agreement.py",
        "torch.where(share > 0, share * gap, 0.0)",
        "(share * gap)",
        ("test_measured.py",),
    ),
    Mutant(
        "falls of the loss are no news",
        "passes/readings.py",
        "    if not many:",
        "    if many:",
        ("test_readings.py",),
    ),
    Mutant(
        "an entry in a unit's row and its column counts twice",
        "passes/entries.py",
        "fresh = fresh & (laid != other)",
        "fresh = fresh & (laid >= 0)",
    ),
    Mutant(
        "the rest of a unit counts beside the roles that were asked for",
        "passes/entries.py",
        "members = in_roles(group.members, wanted, ROLES)",
        "members = in_roles(group.members, ROLES)",
    ),
    Mutant(
        "the weights that make a unit stand for a gate on it",
        "passes/gradients.py",
        'roles: tuple[Role, ...] = ("consumes",)',
        'roles: tuple[Role, ...] = ("produces",)',
    ),
    Mutant(
        "opposite signs do not cancel",
        "passes/gradients.py",
        'summed(products if self.kind == "taylor"',
        'summed(products.abs() if self.kind == "taylor"',
    ),
    Mutant(
        "a parameter multiplies what depends on it",
        "netsurgery/analysis/proportional.py",
        "if name not in sources]",
        "if name or sources]",
    ),
    Mutant(
        "a unit drawn at random vouches for the regression that was fitted to it",
        "passes/sieve.py",
        "self.means[units] = y - left_out",
        "self.means[units] = y",
    ),
    Mutant(
        "the border is where predictions alone have it",
        "passes/sieve.py",
        "below = torch.where(self.known.isnan(), below, (self.known < border).to(below.dtype))",
        "below = below.clone()",
    ),
    Mutant(
        "a group that was left out is scored",
        "passes/scope.py",
        "(not include or belongs(group, included, include)) and not is_touched(group, excluded)",
        "not include or belongs(group, included, include)",
    ),
    Mutant(
        "racing forgets the samples that matter most",
        "passes/racing.py",
        "means[units] = (sums[0, units] + left",
        "means[units] = (0 * sums[0, units] + left",
    ),
    Mutant(
        "LAMP divides by what is not larger",
        "passes/scores.py",
        "above = ordered.flip(0).cumsum(0).flip(0)",
        "above = ordered.cumsum(0)",
    ),
    # training
    Mutant(
        "the strength's schedule begins again when the model moves",
        "passes/penalty.py",
        "self._factors = torch.zeros(2, dtype=dtype, device=device)\n            self._set(self._strength, self.steps)",
        "self._factors = torch.zeros(2, dtype=dtype, device=device)\n            self._set(self._strength, 0)",
    ),
    Mutant(
        "scores on augmented images",
        "netsurgery/training/data.py",
        "Subset(images.plain, spread)",
        "Subset(images.train, spread)",
    ),
    Mutant(
        "one order of the images for every seed",
        "netsurgery/training/engine.py",
        'data_seed=derived(self.of.seed, "order")',
        'data_seed=derived("order")',
    ),
    Mutant(
        "too few steps where gradients are accumulated",
        "netsurgery/training/engine.py",
        "-(-batches // self.accelerator.gradient_accumulation_steps)",
        "max(1, batches // self.accelerator.gradient_accumulation_steps)",
    ),
    Mutant(
        "recipes do not prune before training",
        "netsurgery/training/engine.py",
        "        elif run.soft is not None and run.soft.before_training:",
        "        elif run.soft is None:",
    ),
    Mutant(
        "the rate falls after a third of the epochs",
        "netsurgery/training/schedules.py",
        "at: Sequence[float] = (0.33, 0.66, 0.99)",
        "at: Sequence[float] = (1 / 3, 2 / 3, 0.99)",
    ),
    # the command line
    Mutant(
        "what is not a number passes for a proof",
        "netsurgery/cli.py",
        "    error = max(errors, key=lambda one: (one != one, one))",
        "    error = max(errors)",
    ),
    Mutant(
        "slices that are loaded count as the whole",
        "netsurgery/weight_sources.py",
        "elif overwrites and self._holds(one) and _is_whole(one):",
        "elif overwrites and self._holds(one):",
    ),
    Mutant(
        "a folder that was tried stays",
        "netsurgery/outputs.py",
        "                one.rmdir()",
        "                one.exists()",
    ),
    # computed weights: what stays, and what is scored
    Mutant(
        "the length of a weight norm stays",
        "netsurgery/rewriting/kept_weights.py",
        "ratio = torch.where(squares > 0, dots / squares, 1.0)",
        "ratio = torch.ones_like(squares)",
    ),
    Mutant(
        "a weight that is normalised loses units",
        "netsurgery/analysis/computed_weights.py",
        "        if leaf not in kept:\n",
        "        if False:\n",
    ),
    Mutant(
        "a length that other weights share is scaled",
        "netsurgery/analysis/computed_weights.py",
        "all(self.computation(peeled(one)) == mine for one in met)",
        "True",
    ),
    Mutant(
        "parameters are scored beside what is computed from them",
        "netsurgery/analysis/weights.py",
        "gone = merged | (replaced - direct)",
        "gone = merged",
    ),
    Mutant(
        "random numbers are drawn for a score",
        "netsurgery/analysis/weights.py",
        "        if torch.Tag.nondeterministic_seeded in getattr(one.target",
        "        if False and torch.Tag.nondeterministic_seeded in getattr(one.target",
    ),
    Mutant(
        "the scale of a low-rank update is forgotten",
        "netsurgery/analysis/low_rank.py",
        "        return factor.number * weight\n",
        "        return weight\n",
    ),
    Mutant(
        "what is assigned to .data is not followed",
        "netsurgery/capture/recorder.py",
        "        self.alias(meta, tensor)\n",
        "",
        ("test_computed_weights.py",),
    ),
    Mutant(
        "near filters are the same filter",
        "passes/scores.py",
        "found[pairs[0], pairs[1]] = torch.pdist(vectors)",
        "found = torch.cdist(vectors, vectors, compute_mode='use_mm_for_euclid_dist') / 2",
    ),
    Mutant(
        "what is scattered is of nobody's units",
        "netsurgery/analysis/rules.py",
        '        _align_first(op, op.dims(op["src"]), op.dims(op["index"]), set())\n',
        "        pass\n",
    ),
    Mutant(
        "blocks of several layers have inner units of their own",
        "netsurgery/axes.py",
        "            unify(whole[0][1], last)\n",
        "            pass\n",
    ),
    Mutant(
        "a number that was none of the sizes follows one",
        "netsurgery/adaptation/attributes.py",
        "if old != new and isinstance(held, int | tuple) and held == old:",
        "if old != new and isinstance(held, int | tuple):",
        ("test_hard_coded.py",),
    ),
    Mutant(
        "one tensor under two names counts once",
        "passes/entries.py",
        "            key = use.weight.names, id(use.weight.value)\n",
        "            key = id(use.weight.value)\n",
        ("test_unit_scores.py",),
    ),
    Mutant(
        "a threshold above the tolerance takes what is beyond it",
        "passes/prefixes.py",
        "    above = 1e9 * max(tolerance, 1.0) * (1 + steps)\n",
        "    above = tolerance + max(tolerance, 1e-6) * steps\n",
        ("test_prefixes.py",),
    ),
    Mutant(
        "a number of two meanings follows one of them",
        "netsurgery/adaptation/repeated_sizes.py",
        "        if len(become) == 1:\n",
        "        if become:\n",
    ),
    Mutant(
        "a number whose name says no width follows",
        "netsurgery/adaptation/repeated_sizes.py",
        "return become if words & (_WIDTH | _HEADS) or not become else become | {number}",
        "return become",
    ),
    Mutant(
        "a list of sizes follows in part",
        "netsurgery/adaptation/repeated_sizes.py",
        "if not follows or len(self.stays) > before:",
        "if not follows:",
    ),
    Mutant(
        "a number that the code computes with follows",
        "netsurgery/adaptation/fit_code.py",
        "            found = withdrawn(found, path, mentioned_names(code.kinds[path]))\n",
        "            return adaptation.joined(found)\n",
        ("test_repeats.py",),
    ),
    Mutant(
        "what modules share they share no more",
        "netsurgery/adaptation/forwards.py",
        "                if id(value) not in copies:\n",
        "                if True:\n",
        ("test_repeats.py",),
    ),
    Mutant(
        "an update before heads is none",
        "netsurgery/analysis/low_rank.py",
        '    return one.op == other.op != "" and',
        "    return False and",
    ),
    Mutant(
        "the magnitude of an update is left out",
        "netsurgery/analysis/low_rank.py",
        "            weight = weight * values[node].reshape(shape)\n",
        "            pass\n",
    ),
    Mutant(
        "a rank that goes counts for the length of what stays",
        "netsurgery/rewriting/kept_weights.py",
        "            for whole in (True, False)\n",
        "            for whole in (False, False)\n",
        ("test_adapters.py",),
    ),
    Mutant(
        "keyword inputs are not saved",
        "netsurgery/capture/saved_inputs.py",
        "return describe(dict(keyword) if keyword else tuple(positional))",
        "return describe(tuple(positional))",
        ("test_files.py",),
    ),
    Mutant(
        "the values of masks are not saved",
        "netsurgery/capture/saved_inputs.py",
        '            return {"shape": list(value.shape), "dtype": kind, **_values(value)}\n',
        '            return {"shape": list(value.shape), "dtype": kind}\n',
        ("test_files.py",),
    ),
    Mutant(
        "a full-size model is saved as a small one",
        "netsurgery/persistence.py",
        "    _check_sizes(small, edit)\n",
        "",
        ("test_files.py",),
    ),
    Mutant(
        "new dimensions of queries and keys are not hidden",
        "netsurgery/rewriting/added.py",
        "new.index_fill_(dim, (unseen & there).nonzero().flatten().to(new.device), 0)",
        "pass",
        tests=("test_inner_products.py",),
    ),
    Mutant(
        "a layer that others read hides units from one of them",
        "netsurgery/analysis/inner_products.py",
        "if not all(user in products and ids == own for user, _, ids in theirs):",
        "if False:",
    ),
    Mutant(
        "draws are judged by those of other groups",
        "passes/gradmax.py",
        "parameters[name].movedim((one, other), (0, 1))[mine[:, None], theirs] = 0",
        "pass",
    ),
    Mutant(
        "a new unit's weights depend on the others that are new",
        "netsurgery/rewriting/added.py",
        "drawn = torch.stack([draw(rest, key) for key in keys], dim)",
        "drawn = torch.stack([draw(rest, key, keys) for key in keys], dim)",
    ),
    Mutant(
        "what was asked is not said",
        "netsurgery/cli.py",
        "    console.print(Text(edit.summary()), soft_wrap=True)\n",
        "",
    ),
)


def planted(mutant: Mutant, root: Path = ROOT) -> tuple[str, str]:
    """The file that a fault goes into, and its text with the fault in it.

    Raises:
        LookupError: the text to replace does not stand there exactly once.
    """
    everywhere = [path.relative_to(root).as_posix() for name in CODE for path in sorted((root / name).rglob("*.py"))]
    everywhere = [
        file for file in everywhere if not file.startswith(("netsurgery/passes/", "netsurgery/kernels/"))
    ]  # links
    own = [mutant.file] if mutant.file in everywhere else []
    tokens = re.findall(r"\w+|[^\w\s]", mutant.old)
    exactly, laid_out_otherwise = re.escape(mutant.old), r"\s*".join(map(re.escape, tokens))
    for files in (own, everywhere):
        for pattern in (exactly, laid_out_otherwise):
            found = [(file, hit) for file in files for hit in re.finditer(pattern, (root / file).read_text())]
            if len(found) == 1:
                ((file, hit),) = found
                text, new = hit.string, mutant.new if pattern == exactly else _indented(mutant, hit)
                return file, text[: hit.start()] + new + text[hit.end() :]
    raise LookupError(f"{mutant.name}: its text stands {len(found)} times in the package, not once")


def _indented(mutant: Mutant, hit: re.Match[str]) -> str:
    """What a fault puts in place of text that has another indentation: the first line stands where the text does."""
    line = hit.string[hit.string.rfind("\n", 0, hit.start()) + 1 : hit.start()]
    before, _, more = textwrap.dedent(mutant.new).strip("\n").partition("\n")
    return "\n".join([before or "pass", *(line + one for one in more.splitlines())]) if line.isspace() else mutant.new


def package(into: Path, mutant: Mutant) -> None:
    """Copy the package and its tests, with one fault in it."""
    for name in (*CODE, "tests", "pyproject.toml"):
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(source, into / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(source, into / name)
    file, text = planted(mutant)
    (into / file).write_text(text)


def caught_by(mutant: Mutant) -> str | None:
    """The test that fails under a fault, or None if the fault survives."""
    with tempfile.TemporaryDirectory() as folder:
        package(Path(folder), mutant)
        environment = {
            **os.environ,
            "PYTHONPATH": folder,
            "PYTHONDONTWRITEBYTECODE": "1",
            "OMP_NUM_THREADS": "1",
            "NETSURGERY_EXAMPLES": "50",
            "NETSURGERY_HEAVY": "1",
        }
        environment.pop("PYTEST_ADDOPTS", None)
        command = [sys.executable, "-m", "pytest", "-x", "-q", "--tb=no", "-p", "no:cacheprovider", "-p", "no:xdist"]
        tests = [f"tests/{name}" for name in mutant.tests or TESTS_OF.get(mutant.file, TESTS)]
        run = subprocess.run([*command, *tests], cwd=folder, env=environment, capture_output=True, text=True)
    if run.returncode == 0:
        return None
    failed = [line for line in run.stdout.splitlines() if line.startswith(("FAILED", "ERROR"))]
    return failed[0].partition(" - ")[0].rpartition("/")[2] if failed else run.stdout[-500:] + run.stderr[-500:]


def main(words: list[str]) -> int:
    """Plant the faults; the number of those that survive."""
    chosen = [mutant for mutant in MUTANTS if not words or any(word in mutant.name for word in words)]
    survivors = 0
    for mutant in chosen:
        start = time.perf_counter()
        test = caught_by(mutant)
        survivors += test is None
        taken = time.perf_counter() - start
        print(f"{'SURVIVES' if test is None else 'caught'}  {mutant.name}: {test or '-'} ({taken:.0f} s)", flush=True)
    print(f"{len(chosen) - survivors} of {len(chosen)} faults caught")
    return survivors


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

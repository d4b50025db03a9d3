"""Passes to compose: scores, removals that need them, growth, graph rewrites; penalty and distillation for training."""

if __name__ == "netsurgery.passes":
    from netsurgery.passes.agreement import measure as measure
    from netsurgery.passes.block_influence import BlockInfluenceScore as BlockInfluenceScore
    from netsurgery.passes.branch_conv import BranchConv as BranchConv
    from netsurgery.passes.branch_conv import Branches as Branches
    from netsurgery.passes.compensation import Compensate as Compensate
    from netsurgery.passes.distillation import Distillation as Distillation
    from netsurgery.passes.entries import unit_scores as unit_scores
    from netsurgery.passes.factorise import Factorise as Factorise
    from netsurgery.passes.fold_batch_norm import FoldBatchNorm as FoldBatchNorm
    from netsurgery.passes.gradients import GradientScore as GradientScore
    from netsurgery.passes.gradmax import GradMax as GradMax
    from netsurgery.passes.growing import PlantChannels as PlantChannels
    from netsurgery.passes.growing import WidenChannels as WidenChannels
    from netsurgery.passes.insert_layer import Dense as Dense
    from netsurgery.passes.insert_layer import InsertLayer as InsertLayer
    from netsurgery.passes.insert_layer import Shortcut as Shortcut
    from netsurgery.passes.loss_increase import LossIncreaseScore as LossIncreaseScore
    from netsurgery.passes.penalty import HGSR as HGSR
    from netsurgery.passes.planting import Planting as Planting
    from netsurgery.passes.reconstruction import ReconstructionScore as ReconstructionScore
    from netsurgery.passes.removal import PruneChannels as PruneChannels
    from netsurgery.passes.remove_blocks import RemoveBlocks as RemoveBlocks
    from netsurgery.passes.scores import BatchNormScore as BatchNormScore
    from netsurgery.passes.scores import GeometricMedianScore as GeometricMedianScore
    from netsurgery.passes.scores import HGSRScore as HGSRScore
    from netsurgery.passes.scores import MagnitudeScore as MagnitudeScore
    from netsurgery.passes.scores import RandomScore as RandomScore
    from netsurgery.passes.soft import SoftPruning as SoftPruning
    from netsurgery.passes.taylor_fisher import FisherScore as FisherScore
    from netsurgery.passes.taylor_fisher import TaylorScore as TaylorScore
    from netsurgery.rewriting.dropping import Skipped as Skipped
else:  # the repository's root is on sys.path, and somebody asks for a package of this name: hardly for this one
    from pathlib import Path
    from runpy import run_path

    run_path(str(Path(__file__).resolve().parents[1] / "netsurgery" / "namesakes.py"))["give_way"](globals())

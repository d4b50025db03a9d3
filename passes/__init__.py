"""Passes to compose: scores, and removals that need them; and a penalty and distillation for training loops."""

if __name__ == "netsurgery.passes":
    from netsurgery.passes.agreement import measure as measure
    from netsurgery.passes.compensation import Compensate as Compensate
    from netsurgery.passes.distillation import Distillation as Distillation
    from netsurgery.passes.entries import unit_scores as unit_scores
    from netsurgery.passes.gradients import GradientScore as GradientScore
    from netsurgery.passes.loss_increase import LossIncreaseScore as LossIncreaseScore
    from netsurgery.passes.penalty import HGSR as HGSR
    from netsurgery.passes.planting import Planting as Planting
    from netsurgery.passes.reconstruction import ReconstructionScore as ReconstructionScore
    from netsurgery.passes.removal import PruneChannels as PruneChannels
    from netsurgery.passes.scores import BatchNormScore as BatchNormScore
    from netsurgery.passes.scores import GeometricMedianScore as GeometricMedianScore
    from netsurgery.passes.scores import HGSRScore as HGSRScore
    from netsurgery.passes.scores import MagnitudeScore as MagnitudeScore
    from netsurgery.passes.scores import RandomScore as RandomScore
    from netsurgery.passes.soft import SoftPruning as SoftPruning
    from netsurgery.passes.taylor_fisher import FisherScore as FisherScore
    from netsurgery.passes.taylor_fisher import TaylorScore as TaylorScore
else:  # the repository's root is on sys.path, and somebody asks for a package of this name: hardly for this one
    from pathlib import Path
    from runpy import run_path

    run_path(str(Path(__file__).resolve().parents[1] / "netsurgery" / "namesakes.py"))["give_way"](globals())

"""Passes to compose: scores, and removals that need them; and the training penalty that prepares for them."""

if __name__ == "netsurgery.passes":
    from netsurgery.passes.gates import FisherScore as FisherScore
    from netsurgery.passes.gates import TaylorScore as TaylorScore
    from netsurgery.passes.loss_increase import LossIncreaseScore as LossIncreaseScore
    from netsurgery.passes.penalty import HGSR as HGSR
    from netsurgery.passes.removal import PruneChannels as PruneChannels
    from netsurgery.passes.scores import BatchNormScore as BatchNormScore
    from netsurgery.passes.scores import GeometricMedianScore as GeometricMedianScore
    from netsurgery.passes.scores import HGSRScore as HGSRScore
    from netsurgery.passes.scores import MagnitudeScore as MagnitudeScore
    from netsurgery.passes.scores import RandomScore as RandomScore
    from netsurgery.passes.soft import SoftPruning as SoftPruning
else:  # the repository's root is on sys.path, and somebody asks for a package of this name: hardly for this one
    import sys
    from importlib.machinery import PathFinder
    from importlib.util import module_from_spec
    from pathlib import Path

    root = Path(__file__).resolve().parent.parent
    spec = PathFinder.find_spec(__name__, [path for path in sys.path if Path(path).resolve() != root])
    if spec is not None and spec.loader is not None:
        sys.modules[__name__] = module_from_spec(spec)  # an import returns what stands here in the end
        spec.loader.exec_module(sys.modules[__name__])
    else:  # as empty as any folder of this name: nothing to find in it, and no file
        __path__ = []
        del __file__

    def __getattr__(name: str) -> object:
        raise AttributeError(f"no package '{__name__}' is installed; netsurgery's is netsurgery.{__name__}")

"""Numerical kernels that know nothing of networks."""

if __name__ == "netsurgery.kernels":
    from netsurgery.kernels.criteria import CRITERIA as CRITERIA
    from netsurgery.kernels.criteria import Criterion as Criterion
    from netsurgery.kernels.sparsity import hgsr as hgsr
else:  # the repository's root is on sys.path, and somebody asks for a package of this name: hardly for this one
    from pathlib import Path
    from runpy import run_path

    run_path(str(Path(__file__).resolve().parents[1] / "netsurgery" / "namesakes.py"))["give_way"](globals())

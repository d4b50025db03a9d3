"""Numerical kernels that know nothing of networks."""

if __name__ != "netsurgery.kernels":
    raise ImportError("import this package as netsurgery.kernels")

from netsurgery.kernels.hgsr import CRITERIA as CRITERIA
from netsurgery.kernels.hgsr import Criterion as Criterion

"""Numerical kernels that know nothing of networks."""

if __name__ != "netsurgery.kernels":
    raise ImportError("import this package as netsurgery.kernels")

from netsurgery.kernels.criteria import CRITERIA as CRITERIA
from netsurgery.kernels.criteria import Criterion as Criterion
from netsurgery.kernels.sparsity import hgsr as hgsr

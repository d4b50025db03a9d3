"""Which folder holds which package; all else is said in pyproject.toml."""

import sys
from pathlib import Path

from setuptools import setup

folders = {
    "netsurgery": "netsurgery",
    "netsurgery.kernels": "kernels",
    "netsurgery.passes": "passes",
    "netsurgery.training": "netsurgery/training",
}
# An editable install of these would be an import hook, which type checkers do not follow. `src/` holds a link to
# netsurgery/ with all packages in it, and nothing else: a path that they read. (Without links, the hook.)
if "editable_wheel" in sys.argv and Path("src/netsurgery/passes/__init__.py").is_file():
    folders = {"": "src"}

setup(package_dir=folders)

"""Builds the compiled core. Safety directives live here and nowhere else: NODEAGENT_DEBUG=1 switches every check on."""

import os
from pathlib import Path

from Cython.Build import cythonize
from setuptools import Extension, setup

DEBUG = os.environ.get("NODEAGENT_DEBUG") == "1"
DIRECTIVES = {
    "language_level": "3",
    "boundscheck": DEBUG,
    "initializedcheck": DEBUG,
    "overflowcheck": DEBUG,
    "cdivision": True,
    "autotestdict": False,
    "auto_pickle": False,
    "embedsignature": True,
    "embedsignature.format": "python",
    "linetrace": DEBUG,
}
EXTENSION = Extension(
    "nodeagent._fastpath",
    ["nodeagent/_fastpath.pyx"],
    depends=[str(path) for path in sorted(Path("nodeagent").glob("*.pxi"))],
    extra_compile_args=["-O1", "-g"] if DEBUG else ["-O3", "-g0"],
    define_macros=[("CYTHON_TRACE_NOGIL", "1"), ("CYTHON_USE_SYS_MONITORING", "0")] if DEBUG else [],
)

setup(ext_modules=cythonize([EXTENSION], compiler_directives=DIRECTIVES, build_dir="build/cython"))

"""Builds the compiled core and the probe of `nodeagent bench`. Safety directives live here and nowhere else:
NODEAGENT_DEBUG=1 switches every check on but that of overflows, which Cython does not have for 128-bit integers."""

import os
from pathlib import Path

from Cython.Build import cythonize
from setuptools import Extension, setup

DEBUG = os.environ.get("NODEAGENT_DEBUG") == "1"
DIRECTIVES = {
    "language_level": "3",
    "boundscheck": DEBUG,
    "initializedcheck": DEBUG,
    "cdivision": True,
    "autotestdict": False,
    "auto_pickle": False,
    "embedsignature": True,
    "embedsignature.format": "python",
    "linetrace": DEBUG,
}
COMPILE_ARGS = ["-O1", "-g"] if DEBUG else ["-O3", "-g0"]
MACROS = [("CYTHON_TRACE_NOGIL", "1"), ("CYTHON_USE_SYS_MONITORING", "0")] if DEBUG else []


def extension(name: str, depends: str = "") -> Extension:
    """Return the extension module of a .pyx file. depends: a pattern of the files next to it that it includes."""
    source = Path(*name.split(".")).with_suffix(".pyx")
    included = sorted(map(str, source.parent.glob(depends))) if depends else []
    return Extension(name, [str(source)], depends=included, extra_compile_args=COMPILE_ARGS, define_macros=MACROS)


EXTENSIONS = [
    extension("nodeagent._fastpath", "*.pxi"),
    # The command line's alone: the daemon never loads it.
    extension("nodeagent.cli.node.bench._probe"),
]

setup(ext_modules=cythonize(EXTENSIONS, compiler_directives=DIRECTIVES, build_dir="build/cython"))

#!/bin/sh
# Makes a virtual environment with everything that is needed to build and to test, and installs from the distribution
# what is missing there: a C compiler and Python's headers.
set -eu

venv=$1
python=${PYTHON:-python3}

have_headers() {
    "$python" -c 'import os, sysconfig, venv, ensurepip; raise SystemExit(not os.path.exists(os.path.join(sysconfig.get_path("include"), "Python.h")))' 2>/dev/null
}

if ! command -v "$python" >/dev/null || ! command -v cc >/dev/null || ! have_headers; then
    if ! command -v apt-get >/dev/null; then
        echo "setup: cannot build: Python >= 3.11 with headers and venv, and a C compiler are needed; install them with your distribution's tool" >&2
        exit 1
    fi
    root=$([ "$(id -u)" = 0 ] && echo env || echo sudo)
    $root apt-get update -qq
    DEBIAN_FRONTEND=noninteractive $root apt-get install -y -qq --no-install-recommends gcc libc6-dev make python3 python3-dev python3-venv
fi

"$python" -c 'import sys; raise SystemExit(sys.version_info < (3, 11) and "setup: cannot build: Python %d.%d found, 3.11 or newer is needed" % sys.version_info[:2])'
"$python" -m venv "$venv"
"$venv/bin/python" -m pip install -q --upgrade 'pip>=25.1'
"$venv/bin/python" -m pip install -q 'setuptools>=77' 'cython>=3.1' wheel
"$venv/bin/python" -m pip install -q --group dev

# make demo, make test: everything needed is set up first. make bench, make lint, make wheel, make deb, make pb, make manifests.
# make images: the drawings in docs/images.
# make image: a container image in dist/, from Debian packages, without a container engine. make image-lock: its pins.
# make vm-test: the agent in a guest with a systemd, NUMA nodes and hotplug of its own; needs root and QEMU.

VENV := .venv
PYTHON := $(VENV)/bin/python
READY := $(VENV)/.ready
BUILT := $(VENV)/.built

.PHONY: demo test vm-test bench lint wheel image images image-lock deb pb manifests clean

demo: $(BUILT)
	$(PYTHON) -m demo.demo

# Most of the time of all tests is spent on waiting for processes: one file at a time on each core.
EVERYTHING := -n logical --maxprocesses 8 --dist loadfile

test: $(BUILT)
	$(PYTHON) -m pytest -q $(or $(TESTS),$(EVERYTHING))

vm-test: $(BUILT)
	tests/vm/setup.sh
	NODEAGENT_VM=1 $(PYTHON) -m pytest -q -s -o cache_dir=.pytest_cache/$(or $(NODEAGENT_VM_LOCK),vm) tests/vm $(TESTS)

# Without cached bytecode every start would compile the sources.
bench: $(BUILT)
	env -u PYTHONDONTWRITEBYTECODE $(PYTHON) -m benchmarks

lint: $(BUILT)
	$(PYTHON) -m pytest -q tests/rules/test_layout.py

wheel: $(BUILT)
	$(PYTHON) -m build --outdir dist .

images: $(BUILT)
	$(PYTHON) -m tests.builders.docs_images

image: $(BUILT)
	PYTHONPATH=packaging $(PYTHON) -m image --source "$(IMAGE_SOURCE)"

image-lock: $(BUILT)
	PYTHONPATH=packaging $(PYTHON) -m image.lock

# The distribution's own Python: the package is for its ABI.
deb: export SOURCE_DATE_EPOCH ?= $(shell git log -1 --format=%ct 2>/dev/null || stat -c %Y pyproject.toml)
deb:
	/usr/bin/python3 -m venv build/deb
	build/deb/bin/python -m pip install -q build 'setuptools>=77' 'cython>=3.1'
	build/deb/bin/python -m pip install -q --require-hashes -r packaging/debian/libraries.txt
	rm -rf build/deb/dist
	build/deb/bin/python -m build --no-isolation --wheel --outdir build/deb/dist .
	build/deb/bin/python packaging/debian/build.py build/deb/dist/nodeagent-*.whl --out dist

pb: $(READY)
	$(PYTHON) protos/generate.py

manifests: $(BUILT)
	$(PYTHON) deploy/generate.py

$(READY): pyproject.toml setup.sh
	./setup.sh $(VENV)
	touch $@

$(BUILT): $(READY) setup.py pyproject.toml $(wildcard nodeagent/*.pyx nodeagent/*.pxi nodeagent/cli/node/bench/*.pyx)
	$(PYTHON) -m pip install -q --no-build-isolation -e .
	touch $@

clean:
	rm -rf $(VENV) build dist *.egg-info nodeagent/*.so nodeagent/cli/node/bench/*.so

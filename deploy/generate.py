"""Keeps what is derived fresh: `python deploy/generate.py` (make manifests).

The chart, deploy/chart, is the source of the manifests. From the program come the versions, the part of
values.schema.json that describes the agent's configuration, and keys-at-start.txt; from deploy/monitoring the chart's
rules.yaml, as a chart reads no file outside its folder. From the chart come the manifests
for `kubectl apply -k deploy`, rendered with its default values, and made-from.sha256: the digests of what they were
rendered from and of themselves, by which a test notices without helm that one side has changed alone. Needs helm, in
NODEAGENT_E2E_BIN or PATH, only where templates or values have changed.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import subprocess
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from nodeagent.config.json_schema import json_schema
from nodeagent.config.schema import keys_applied_at_start
from nodeagent.version import VERSION

DEPLOY = Path(__file__).resolve().parent
CHART = DEPLOY / "chart"
MANIFESTS = ("rbac", "admission", "deviceclasses", "daemonset")
"""Templates that are manifests too. What the others make is optional, or Helm's alone."""
DIGESTS = "made-from.sha256"
KUBERNETES = "1.37.0"
NOTICE = "# Made from deploy/chart by `make manifests`: change it there.\n"
NOTICE_OF_RULES = "# Made from deploy/monitoring/rules.yaml by `make manifests`: change it there.\n"
VALUES = ("namespace.create=true",)
"""What differs from the default values: kubectl makes the namespace too."""
_SOURCE = re.compile(r"^---\n# Source: .*\n", re.MULTILINE)


# ---------------------------------------------------------------- what comes from the program


def derived() -> dict[Path, str]:
    """Return the text of each file that the program or the alerts decide, at least in part."""
    kustomization = DEPLOY / "kustomization.yaml"
    return {
        kustomization: re.sub(r"newTag: .*", f"newTag: {VERSION}", kustomization.read_text()),
        CHART / "Chart.yaml": _versions((CHART / "Chart.yaml").read_text()),
        CHART / "values.schema.json": _with_configuration(json.loads((CHART / "values.schema.json").read_text())),
        CHART / "rules.yaml": NOTICE_OF_RULES + (DEPLOY / "monitoring" / "rules.yaml").read_text(),
        CHART / "keys-at-start.txt": "".join(f"{key}\n" for key in sorted(keys_applied_at_start())),
    }


def _versions(text: str) -> str:
    text = re.sub(r"^version: .*$", f"version: {VERSION}", text, flags=re.MULTILINE)
    return re.sub(r"^appVersion: .*$", f'appVersion: "{VERSION}"', text, flags=re.MULTILINE)


def _with_configuration(values: dict[str, Any]) -> str:
    return json.dumps({**values, "$defs": json_schema()["$defs"]}, indent=1) + "\n"


# ---------------------------------------------------------------- what comes from the chart


def helm() -> str | None:
    """Return the path of helm, or None if there is none."""
    return shutil.which("helm", path=f"{os.environ.get('NODEAGENT_E2E_BIN', '')}:{os.environ.get('PATH', '')}")


def manifests(program: str) -> dict[Path, str]:
    """Return the text of each manifest. Raise subprocess.CalledProcessError if helm refuses the chart."""
    return {DEPLOY / f"{name}.yaml": NOTICE + _rendered(program, f"templates/{name}.yaml") for name in MANIFESTS}


def _rendered(program: str, template: str) -> str:
    words = [program, "template", "nodeagent", str(CHART), "--namespace", "nodeagent", "--show-only", template]
    words += ["--kube-version", KUBERNETES, *(f"--set={value}" for value in VALUES)]
    text = subprocess.run(words, stdout=subprocess.PIPE, text=True, check=True, timeout=60).stdout
    return _SOURCE.sub("---\n", text).rstrip() + "\n"


def digests(texts: Mapping[Path, str]) -> str:
    """Return made-from.sha256 for the chart as it is and manifests with these texts, as sha256sum writes it."""
    contents = {path: path.read_bytes() for path in _sources()} | {path: one.encode() for path, one in texts.items()}
    lines = ((path.relative_to(DEPLOY), hashlib.sha256(contents[path]).hexdigest()) for path in sorted(contents))
    return "".join(f"{digest}  {name}\n" for name, digest in lines)


def _sources() -> Iterator[Path]:
    """Yield the files that decide how the manifests look."""
    yield from (CHART / name for name in ("Chart.yaml", "values.yaml", "templates/_helpers.tpl"))
    yield from (CHART / f"templates/{name}.yaml" for name in MANIFESTS)


# ---------------------------------------------------------------- both


def main() -> None:
    """Write everything. Raise SystemExit if helm is needed and missing."""
    for path, text in derived().items():
        path.write_text(text)
    texts = {path: path.read_text() for path in (DEPLOY / f"{name}.yaml" for name in MANIFESTS)}
    if (DEPLOY / DIGESTS).read_text() == digests(texts):
        return
    if (program := helm()) is None:
        raise SystemExit("cannot render the manifests: no helm in NODEAGENT_E2E_BIN or PATH")
    texts = manifests(program)
    for path, text in texts.items():
        path.write_text(text)
    (DEPLOY / DIGESTS).write_text(digests(texts))


if __name__ == "__main__":
    main()

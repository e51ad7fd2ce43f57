"""The list of what an image contains, as CycloneDX 1.5 (cyclonedx.org/docs/1.5/json)."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from typing import Any
from urllib.parse import quote

from image.debs import Deb
from image.recipe import LICENSES, NAME
from nodeagent.version import VERSION


def document(debs: Iterable[Deb], distributions: Iterable[Mapping[str, str]], *, system: str, created: str) -> bytes:
    """Return the document. system: the distribution as its os-release has it, "debian-12"; created: RFC 3339."""
    about = {"type": "container", "name": NAME, "version": VERSION, "licenses": [{"expression": LICENSES}]}
    whole = {
        "bomFormat": "CycloneDX",
        "specVersion": "1.5",
        "version": 1,
        "metadata": {"timestamp": created, "component": about},
        "components": [*(_debian(deb, system) for deb in debs), *(_python(one) for one in distributions)],
    }
    return json.dumps(whole, indent=1).encode() + b"\n"


def _debian(deb: Deb, system: str) -> dict[str, Any]:
    distributor = system.partition("-")[0]
    purl = f"pkg:deb/{distributor}/{deb.name}@{quote(deb.version)}?arch={deb.architecture}&distro={quote(system)}"
    hashes = [{"alg": "SHA-256", "content": deb.sha256}]
    return {**_component(deb.name, deb.version, purl), "hashes": hashes}


def _python(one: Mapping[str, str]) -> dict[str, Any]:
    name = re.sub(r"[-_.]+", "-", one["name"]).lower()
    component = _component(one["name"], one["version"], f"pkg:pypi/{name}@{quote(one['version'])}")
    return {**component, "licenses": [{"expression": one["licence"]}]} if one["licence"] else component


def _component(name: str, version: str, purl: str) -> dict[str, Any]:
    return {"type": "library", "bom-ref": purl, "name": name, "version": version, "purl": purl}

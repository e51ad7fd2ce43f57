"""Certificates of authorities and servers, made by openssl with exactly the extensions asked for."""

from __future__ import annotations

import subprocess
from dataclasses import dataclass
from pathlib import Path

IDS = {"subjectKeyIdentifier": "hash", "authorityKeyIdentifier": "keyid:always"}
NO_IDS = {"subjectKeyIdentifier": "none", "authorityKeyIdentifier": "none"}
AUTHORITY = {"basicConstraints": "critical,CA:TRUE", "keyUsage": "critical,keyCertSign,cRLSign", **IDS}
SERVER = {"subjectAltName": "IP:127.0.0.1,DNS:localhost", "extendedKeyUsage": "serverAuth", **IDS}
"""As kubeadm makes them."""
PAST = "20200101000000Z", "20200201000000Z"
NOW = "20200101000000Z", "20991231000000Z"


@dataclass(frozen=True)
class Signed:
    """A certificate and its key."""

    certificate: Path
    key: Path


class Office:
    """Makes certificates in a folder; each has its own key."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        (folder / "index").write_text("")
        (folder / "serial").write_text("1000")

    def sign(
        self, name: str, extensions: dict[str, str], by: Signed | None = None, valid: tuple[str, str] = NOW
    ) -> Signed:
        """A certificate for NAME (its common name), signed by another or by itself."""
        key, request, made = (self._folder / f"{name}.{end}" for end in ("key", "csr", "crt"))
        config = self._folder / f"{name}.cnf"
        lines = "\n".join(f"{one} = {value}" for one, value in extensions.items() if value)
        config.write_text(
            "[req]\ndistinguished_name = dn\n[dn]\n[ca]\ndefault_ca = office\n[any]\ncommonName = supplied\n"
            "[office]\npolicy = any\ndefault_md = sha256\nunique_subject = no\n"
            f"database = {self._folder}/index\nserial = {self._folder}/serial\nnew_certs_dir = {self._folder}\n"
            f"[extensions]\n{lines}\n"
        )
        new = ("-new", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-subj", f"/CN={name}")
        _openssl("req", "-config", config, *new, "-keyout", key, "-out", request)
        signer = ("-cert", by.certificate, "-keyfile", by.key) if by else ("-selfsign", "-keyfile", key)
        when = ("-startdate", valid[0], "-enddate", valid[1])
        _openssl(
            *("ca", "-batch", "-notext", "-config", config, "-extensions", "extensions", *signer, *when),
            *("-in", request, "-out", made),
        )
        return Signed(made, key)


def bundle(path: Path, *some: Signed) -> Path:
    """Several certificates in one file."""
    path.write_text("".join(one.certificate.read_text() for one in some))
    return path


def _openssl(*words: object) -> None:
    subprocess.run(["openssl", *map(str, words)], check=True, capture_output=True)

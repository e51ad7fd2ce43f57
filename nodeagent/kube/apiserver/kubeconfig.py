"""How to reach the API server, from the pod's service account or a kubeconfig's current context. Parsing is strict.

Passwords, auth providers, proxies and impersonation are refused by name.
"""

from __future__ import annotations

import base64
import binascii
import os
from collections.abc import Mapping
from pathlib import Path
from urllib.parse import urlsplit

import msgspec
import yaml

from nodeagent.errors import ConfigError
from nodeagent.kube.apiserver.credentials import Access, Pem, bearer, tls_context
from nodeagent.kube.apiserver.exec_plugin import VERSIONS, Plugin

SERVICE_ACCOUNT = Path("/var/run/secrets/kubernetes.io/serviceaccount")


def access(
    kubeconfig: str | None, *, environ: Mapping[str, str] = os.environ, account: Path = SERVICE_ACCOUNT
) -> Access:
    """Return the access settings of a kubeconfig's current context, or of this pod's service account if None.

    `kubeconfig` is a path; `account` is the folder of the service account. Raise ConfigError with place and cause, also
    if the token or the certificates cannot be read.
    """
    found = _in_cluster(environ, account) if kubeconfig is None else _from_file(Path(kubeconfig).expanduser())
    try:
        tls_context(found)
        bearer(found)
    except ConfigError as error:
        raise ConfigError(f"cannot use {found.source}: {error}") from None
    return found


# The service account


def _in_cluster(environ: Mapping[str, str], account: Path) -> Access:
    host, port = (environ.get(f"KUBERNETES_SERVICE_{name}", "") for name in ("HOST", "PORT"))
    if not host or not port:
        raise ConfigError(
            "cannot find the API server: KUBERNETES_SERVICE_HOST and KUBERNETES_SERVICE_PORT are not set,"
            " so this is no pod; name a kubeconfig"
        )
    if not port.isascii() or not port.isdigit():
        raise ConfigError(f"cannot find the API server: KUBERNETES_SERVICE_PORT is {port!r}, expected a number")
    source = f"service account {account}"
    return Access(source=source, host=host, port=int(port), ca=account / "ca.crt", token_file=account / "token")


# The kubeconfig (k8s.io/client-go/tools/clientcmd/api/v1)


class _Kebab(msgspec.Struct, rename="kebab"):
    pass


class _Cluster(_Kebab):
    server: str
    certificate_authority: str = ""
    certificate_authority_data: str = ""
    insecure_skip_tls_verify: bool = False
    tls_server_name: str = ""
    proxy_url: str = ""


class _Variable(msgspec.Struct):
    name: str
    value: str


class _Exec(msgspec.Struct, rename="camel"):
    api_version: str
    command: str
    args: list[str] | None = None
    env: list[_Variable] | None = None
    provide_cluster_info: bool = False
    interactive_mode: str = "IfAvailable"


class _User(_Kebab):
    client_certificate: str = ""
    client_certificate_data: str = ""
    client_key: str = ""
    client_key_data: str = ""
    token: str = ""
    token_file: str = msgspec.field(name="tokenFile", default="")
    exec: _Exec | None = None
    username: str = ""
    auth_provider: object = None
    impersonate: str = msgspec.field(name="as", default="")


class _Context(msgspec.Struct):
    cluster: str = ""
    user: str = ""


class _Named(msgspec.Struct):
    name: str
    cluster: _Cluster | None = None
    user: _User | None = None
    context: _Context | None = None


class _Kubeconfig(_Kebab):
    current_context: str = ""
    clusters: list[_Named] | None = None
    users: list[_Named] | None = None
    contexts: list[_Named] | None = None


def _from_file(path: Path) -> Access:
    try:
        config = msgspec.convert(yaml.safe_load(path.read_text(encoding="utf-8")), _Kubeconfig)
        context = _entry(config.contexts, config.current_context, "current-context").context or _Context()
        cluster = _entry(config.clusters, context.cluster, "cluster").cluster
        user = (_entry(config.users, context.user, "user").user if context.user else None) or _User()
        if cluster is None:
            raise ValueError(f"cluster {context.cluster!r} is empty")
        return _combined(path, cluster, user)
    except OSError as error:
        raise ConfigError(f"cannot read kubeconfig {path}: {error.strerror}") from None
    except (ValueError, yaml.YAMLError) as error:
        raise ConfigError(f"cannot use kubeconfig {path}: {' '.join(str(error).split())}") from None


def _entry(entries: list[_Named] | None, name: str, what: str) -> _Named:
    for entry in entries or ():
        if entry.name == name:
            return entry
    raise ValueError(f"{what} {name!r} is not in the file" if name else f"{what} is not set")


def _combined(path: Path, cluster: _Cluster, user: _User) -> Access:
    _refuse_unknown(cluster, user)
    url = urlsplit(cluster.server)
    if url.scheme not in ("https", "http") or not url.hostname:
        raise ValueError(f"server {cluster.server!r} is no https:// or http:// address")
    certificate = _pem(path, user.client_certificate, user.client_certificate_data, "client-certificate")
    key = _pem(path, user.client_key, user.client_key_data, "client-key")
    if (certificate is None) != (key is None):
        raise ValueError("client-certificate and client-key need each other")
    return Access(
        source=f"kubeconfig {path}",
        host=url.hostname,
        port=url.port or (443 if url.scheme == "https" else 80),
        path=url.path.rstrip("/"),
        tls=url.scheme == "https",
        server_name=cluster.tls_server_name,
        insecure=cluster.insecure_skip_tls_verify,
        ca=_pem(path, cluster.certificate_authority, cluster.certificate_authority_data, "certificate-authority"),
        certificate=(certificate, key) if certificate is not None and key is not None else None,
        token=user.token.strip(),
        token_file=path.parent / user.token_file if user.token_file else None,
        plugin=_plugin(path, cluster, user.exec) if user.exec else None,
    )


def _refuse_unknown(cluster: _Cluster, user: _User) -> None:
    given = {
        "proxy-url": cluster.proxy_url,
        "username": user.username,
        "auth-provider": user.auth_provider,
        "as": user.impersonate,
    }
    if refused := [name for name, value in given.items() if value]:
        raise ValueError(f"{', '.join(refused)} is not supported")


def _pem(path: Path, file: str, data: str, what: str) -> Pem | None:
    """Return the data or the file. Data takes precedence, and a file is relative to the kubeconfig, as in kubectl."""
    if not data:
        return path.parent / file if file else None
    try:
        return base64.b64decode("".join(data.split()), validate=True)
    except (binascii.Error, ValueError) as error:
        raise ValueError(f"{what}-data is not base64: {error}") from None


def _plugin(path: Path, cluster: _Cluster, given: _Exec) -> Plugin:
    if given.api_version not in VERSIONS:
        raise ValueError(f"exec.apiVersion is {given.api_version!r}, known are {', '.join(VERSIONS)}")
    if given.interactive_mode == "Always":
        raise ValueError("exec.interactiveMode is 'Always', and there is no terminal to ask at")
    command = given.command if given.command == Path(given.command).name else str(path.parent / given.command)
    return Plugin(
        version=given.api_version,
        command=(command, *(given.args or ())),
        environment=tuple((one.name, one.value) for one in given.env or ()),
        cluster=msgspec.to_builtins(cluster) if given.provide_cluster_info else None,
    )

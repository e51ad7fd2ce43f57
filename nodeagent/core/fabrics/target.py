"""NVMe targets on the network: what they are called as devices, and how the kernel is asked to connect one.

Pure. The options are those of /dev/nvme-fabrics (`opt_tokens` in drivers/nvme/host/fabrics.c); nvme-cli has them under
the same names.
"""

from __future__ import annotations

import msgspec

KIND = "nvmeof"
LONGEST_NQN_BYTES = 223
"""NVMe base specification, 4.5."""
UUID_NQN = "nqn.2014-08.org.nvmexpress:uuid:"


class Port(msgspec.Struct, frozen=True, kw_only=True):
    """Where a subsystem is reached, and its name. It identifies a connection of this host."""

    transport: str
    traddr: str
    """IP address."""
    trsvcid: int
    """TCP or UDP port."""
    nqn: str
    """Of the subsystem."""

    def __str__(self) -> str:
        host = f"[{self.traddr}]" if ":" in self.traddr else self.traddr
        return f"{self.nqn} at {self.transport}://{host}:{self.trsvcid}"


class Host(msgspec.Struct, frozen=True, kw_only=True):
    """As whom the node connects. The kernel wants one id for each NQN, and one NQN for each id (nvmf_host_add). Both
    are empty for the names that the kernel has."""

    nqn: str = ""
    id: str = ""
    """UUID."""


class Secrets(msgspec.Struct, frozen=True, kw_only=True):
    """Keys of DH-HMAC-CHAP as nvme-cli writes them (DHHC-1:…); "" for none. They have no representation, so that no log
    shows them."""

    own: str = ""
    controller: str = ""

    def __repr__(self) -> str:
        return "Secrets(…)"


NO_SECRETS = Secrets()


class Timeouts(msgspec.Struct, frozen=True, kw_only=True):
    """What the kernel does while a path is lost, in seconds; None: as it is by default."""

    ctrl_loss_tmo: int = -1
    """How long to try to connect again; -1: as long as the connection is wanted."""
    reconnect_delay: int | None = None
    fast_io_fail_tmo: int | None = None
    """After what time I/O fails rather than waits; -1: never."""


def device_id(name: str) -> str:
    """Return the id of the device that a configured target is. Its pool is called the same.

    To the scheduler a device is its driver, pool and name: nothing else that can be configured may be part of them, or
    a device that a claim holds would be a free one after a reload. The name has no slash, which those of a node's
    pools have.
    """
    return f"{KIND}-{name}"


def kind_of(pool: str) -> str:
    """Return the kind of the devices of a pool, by its name."""
    return KIND if pool.startswith(device_id("")) and "/" not in pool else pool.rpartition("/")[2]


def host_of(nqn: str) -> Host:
    """Return a host by its NQN: the id is the UUID that the NQN has, or one made from it."""
    import uuid  # no node without targets needs it

    try:
        id = uuid.UUID(nqn.removeprefix(UUID_NQN))
    except ValueError:
        id = uuid.uuid5(uuid.NAMESPACE_URL, nqn)
    return Host(nqn=nqn, id=str(id))


def options(port: Port, host: Host, timeouts: Timeouts, secrets: Secrets = NO_SECRETS) -> str:
    """Return what is written to connect. It may contain secrets."""
    said: dict[str, str | int | None] = {
        "transport": port.transport,
        "traddr": port.traddr,
        "trsvcid": port.trsvcid,
        "nqn": port.nqn,
        "hostnqn": host.nqn or None,
        "hostid": host.id or None,
        "ctrl_loss_tmo": timeouts.ctrl_loss_tmo,
        "reconnect_delay": timeouts.reconnect_delay,
        "fast_io_fail_tmo": timeouts.fast_io_fail_tmo,
        "dhchap_secret": secrets.own or None,
        "dhchap_ctrl_secret": secrets.controller or None,
    }
    return ",".join(f"{name}={value}" for name, value in said.items() if value is not None)

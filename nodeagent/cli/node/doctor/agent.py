"""The agent itself: its unit, whether it answers, what it says against itself, its configuration, socket and metrics.

Source: systemctl(1), systemd.unit(5).
"""

from __future__ import annotations

import stat
import uuid
from collections.abc import Callable
from typing import NamedTuple

from nodeagent.admin.status_endpoint import status_readers
from nodeagent.cli.node.doctor.model import DENIED, Check, Finding, failure, ok, skipped, unknown, warning
from nodeagent.cli.node.doctor.node import Node
from nodeagent.config.isolation import TuningConfig
from nodeagent.config.listen import ListenAddress
from nodeagent.config.schema import Config
from nodeagent.host.sysfs.sysfs import BOOT_ID
from nodeagent.version import VERSION

NOT_SHOWN = unknown("the agent's status does not show it")
MOST_NAMED = 3
UNIT = "nodeagent.service"
FOLDERS = ("etc/systemd/system", "run/systemd/system", "usr/lib/systemd/system", "lib/systemd/system")
PROPERTIES = ("LoadState", "ActiveState", "SubState", "Result", "NRestarts", "UnitFileState", "NeedDaemonReload")
MOST_RESTARTS = 3


def _answers(node: Node) -> Finding:
    if not node.agent_error:
        return ok(f"version {node.status.get('version', 'unknown')} answers")
    if not node.live:
        return skipped("not in a capture")
    if DENIED in node.agent_error:
        return unknown(node.agent_error)
    return warning(
        f"no agent answers: {node.agent_error}",
        "start the agent; what it would report is left out below",
        "systemctl start nodeagent",
        "journalctl -u nodeagent -n 50",
    )


def _ready(node: Node) -> Finding:
    reasons = node.listed("not_ready")
    if not reasons and node.status.get("ready") is not True:
        return NOT_SHOWN
    if not reasons:
        return ok("it is ready")
    return failure(_some(reasons), "what each reason needs is in the section named here", "nodeagent status")


def _notes(node: Node) -> Finding:
    inventory = node.status.get("inventory")
    if not isinstance(inventory, dict) or not {"notes", "conflicts"} <= node.status.keys():
        return NOT_SHOWN
    warnings = inventory.get("warnings")
    notes = [*node.listed("notes"), *node.listed("conflicts"), *(map(str, warnings) if warnings else ())]
    return warning(_some(notes), "read the notes", "nodeagent status") if notes else ok("no notes, no conflicts")


def _refused(node: Node) -> Finding:
    refused = node.status.get("refused")
    if not isinstance(refused, dict):
        return NOT_SHOWN
    reasons = [f"{name}: {why}" for name, why in refused.items()]
    if not reasons:
        return ok("every configured resource is served")
    return failure(_some(reasons), "serve each device through one program only", "nodeagent status")


def _version(node: Node) -> Finding:
    running = node.status.get("version")
    if running == VERSION:
        return ok(f"the agent and this program are {VERSION}")
    return warning(
        f"the agent that runs is {running}, this program {VERSION}",
        "restart the agent if it was upgraded",
        "systemctl restart nodeagent",
    )


def _configuration(node: Node) -> Finding:
    if node.config_error:
        check = f"nodeagent config check {node.config_file}"
        return failure(node.config_error, "correct the configuration", check)
    if refused := node.status.get("config_error"):
        return failure(f"the agent has refused the newest configuration: {refused}", "correct it", "nodeagent reload")
    if not node.has_config:
        return ok(f"there is no {node.config_file}: the defaults apply")
    node.offers()
    return ok(f"{node.config_file} is good")


def _socket(node: Node) -> Finding:
    path = node.socket
    try:
        found = path.stat()
    except FileNotFoundError:
        return skipped(f"there is no {path}")
    if not stat.S_ISSOCK(found.st_mode):
        return failure(f"{path} is not a socket", "remove it; the agent makes it again", f"rm {path}")
    if found.st_mode & 0o007:
        return failure(
            f"{path} has mode {stat.S_IMODE(found.st_mode):04o}: every user may read it and release grants",
            "restart the agent, which sets the mode",
            f"chmod o= {path}",
        )
    if missing := status_readers(node.config).missing:
        return warning(missing, "make the group and restart the agent", f"groupadd -r {node.config.status.group}")
    return ok(f"{path} has mode {stat.S_IMODE(found.st_mode):04o}")


def _metrics(node: Node) -> Finding:
    listen = node.config.metrics.listen
    if not listen:
        return skipped("metrics.listen is not set")
    address = ListenAddress.parse(listen)
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(address.host, address.host)  # noqa: S104 - what it means
    answers = node.probes.answers(host, address.port)
    if node.agent_error:
        if not answers:
            return ok(f"port {address.port} is free for the agent")
        return warning(
            f"a program listens at {address} although no agent answers",
            "end that program or choose another port",
            f"ss -ltnp 'sport = :{address.port}'",
        )
    if answers:
        return ok(f"the agent listens at {address}")
    return warning(
        f"nothing listens at {address}",
        "install the drop-in that opens TCP, and read the note in the status",
        "nodeagent status",
    )


def _boot(node: Node) -> Finding:
    text = node.kernel_text(BOOT_ID)
    if text is None:
        return failure(
            f"there is no {node.files.path(BOOT_ID)}", "mount /proc: it identifies grants of an earlier boot"
        )
    try:
        uuid.UUID(text)
    except ValueError:
        return failure(f"{node.files.path(BOOT_ID)} is {text[:60]!r}", "mount the kernel's own /proc")
    boot = node.status.get("boot_id")
    if boot is not None and boot != text:
        return failure(
            f"this boot is {text}, the agent's {boot or 'unknown'}",
            "restart the agent: it sees another /proc",
            "nodeagent status",
        )
    return ok(f"this boot is {text}")


def _some(texts: list[str]) -> str:
    more = len(texts) - MOST_NAMED
    return "; ".join(texts[:MOST_NAMED]) + (f"; and {more} more" if more > 0 else "")


# ---------------------------------------------------------------- the systemd unit


def _installed(node: Node) -> bool:
    return any(node.files.exists(f"{folder}/{UNIT}") for folder in FOLDERS)


def _state(node: Node) -> Finding:
    if not _installed(node):
        return skipped(f"there is no {UNIT} here" + (": this is a pod" if node.in_pod else ""))
    words = ("systemctl", "show", UNIT, *(f"--property={one}" for one in PROPERTIES))
    return judged(dict(line.split("=", 1) for line in node.probes.output(*words).splitlines() if "=" in line))


def judged(shown: dict[str, str]) -> Finding:
    """Return what the properties of the unit mean, as `systemctl show` prints them."""
    active, sub = shown.get("ActiveState", ""), shown.get("SubState", "")
    restarts = shown.get("NRestarts", "0")
    if shown.get("LoadState") == "masked":
        return failure(f"{UNIT} is masked", "unmask it", f"systemctl unmask {UNIT}")
    if active == "failed":
        why = f"{UNIT} has failed ({shown.get('Result', 'unknown')})"
        return failure(why, "the log says why", f"journalctl -u {UNIT} -n 50")
    if shown.get("NeedDaemonReload") == "yes":
        return warning(f"{UNIT} was changed since systemd read it", "have it read again", "systemctl daemon-reload")
    if active != "active":
        return warning(f"{UNIT} is {active or 'unknown'}", "start it", f"systemctl start {UNIT}")
    if restarts.isdigit() and int(restarts[:9]) >= MOST_RESTARTS:
        return warning(f"{UNIT} was restarted {restarts} times", "the log says why", f"journalctl -u {UNIT} -n 200")
    if shown.get("UnitFileState") == "disabled":
        return warning(f"{UNIT} runs and is not enabled", "have it start at boot", f"systemctl enable {UNIT}")
    return ok(f"{UNIT} is {active} ({sub})")


def _drop_ins(node: Node) -> Finding:
    if not _installed(node):
        return skipped(f"there is no {UNIT} here")
    there = {one for folder in FOLDERS for one in node.names(f"{folder}/{UNIT}.d")}
    missing = [one.name for one in needed(node.config) if not _has(node, one, there)]
    if missing:
        return failure(
            f"the configuration needs {', '.join(missing)}",
            "install the drop-ins; without them the unit's sandbox forbids what they open",
            *(f"install -D -m 644 systemd/{one} /etc/systemd/system/{UNIT}.d/{one}" for one in missing),
            "systemctl daemon-reload && systemctl restart nodeagent",
        )
    return ok(f"drop-ins: {', '.join(sorted(there)) or 'none, and none is needed'}")


class DropIn(NamedTuple):
    """A drop-in of the unit."""

    name: str
    opens: tuple[str, ...]
    """What it sets that the unit itself does not."""
    is_needed: Callable[[Config], object]
    """Returns whether a configuration needs it."""


DROP_INS = (
    DropIn("nodeagent-dra.conf", ("AF_INET", "plugins_registry"), lambda it: it.served_by_dra),
    DropIn("nodeagent-interrupts.conf", ("ProtectKernelTunables=false",), lambda it: it.pinning.writes_interrupts),
    DropIn("nodeagent-partitions.conf", ("CAP_SYS_ADMIN",), lambda it: it.pinning.partition != "none"),
    DropIn("nodeagent-tuning.conf", ("/sys/devices/system/cpu",), lambda it: it.pinning.tuning != TuningConfig()),
    DropIn("nodeagent-resctrl.conf", ("/sys/fs/resctrl",), lambda it: it.pinning.resctrl is not None),
    DropIn("nodeagent-metrics.conf", ("AF_INET",), lambda it: it.metrics.listen),
    DropIn("nodeagent-passthrough.conf", ("/sys/bus/pci", "/sys/devices"), lambda it: it.dra.passthrough_drivers),
    DropIn("nodeagent-dsa.conf", ("/sys/bus/dsa", "/sys/devices"), lambda it: it.accelerators.dsa),
    DropIn("nodeagent-vfs.conf", ("/sys/bus/pci", "/sys/devices"), lambda it: it.network.vfs),
    DropIn("nodeagent-vf-properties.conf", ("CAP_NET_ADMIN",), lambda it: it.network.vf_properties),
    DropIn(
        "nodeagent-interfaces.conf",
        ("CAP_NET_ADMIN", "CAP_SYS_ADMIN", "RestrictNamespaces"),
        lambda it: it.network.move_interfaces,
    ),
    DropIn("nodeagent-cni.conf", ("/run/k8s.cni.cncf.io",), lambda it: it.network.device_info_dir),
    DropIn(
        "nodeagent-amd.conf",
        ("/sys/devices", "CAP_SYS_PTRACE", "CAP_DAC_READ_SEARCH"),
        lambda it: it.amd.partitions,
    ),
    DropIn(
        "nodeagent-nvmeof.conf",
        ("/dev/nvme-fabrics", "/sys/devices/virtual/nvme-fabrics"),
        lambda it: it.targets,
    ),
)


def needed(config: Config) -> list[DropIn]:
    """Return the drop-ins that a configuration needs."""
    return [one for one in DROP_INS if one.is_needed(config)]


def _has(node: Node, one: DropIn, there: set[str]) -> bool:
    """Return whether a drop-in is there, under its name or in a file with all of its settings."""
    return one.name in there or any(_opens(node, one, file) for file in there)


def _opens(node: Node, one: DropIn, file: str) -> bool:
    texts = [node.text(f"{folder}/{UNIT}.d/{file}") or "" for folder in FOLDERS]
    return any(all(word in text for word in one.opens) for text in texts)


CHECKS = (
    Check("unit.state", "operations.md#with-systemd", _state, live=True),
    Check("unit.drop-ins", "operations.md#with-systemd", _drop_ins, configuration=True),
    Check("agent.answers", "operations.md#the-status-socket", _answers),
    Check("agent.ready", "operations.md#troubleshooting", _ready, agent=True),
    Check("agent.resources", "migrating.md#other-device-plugins", _refused, agent=True),
    Check("agent.notes", "operations.md#what-happens-when", _notes, agent=True),
    Check("agent.version", "operations.md#upgrade-and-rollback", _version, live=True, agent=True),
    Check("agent.configuration", "configuration.md#configuration", _configuration),
    Check("agent.socket", "operations.md#the-status-socket", _socket, live=True),
    Check("agent.metrics", "operations.md#metrics-over-tcp", _metrics, live=True, configuration=True),
    Check("agent.boot", "doctor.md#agent", _boot),
)

"""Network namespaces for pods in the guest: a CNI plugin that gives each sandbox its loopback and an eth0 that leads
nowhere. vmcluster's pods are on the host's network without it."""

from __future__ import annotations

from tests.vm.vmguest import Guest

CONFLIST = '{"cniVersion":"1.0.0","name":"vm","plugins":[{"type":"vmnet"}]}'
PLUGINS = "/usr/lib/cni"
"""Where Debian's containerd looks for them."""
PLUGIN = """#!/bin/sh
# Gives each sandbox its loopback, and an eth0 of its own that leads nowhere.
cat >/dev/null
[ "$CNI_COMMAND" = VERSION ] && exec echo '{"cniVersion":"1.0.0","supportedVersions":["0.3.1","1.0.0"]}'
[ "$CNI_COMMAND" = ADD ] || exit 0
inside="nsenter --net=$CNI_NETNS ip"
case $0 in
*/loopback) name=lo address=127.0.0.1/8 version=0.3.1; $inside link set lo up >&2 ;;
*) name=eth0 address=10.88.0.2/16 version=1.0.0; $inside link add eth0 type dummy >&2 &&
   $inside addr add $address dev eth0 >&2 ;;
esac || exit 1
echo '{"cniVersion":"'$version'","interfaces":[{"name":"'$name'","sandbox":"'$CNI_NETNS'"}],\
"ips":[{"version":"4","address":"'$address'","interface":0}]}'
"""


def install(guest: Guest) -> None:
    """Have sandboxes of pods that are not on the host's network made with it from now on."""
    (guest.share / "vmnet").write_text(PLUGIN)
    (guest.share / "10-vm.conflist").write_text(CONFLIST)
    guest.run(f"for one in vmnet loopback; do install -D -m 755 /share/vmnet {PLUGINS}/$one; done; modprobe dummy")
    guest.run("rm /etc/cni/net.d/*")
    guest.run("install -m 644 -t /etc/cni/net.d /share/10-vm.conflist")

"""Hugepages that the agent provides and a pod maps: on the right node, and not one more than it holds."""

from __future__ import annotations

import re

import pytest

from tests.vm import vmpods
from tests.vm.vmguest import Guest

PROGRAM = "/run/vm-pages"


@pytest.fixture(scope="module")
def program(pods_guest: Guest) -> str:
    pods_guest.run(f"gcc -static -O1 -Wall -Werror -o {PROGRAM} /share/inside/pages.c")
    return PROGRAM


@pytest.mark.parametrize(
    ("size", "shift", "node", "blocks", "pages"), [("2Mi", 21, 1, 1, 8), ("1Gi", 30, 2, 1, 1)], ids=["2Mi", "1Gi"]
)
def test_a_pod_maps_what_it_holds_on_its_node_and_is_refused_more(
    pods_guest: Guest, program: str, size: str, shift: int, node: int, blocks: int, pages: int
) -> None:
    """mmap itself says that there is no more: what was mapped is there, no process gets a SIGBUS."""
    resource = f"nodeagent.dev/hugepages-{size}"
    pods_guest.kubelet("until", resource=resource, has=[f"node{node}-{size}-0"])
    admitted = vmpods.admit(pods_guest, f"pages-{size.lower()}", {resource: blocks})
    script = f"grep Mems_allowed_list /proc/self/status; {program} {shift} {pages}; echo DONE=$?; exec sleep infinity"
    pod = vmpods.run(pods_guest, admitted, script, mounts=(program,))
    said = vmpods.first_lines(pods_guest, pod, last="DONE")
    print(f"vm: {size}: {said}")
    assert said["DONE"] == "0" and said["Mems_allowed_list"] == str(node)
    assert re.search(rf" N{node}={pages} ", f"{said['MAP']} ") and not re.search(rf" N[^{node}]=", said["MAP"])
    assert said["OVER"] == "Cannot allocate memory"
    limits = pods_guest.run(f"cat {pod.scope()}/hugetlb.{size.replace('i', 'B')}.{{max,rsvd.max}}").split()
    assert limits == [str(pages << shift)] * 2
    vmpods.remove(pods_guest, pod)


def test_a_pod_that_holds_no_pages_gets_none(pods_guest: Guest, program: str) -> None:
    pod = vmpods.run(
        pods_guest,
        vmpods.admit(pods_guest, "pageless", {}),
        f"{program} 21 1; echo DONE=$?; exec sleep infinity",
        mounts=(program,),
    )
    said = vmpods.first_lines(pods_guest, pod, last="DONE")
    assert said == {"FAILED": "Cannot allocate memory", "DONE": "1"}
    vmpods.remove(pods_guest, pod)

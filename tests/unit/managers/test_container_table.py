"""What is known of a container while the runtime describes it again and again."""

from __future__ import annotations

from nodeagent.core.model.container import CREATED, RUNNING, Container, PageLimits, Resources
from nodeagent.host.cgroup.layout import layouts
from nodeagent.managers.pinning.containers import ContainerTable

MIB2 = 2 << 20


def described(pages: int, limits: PageLimits = PageLimits.FOUND, state: str = RUNNING) -> Container:
    resources = Resources(hugepage_limits={MIB2: pages * MIB2})
    return Container(id="c", pod_id="s", pod_uid="u", name="main", state=state, resources=resources, page_limits=limits)  # type: ignore[arg-type]


def test_what_kubelet_asked_for_is_known_for_the_life_of_the_container() -> None:
    """After its creation the runtime describes it with the limits that the agent has set."""
    table = ContainerTable(layouts())
    with table.asking(described(3, PageLimits.ASKED, CREATED)):
        pass
    table.tell(described(11))
    (known,) = table.containers()
    assert (known.state, known.page_limits, known.resources.hugepage_limits) == (RUNNING, "asked", {MIB2: 3 * MIB2})
    table.tell(described(11))
    assert table.containers()[0] is known, "nothing new is no news"


def test_a_container_that_is_created_again_under_its_id_is_as_it_is_asked_for_then() -> None:
    table = ContainerTable(layouts())
    for pages, limits in ((3, PageLimits.ASKED), (5, PageLimits.COUNTED)):
        with table.asking(described(pages, limits, CREATED)):
            pass
    (known,) = table.containers()
    assert (known.page_limits, known.resources.hugepage_limits) == ("counted", {MIB2: 5 * MIB2})


def test_a_container_that_existed_before_is_as_it_is_found() -> None:
    table = ContainerTable(layouts())
    table.tell_all([described(3)])
    table.tell_all([described(11)])
    (known,) = table.containers()
    assert (known.page_limits, known.resources.hugepage_limits) == ("found", {MIB2: 11 * MIB2})

"""The page of the agent as a browser shows it: what it says, how it stays up to date, and who can use it.

Compared is the structure of the page, not its pixels."""

from __future__ import annotations

import contextlib
import statistics
from collections.abc import AsyncIterator
from pathlib import Path

from nodeagent.admin.web.events import MOST_LISTENERS, Listener
from nodeagent.core.model.cpuset import CpuSet
from nodeagent.core.model.grant import DEVICE_PLUGIN, Grant, Holder
from nodeagent.core.model.inventory import Inventory
from tests.builders.inventories import even_rows, inventory_of
from tests.builders.pictures import large_machine, many_grants, pod_grant
from tests.doubles.status_socket import StatusSocket, status_socket
from tests.integration.test_status import standing
from tests.support.running import CPU
from tests.support.until import until
from tests.support.web import web_of
from tests.web.conftest import Program
from tests.web.devtools import Page, browsing

DRAWN = "Number(document.documentElement.dataset.drawn) >= 1"
OUTLINE = """[...document.querySelectorAll('h1, h2, input, table, [role=status], [role=group]')]
    .map((one) => `${one.tagName.toLowerCase()} ${one.id || one.textContent}`)"""
STRUCTURE = [
    "h1 nodeagent",
    "p ready",
    "p live",
    "input search",
    "p found",
    "h2 machine-title",
    "div machine",
    "p detail",
    "table nodes",
    "h2 holders-title",
    "table holders",
    "h2 wrong-title",
    "h2 pinning-title",
    "h2 health-title",
]


@contextlib.asynccontextmanager
async def opened(socket: Path, chromium: Program) -> AsyncIterator[Page]:
    """The page in front of a status socket, drawn; nothing may have been logged of it in the end."""
    async with web_of(socket) as web, browsing(*chromium) as browser:
        page = await browser.page()
        await page.open(web.address)
        await page.until(DRAWN)
        yield page
        assert page.complaints() == []


@contextlib.asynccontextmanager
async def showing(
    folder: Path, chromium: Program, inventory: Inventory, *grants: Grant
) -> AsyncIterator[tuple[StatusSocket, Page]]:
    """The page of a machine with these grants."""
    socket = folder / "status.sock"
    async with status_socket(socket, StatusSocket(inventory, grants)) as shown, opened(socket, chromium) as page:
        yield shown, page


def small(*, packages: int = 1) -> Inventory:
    return inventory_of(even_rows(packages, 1, 2, 2, 2))


async def test_the_largest_machine_is_drawn_with_each_cpu_device_and_holder(folder: Path, chromium: Program) -> None:
    """256 CPUs, 64 devices and 200 grants; how long a drawing takes is printed."""
    inventory = large_machine()
    async with showing(folder, chromium, inventory, *many_grants(inventory)) as (shown, page):
        assert await page.run(OUTLINE) == STRUCTURE
        counts = {name: await page.run(f"document.querySelectorAll('{name}').length") for name in (".cpu", ".device")}
        assert counts == {".cpu": 256, ".device": 64}
        groups = "[...document.querySelectorAll('.node')].map((one) => one.querySelectorAll('.group').length)"
        assert await page.run(groups) == [4] * 4
        assert await page.run("document.getElementById('holders').tBodies[0].rows.length") == 200
        assert await page.run("document.getElementById('nodes').tBodies[0].rows.length") == 4
        times = []
        for count in range(190, 200):
            before, began_ms = await page.run("document.documentElement.dataset.drawn"), await page.busy_ms()
            shown.show(many_grants(inventory, count))
            await page.until(f"document.documentElement.dataset.drawn !== '{before}'")
            times.append(await page.busy_ms() - began_ms)
        took = f"{statistics.median(times):.1f} ms of the page's thread, at most {max(times):.1f}"
        print(f"\nweb: 256 CPUs, 64 devices, 200 grants are drawn in {took}")


async def test_a_grant_and_its_release_are_shown_without_loading_the_page_again(
    folder: Path, tmp_path: Path, chromium: Program
) -> None:
    """With a real agent and its kubelet."""
    held = "document.getElementById('holders').textContent.includes('shop/two')"
    async with standing(folder, tmp_path) as (agent, kubelet), opened(agent.socket, chromium) as page:
        assert await page.run("document.querySelectorAll('.cpu.held').length") == 2
        assert await page.run(held) is False
        await page.run("window.same = true")
        await kubelet.admit_pod("shop", "two", {"main": {CPU: 1}})
        await page.until(f"{held} && document.querySelectorAll('.cpu.held').length === 3")
        await kubelet.delete_pod("shop", "two")
        await page.until(f"!{held} && document.querySelectorAll('.cpu.held').length === 2")
        assert await page.run("window.same && document.getElementById('live').textContent") == "live"


async def test_a_holder_keeps_its_colour_when_others_go(folder: Path, chromium: Program) -> None:
    colour = "getComputedStyle(document.querySelector('[title^=\"CPU 1 \"]')).backgroundColor"
    first, second = pod_grant(1, CpuSet([0])), pod_grant(2, CpuSet([1]))
    async with showing(folder, chromium, small(), first, second) as (shown, page):
        before = await page.run(colour)
        shown.show([second])
        await page.until("document.querySelectorAll('.cpu.held').length === 1")
        assert await page.run(colour) == before


async def test_a_narrow_window_needs_no_sideways_scrolling(folder: Path, chromium: Program) -> None:
    inventory = large_machine()
    async with showing(folder, chromium, inventory, *many_grants(inventory, 40)) as (_, page):
        await page.resize(320, 640)
        assert await page.run("document.scrollingElement.scrollWidth") <= 320
        assert await page.run(
            "[...document.querySelectorAll('.part')].every((one) => one.getBoundingClientRect().right <= 320)"
        )


async def test_dark_and_light_differ_and_both_are_readable(folder: Path, chromium: Program) -> None:
    look = "(({color, backgroundColor}) => [color, backgroundColor])(getComputedStyle(document.body))"
    async with showing(folder, chromium, small(), pod_grant(1, CpuSet([0]))) as (_, page):
        shades = {}
        for scheme in ("light", "dark"):
            await page.prefer(scheme)
            shades[scheme] = [sum(map(int, one[4:-1].split(","))) for one in await page.run(look)]
        assert shades["light"][1] - shades["light"][0] > 450
        assert shades["dark"][0] - shades["dark"][1] > 450


async def test_all_can_be_done_with_the_keyboard(folder: Path, chromium: Program) -> None:
    """From part to part, everything of a holder, and the search."""
    grants = pod_grant(1, CpuSet([0, 4])), pod_grant(2, CpuSet([1]))
    focused = "document.activeElement.getAttribute('aria-label')"
    async with showing(folder, chromium, small(), *grants) as (_, page):
        for _ in range(3):  # the link past the drawing, the search, the drawing: one stop
            await page.press("Tab")
        assert await page.run(focused) == "CPU 0 on node 0: team/pod-1"
        await page.press("ArrowDown")
        assert await page.run(focused) == "CPU 4 on node 0: team/pod-1"
        await page.press("ArrowRight")
        assert await page.run(focused) == "CPU 1 on node 0: team/pod-2"
        assert await page.run("document.getElementById('detail').textContent") == "CPU 1 on node 0: team/pod-2"
        await page.press("Enter")
        assert await page.run("document.querySelectorAll('.part:not(.dimmed)').length") == 1
        assert await page.run("document.querySelectorAll('[aria-pressed=true]').length") == 1
        await page.press("Escape")
        assert await page.run("document.querySelectorAll('.dimmed').length") == 0
        await page.press("/")
        for letter in "pod-1":
            await page.press(letter)
        assert await page.run("document.getElementById('found').textContent") == "1 holder found"
        assert (
            await page.run(
                "[...document.getElementById('holders').tBodies[0].rows].filter((one) => !one.hidden).length"
            )
            == 1
        )


async def test_a_screen_reader_is_given_names_and_tables(folder: Path, chromium: Program) -> None:
    """What the browser tells it: every button, table and region has a name."""
    async with showing(folder, chromium, small(), pod_grant(1, CpuSet([0]))) as (_, page):
        tree = (await page.call("Accessibility.getFullAXTree"))["nodes"]
        seen = [(one["role"]["value"], one.get("name", {}).get("value", "")) for one in tree if not one["ignored"]]
        assert [one for one in seen if one[0] in ("button", "table", "region", "searchbox") and not one[1]] == []
        names = {name for _, name in seen}
        assert {"Machine", "Who holds what", "What is wrong", "Health of devices"} <= names
        assert ("button", "CPU 0 on node 0: team/pod-1") in seen
        assert ("columnheader", "CPUs") in seen
        assert ("searchbox", "Search pods and claims") in seen


async def test_names_are_text_whatever_they_contain(folder: Path, chromium: Program) -> None:
    evil = "<img src=x onerror=alert(1)>"
    grant = Grant(id="g", holder=Holder(api=DEVICE_PLUGIN, namespace="n", pod=evil), cpus=CpuSet([0]))
    async with showing(folder, chromium, small(), grant) as (_, page):
        assert await page.run("document.images.length + document.querySelectorAll('b').length") == 0
        assert evil in await page.run("document.getElementById('holders').textContent")
        assert "a reason <b>in markup</b>" in await page.run("document.getElementById('wrong').textContent")
        assert "no carrier on ens0f0" in await page.run("document.getElementById('health').textContent")


async def test_an_agent_that_goes_away_and_comes_back_is_noticed(folder: Path, chromium: Program) -> None:
    """What it said last stays, and says so."""
    live, socket = "document.getElementById('live').textContent", folder / "status.sock"
    async with contextlib.AsyncExitStack() as stack:
        first = await stack.enter_async_context(contextlib.AsyncExitStack())
        await first.enter_async_context(status_socket(socket, StatusSocket(small(), [])))
        web = await stack.enter_async_context(web_of(socket))
        page = await (await stack.enter_async_context(browsing(*chromium))).page()
        await page.open(web.address)
        await page.until(DRAWN)
        await first.aclose()
        await page.until(f"{live}.startsWith('the agent does not answer since')")
        assert await page.run("document.querySelectorAll('.cpu').length") == 8
        shown = StatusSocket(small(), [pod_grant(1, CpuSet([0]))])
        await stack.enter_async_context(status_socket(socket, shown))
        await page.until(f"{live} === 'live' && document.querySelectorAll('.cpu.held').length === 1")


async def test_a_page_that_finds_no_room_among_the_listeners_still_follows(folder: Path, chromium: Program) -> None:
    """It looks from time to time, and listens as soon as it can."""
    shown = StatusSocket(small(), [])
    others = [Listener(shown.events) for _ in range(MOST_LISTENERS)]
    socket = folder / "status.sock"
    async with status_socket(socket, shown), web_of(socket) as web, browsing(*chromium) as browser:
        page = await browser.page()
        await page.open(web.address)
        await page.until(DRAWN)
        shown.show([pod_grant(1, CpuSet([0]))])
        await page.until("document.querySelectorAll('.cpu.held').length === 1")
        await others[0].aclose()
        await until(lambda: len(shown.events.listeners) == MOST_LISTENERS)


async def test_a_browser_without_the_token_sees_nothing(folder: Path, chromium: Program) -> None:
    """Nor does one that comes with a token that has been used."""
    async with status_socket(folder / "status.sock", StatusSocket(small(), [])), web_of(folder / "status.sock") as web:
        async with browsing(*chromium) as browser:
            page = await browser.page()
            await page.open(web.address)
            await page.until(DRAWN)
        async with browsing(*chromium) as another:
            page = await another.page()
            for address in (f"http://{web.host}/", web.address):
                await page.open(address)
                await page.until("document.body && document.body.textContent.includes('cannot show')")
                assert await page.run("document.querySelectorAll('.part').length") == 0

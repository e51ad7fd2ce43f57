"""docs/operations.md names what there is: the events of the log, the words of messages, the status socket's pages, the
files, and the defaults of releases."""

from __future__ import annotations

import re
from collections.abc import Iterator

import pytest

from nodeagent.admin.status import Status
from nodeagent.core.events.happenings import RULES
from nodeagent.core.ledger.release import Patience
from nodeagent.state import leader, store
from tests.rules.test_docs_dra import DOCS, codes, rows, said, section
from tests.support.paths import CHECKOUT

NAME = "operations.md"
ELSEWHERE = {"Insufficient nodeagent.dev", "nodeagent config check", "cannot save"}
"""Words of the scheduler, of a command, and of a message whose verb is filled in."""
NO_EVENTS = {"system-node-critical", "device-plugin", "other-plugin"}
FILLED = re.compile(
    r"…|\b[A-Z]{2,}\b|\b[NMX]\b|\bcpu3\b|\b\d\S*|\S*\.com/\S*|/|'|, and |: |\(|cpu(?:ManagerPolicy|_manager_state)"
)
"""What stands for something that differs each time."""
SHORTEST_WORDS = 6


def test_every_event_of_the_log_is_one_that_is_logged() -> None:
    text = re.sub(r"^```.*?^```$", "", (DOCS / NAME).read_text(), flags=re.M | re.S)
    events = {one for one in codes(text) if re.fullmatch(r"[a-z]+(-[a-z]+)+", one)} - NO_EVENTS
    assert len(events) > 8
    assert not events - said()


def messages() -> Iterator[str]:
    for title, head in (("Reading a refusal", "what it says"), ("What the agent knows of kubelet", "note")):
        for cells in rows(section(title, NAME), head):
            yield from (one for one in codes(cells[0]) if " " in one)


@pytest.mark.parametrize("message", tuple(messages()))
def test_the_words_of_every_message_that_is_explained_are_said(message: str) -> None:
    parts = (one.strip(" :;(),.") for one in FILLED.split(message))
    words = [one for one in parts if len(one) >= SHORTEST_WORDS and one not in ELSEWHERE]
    assert not [one for one in words if not any(one in text for text in said())]


def test_every_page_of_the_status_socket_is_in_the_table_and_no_other() -> None:
    named = {codes(cells[0])[0] for cells in rows(section("The status socket", NAME), "request")}
    pages = {one.removeprefix("GET ") for one in named if one.startswith("GET ")}
    assert pages == set(Status(watched=None, metrics=None)._pages())  # type: ignore[arg-type]


def test_every_event_is_in_the_table_with_its_type() -> None:
    """Each reason once."""
    cells = rows(section("Events", NAME), "reason")
    found = [(reason, one[1]) for one in cells for reason in codes(one[0])]
    assert sorted(found) == sorted((one, "Warning" if rule.warns else "Normal") for one, rule in RULES.items())


def test_the_files_of_the_state_folder_are_called_so() -> None:
    text = (DOCS / NAME).read_text()
    assert all(f"`{one}`" in text for one in (leader.LOCK, store.LOCK))
    assert f"`{store.FILE}.damaged-…`" in text


def test_the_times_of_releases_are_what_the_configuration_says() -> None:
    table = (DOCS / "configuration.md").read_text()
    example = (CHECKOUT / "systemd" / "config.example.yaml").read_text()
    patience = Patience()
    for key, seconds in (
        ("confirmedSeconds", patience.confirmed_s),
        ("unconfirmedSeconds", patience.unconfirmed_s),
        ("unobservedSeconds", patience.unobserved_s),
    ):
        assert re.search(rf"^\| `release\.{key}` \| {seconds:g} \|", table, re.M), key
        assert f"  {key}: {seconds:g} " in example

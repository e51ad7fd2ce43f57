"""The files of the page: complete, from the agent alone, and not in the memory of one whose page no browser opens."""

from __future__ import annotations

import re
import subprocess
import sys

import pytest

from nodeagent.admin.web.headers import STRICT
from nodeagent.admin.web.page import asset


@pytest.mark.parametrize(
    ("path", "kind"),
    [("/", "text/html"), ("/page.js", "text/javascript"), ("/page.css", "text/css"), ("/icon.svg", "image/svg+xml")],
)
def test_each_file_is_served_with_its_type_and_strict_headers(path: str, kind: str) -> None:
    answer = asset(path)
    assert (answer.status, answer.content_type.partition(";")[0], answer.headers) == (200, kind, STRICT)
    assert answer.body


def test_the_page_names_no_file_that_is_not_served_and_nothing_from_elsewhere() -> None:
    html = asset("/").body.decode()
    for name in re.findall(r'(?:src|href)="(?!#)([^"]*)"', html):
        assert asset(f"/{name}").body
    everything = html + asset("/page.js").body.decode() + asset("/page.css").body.decode()
    assert not re.search(r"https?://|//[a-z]+\.|@import|url\(", everything.replace("// ", ""))


def test_the_page_makes_no_html_of_text_and_changes_nothing() -> None:
    script = asset("/page.js").body.decode()
    assert not re.search(
        r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\(|new Function|method:", script
    )
    assert not re.search(r"<script>|\son[a-z]+=|style=", asset("/").body.decode()), "its own policy would forbid it"


def test_an_agent_whose_page_nobody_opens_has_nothing_of_it_in_memory() -> None:
    loaded = "[one for one in sys.modules if 'admin.web' in one or 'picture' in one]"
    code = f"import sys, nodeagent.daemon.daemon; print({loaded})"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"

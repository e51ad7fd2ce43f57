"""The reader of commands in docs/."""

from __future__ import annotations

from tests.support.doc_blocks import matches, rewritten, steps

PAGE = """\
Text.

```console
$ nodeagent place --cpus 1 --root machines/1s1n4c
WHAT   WHERE
cpus   0
$ nodeagent config schema
any
```

```
$ nodeagent map --root machines/1s1n4c
```

```console agent
$ nodeagent wait
ready
```
"""


def test_only_blocks_that_say_so_are_run() -> None:
    found = [(one.command, one.output, one.line, one.of_agent) for one in steps(PAGE)]
    assert found == [
        ("nodeagent place --cpus 1 --root machines/1s1n4c", "WHAT   WHERE\ncpus   0", 4, False),
        ("nodeagent wait", "ready", 16, True),
    ]


def test_what_differs_each_time_is_not_compared() -> None:
    page = "GRANT          AGE\ng-0123456789   5s\nnodeagent 0.1.0, up 7.5 s, ready"
    assert matches(page, "GRANT   AGE\ng-abcdef0123   12s\nnodeagent 0.2.0, up 90.1 s, ready\n")
    assert not matches(page, page.replace("ready", "NOT ready"))
    assert not matches("cpus 0-3", "cpus 0-4")


def test_three_dots_stand_for_any_lines() -> None:
    assert matches("a\n...\nd", "a\nb\nc\nd") and matches("a\n...", "a\nb\nc")
    assert not matches("a\n...\nd", "a\nb\nc") and not matches("a\n...", "b\nc")


def test_a_page_is_written_again() -> None:
    now = rewritten(PAGE, lambda step: f"of {step.command.split()[1]}\n")
    assert "$ nodeagent place --cpus 1 --root machines/1s1n4c\nof place\n$ nodeagent config schema\nany\n" in now
    assert "```console agent\n$ nodeagent wait\nof wait\n```\n" in now
    assert rewritten(now, lambda step: f"of {step.command.split()[1]}\n") == now

"""`nodeagent map` as an admin calls it: of files, of a captured tree, and of what an agent knows."""

from __future__ import annotations

import argparse
import json
import os
import pty
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from nodeagent.admin.status import grant_document
from nodeagent.cli.agent import map as map_of
from nodeagent.cli.shared.facts import Facts
from nodeagent.core.model.inventory_json import to_document
from tests.builders.pictures import large_machine, many_grants

WORDS = [sys.executable, "-m", "nodeagent", "map"]


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """The options that name the large machine and its grants."""
    folder = tmp_path_factory.mktemp("machine")
    inventory = large_machine()
    (folder / "inventory.json").write_text(json.dumps(to_document(inventory)))
    (folder / "grants.json").write_text(json.dumps([grant_document(one) for one in many_grants(inventory, 20)]))
    return ["--inventory", str(folder / "inventory.json"), "--state", str(folder / "grants.json")]


def run(*words: str, columns: int = 80) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, "COLUMNS": str(columns)}
    return subprocess.run([*WORDS, *words], capture_output=True, text=True, check=False, env=env, timeout=60)


def test_a_file_shows_letters_and_a_legend_where_there_is_no_terminal(files: list[str]) -> None:
    done = run(*files)
    assert (done.returncode, done.stderr) == (0, "")
    assert "\x1b" not in done.stdout
    assert "A claim team/claim-0: CPUs 0, 0000:11:00.0, 1 page of 1Gi on node 0" in done.stdout
    assert max(map(len, done.stdout.splitlines())) <= 80


def test_a_terminal_of_20_columns_gets_no_wider_line(files: list[str]) -> None:
    done = run(*files, columns=20)
    assert done.returncode == 0
    assert max(map(len, done.stdout.splitlines())) <= 20


def on_a_terminal(*words: str, **env: str) -> str:
    """What is written to a terminal of 80 columns."""
    ours, theirs = pty.openpty()
    child = subprocess.Popen(
        [*WORDS, *words],
        stdout=theirs,
        stderr=theirs,
        env={**os.environ, "TERM": "xterm-256color", "COLUMNS": "80", **env},
    )
    os.close(theirs)
    shown = b""
    try:
        while data := os.read(ours, 1 << 16):
            shown += data
    except OSError:  # Linux reports the end of a terminal as an error
        pass
    assert child.wait(60) == 0
    return shown.decode()


def test_a_terminal_shows_the_holders_in_colours_and_no_color_is_respected(files: list[str]) -> None:
    """With the same text in all three."""
    coloured, bare = on_a_terminal(*files), on_a_terminal(*files, NO_COLOR="1")
    assert "\x1b[" in coloured and "\x1b" not in bare
    assert "\x1b" not in on_a_terminal(*files, TERM="dumb")
    assert bare.replace("\r", "") == run(*files).stdout


def test_a_placement_on_trial_is_drawn_where_place_would_put_it(files: list[str]) -> None:
    request = ["--cpus", "16", "--devices", "gpu=1", "--option", "full-pcpus-only"]
    placed = subprocess.run(
        [sys.executable, "-m", "nodeagent", "place", *files, *request, "-o", "json"], capture_output=True, check=True
    )
    where = json.loads(placed.stdout)
    drawn = json.loads(run(*files, "--place", *request, "-o", "json").stdout)
    assert drawn["cpus"]["placed"] == where["cpus"] != ""
    assert (drawn["holders"][-1]["letter"], drawn["holders"][-1]["devices"]) == ("*", where["devices"])
    assert "* would be placed here: CPUs " in run(*files, "--place", *request).stdout


def test_a_request_that_does_not_fit_is_refused_with_the_reason_and_draws_nothing(files: list[str]) -> None:
    done = run(*files, "--place", "--cpus", "250")
    assert (done.returncode, done.stdout) == (3, "refused: " + done.stdout.removeprefix("refused: "))
    assert len(done.stdout.splitlines()) == 1


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--cpus", "4"], "cannot use --cpus without --place"),
        (["--option", "full-pcpus-only"], "cannot use --option without --place"),
        (["--place"], "cannot use --place: expected a request, such as --cpus 8"),
        (["--place", "--cpus", "x"], "cannot use --cpus 'x'"),
        (["--root", "/"], "cannot use --inventory and --root together"),
        (["--reserved", "5000"], "this machine can have CPUs"),
    ],
)
def test_bad_input_is_one_clear_line(files: list[str], words: list[str], said: str) -> None:
    done = run(*files, *words)
    assert (done.returncode, done.stdout) == (2, "")
    assert said in done.stderr and len(done.stderr.splitlines()) == 1


def test_options_that_an_agent_answers_itself_are_refused_where_one_is_asked() -> None:
    done = run("--state", "x")
    assert (done.returncode, done.stderr) == (
        2,
        "nodeagent: cannot use --state without --root or --inventory: the agent knows it\n",
    )


def test_an_agent_that_does_not_answer_is_one_clear_line(tmp_path: Path) -> None:
    done = run("--socket", str(tmp_path / "none"))
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith("nodeagent: cannot ask the agent at ") and len(done.stderr.splitlines()) == 1


def test_a_captured_tree_is_drawn(recorded_tree: Callable[[str], Path]) -> None:
    done = run("--root", str(recorded_tree("40intel64-2g2n4c+pcilocality")), "--reserved", "0-1")
    assert (done.returncode, done.stderr) == (0, "")
    assert "40 CPUs: 38 free, 2 reserved" in done.stdout and "nic . 0000:43:00.0 (ib0)" in done.stdout


def test_facts_of_an_agent_or_of_a_capture_draw_the_same(files: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    """As files with the same content; the health of devices comes in addition."""
    inventory = large_machine()
    pages: Mapping[str, Any] = {
        "/v1/inventory": to_document(inventory),
        "/v1/grants": [grant_document(one) for one in many_grants(inventory, 20)],
        "/v1/status": {"inventory": {"cpus_reserved": "250-251"}},
        "/v1/health": [],
    }
    parser = argparse.ArgumentParser()
    map_of.add_arguments(parser)
    args = parser.parse_args(["-o", "json"])
    args.facts = Facts(page=pages.__getitem__, root="/", state_dir=Path("/none"), now_s=0.0)
    assert map_of.run(args) == 0
    known = json.loads(capsys.readouterr().out)
    assert known == json.loads(run(*files, "--reserved", "250-251", "-o", "json").stdout)
    ill = [{"device": "0000:11:00.0", "state": "unhealthy", "reason": "no carrier", "causes": []}]
    args.facts = Facts(page={**pages, "/v1/health": ill}.__getitem__, root="/", state_dir=Path("/none"), now_s=0.0)
    map_of.run(args)
    assert '"reason": "no carrier"' in capsys.readouterr().out

"""`nodeagent replay`: the same answers elsewhere, and nothing but them from a file that is not what it should be."""

from __future__ import annotations

import contextlib
import io
import json
import os
import random
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest
import zstandard

from nodeagent.cli import main
from nodeagent.cli.node.replay import unpack
from nodeagent.cli.shared.capture_format import FORMAT
from nodeagent.state.store import Store
from tests.builders import machines, tables
from tests.builders.node_captures import capture, facts_of_tree, manifest, member, packed
from tests.support.long_form import LONG
from tests.unit.state.test_store import granted

SOME = ("256ppc-8n8s4t", "40intel64-2g2n4c+pcilocality", "fakeheteromemtiers", "20s390-2g6s4c", "memorysidecaches")

RECORDED = tables.names(answered=False) if LONG else SOME


@pytest.fixture(name="temporary")
def _temporary(
    folder: Path, monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Path]:
    """Where temporary folders are made; nothing is left there. Pytest's own are elsewhere."""
    tmp_path_factory.getbasetemp()
    made = folder / "tmp"
    made.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(made))
    yield made
    assert [*made.glob("nodeagent*")] == []


def said(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, str, str]:
    capsys.readouterr()
    code = main(words)
    out, err = capsys.readouterr()
    return code, out, err


@pytest.mark.parametrize("name", RECORDED)
def test_a_replayed_machine_gives_the_same_answers(
    name: str, recorded_tree: Callable[[str], Path], temporary: Path, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Bit for bit, also what is refused and what is warned of."""
    root = recorded_tree(name)
    file = str(capture(folder / "c.tar.zst", root))
    asked = (["inventory"], ["inventory", "-o", "json"], ["place", "--cpus", "3"], ["place", "--cpus", "4000"])
    for verb, *words in asked:
        assert said(capsys, "replay", file, verb, *words) == said(capsys, verb, "--root", str(root), *words)
    # The tree in it is complete: scanned again, it is the same machine.
    with facts_of_tree(folder, root) as facts:
        again = said(capsys, "inventory", "--root", facts.root, "-o", "json")[1]
    assert json.loads(again.replace(facts.root, str(root))) == json.loads(
        said(capsys, "inventory", "--root", str(root), "-o", "json")[1]
    )


def test_the_history_is_that_of_the_moment_of_the_capture(
    temporary: Path, folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the node's time zone; what the agent decides later is not in it."""
    root = machines.machine(folder / "root", "1s1n4c")
    monkeypatch.setenv("TZ", "CET-1CEST,M3.5.0,M10.5.0/3")
    with contextlib.closing(Store(folder / "state")) as store:
        store.save(granted(1), op="a", at=1e9)
        time.tzset()
        live = said(capsys, "history", "--state-dir", str(folder / "state"))
        file = str(capture(folder / "c.tar.zst", root, state=folder / "state"))
        store.save(granted(2), op="b", at=1e9 + 1)
    monkeypatch.setenv("TZ", "UTC")
    time.tzset()
    assert "03:46:40 CEST" in live[1]
    assert said(capsys, "replay", file, "history") == live
    assert os.environ["TZ"] == "UTC"


def test_a_captured_tree_can_be_replayed_for_what_needs_no_agent(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Also where its folder has one of its own name in it, as in an archive."""
    root = machines.machine(folder / "archive" / "root", "1s2n4c")
    for tree in (root, root.parent):
        code, out, _ = said(capsys, "replay", str(tree), "place", "--cpus", "2", "-o", "json")
        assert (code, json.loads(out)["cpus"]) == (0, "0-1")
    code, _, err = said(capsys, "replay", str(root), "grants")
    assert (code, err) == (1, f"nodeagent: cannot read /v1/grants of {root}: it is a captured tree without an agent\n")
    assert said(capsys, "replay", str(folder), "inventory")[0] == 2


# ---------------------------------------------------------------- what cannot be replayed


@pytest.mark.parametrize(
    ("words", "error"),
    [
        (["run"], "cannot replay run: expected one of "),
        (["maps"], "cannot replay maps: expected one of "),
        (["inventory", "--root", "/"], "cannot use --root with a capture: it is of one node at one moment"),
        (["status", "--socket", "/x"], "cannot use --socket with a capture"),
        (["status", "--watch"], "cannot use --watch with a capture"),
        (["history", "--state-dir", "/x"], "cannot use --state-dir with a capture"),
        (["health", "clear", "gpu0"], "cannot clear the health of gpu0: a capture is only read"),
    ],
)
def test_what_is_not_of_a_capture_is_refused(
    words: Sequence[str], error: str, temporary: Path, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = str(capture(folder / "c.tar.zst", machines.machine(folder / "root", "1s1n4c")))
    code, out, err = said(capsys, "replay", file, *words)
    assert (code, out) == (2, "") and err.startswith(f"nodeagent: {error}") and err.count("\n") == 1


def bomb() -> bytes:
    return packed(*((f"tree/sys/{number}", bytes(60 << 20)) for number in range(3)))


def garbage() -> bytes:
    return random.Random(1).randbytes(10_000)


def sparse(name: str) -> tarfile.TarInfo:
    """A file of 1 MiB without any content (GNU's sparse format 0.1)."""
    one = tarfile.TarInfo(name)
    one.pax_headers = {"GNU.sparse.map": "0,0", "GNU.sparse.size": str(1 << 20)}
    return one


OUT = "../../../escaped"
BAD = {
    "no archive": (garbage(), "it is no capture, or"),
    "empty": (b"", "it is no capture, or"),
    "a tar without compression": (zstandard.ZstdDecompressor().decompress(packed()), "it is no capture, or"),
    "compressed text": (zstandard.ZstdCompressor().compress(b"hello" * 1000), "it is no capture"),
    "another archive": (packed(first=b"{}"), "cannot read its manifest.json"),
    "a newer one": (packed(first=manifest(0, format=FORMAT + 1, nodeagent="9.9")), "nodeagent 9.9 made it in format 2"),
    "newer and unreadable": (packed(first=b'{"format": 7, "at_s": "now"}'), "a newer nodeagent made it in format 7"),
    "absolute": (packed(("/escaped", b"x")), "'/escaped' is no path below it"),
    "upwards": (packed((OUT, b"x")), f"'{OUT}' is no path below it"),
    "upwards in the tree": (packed((f"tree/sys/{OUT}", b"x")), f"'tree/sys/{OUT}' is no path below it"),
    "a link out": (packed(member("tree/sys", tarfile.SYMTYPE, "/etc")), "'tree/sys' is a link out of the tree"),
    "a link up": (packed(member("tree/sys", tarfile.SYMTYPE, "../../x")), "'tree/sys' is a link out of the tree"),
    "a link elsewhere": (packed(member("state", tarfile.SYMTYPE, "tree")), "'state' is a link out of the tree"),
    "through a link": (
        packed(member("tree/a", tarfile.SYMTYPE, "b"), ("tree/a/c", b"x")),
        "'tree/a/c' leads through 'tree/a'",
    ),
    "over a link": (
        packed(member("tree/a", tarfile.SYMTYPE, "b"), ("tree/a", b"x")),
        "'tree/a' leads through 'tree/a'",
    ),
    "a link out through another": (
        packed(
            ("tree/d/x", b""),
            member("tree/a/b/c", tarfile.SYMTYPE, "../../d"),
            member("tree/e", tarfile.SYMTYPE, "a/b/c/../../x"),
        ),
        "'tree/e' is a link out of the tree, to 'a/b/c/../../x'",
    ),
    "a dot in a name": (packed(("tree/./a", b"x")), "'tree/./a' is no path below it"),
    "a sparse file": (packed(sparse("tree/a")), "'tree/a' is a sparse file"),
    "over a file": (packed(("tree/a", b"x"), ("tree/a", b"y")), "'tree/a' is there twice"),
    "below a file": (packed(("tree/a", b"x"), ("tree/a/b", b"y")), "'tree/a/b' leads through 'tree/a'"),
    "a hard link": (packed(member("tree/a", tarfile.LNKTYPE, "/etc/passwd")), "'tree/a' is neither a file nor"),
    "a device": (packed(member("tree/dev/sda", tarfile.BLKTYPE)), "'tree/dev/sda' is neither a file nor"),
    "a pipe": (packed(member("tree/a", tarfile.FIFOTYPE)), "'tree/a' is neither a file nor"),
    "more than it says": (packed(("a", b""), ("b", b""), first=manifest(1)), "it has more than the 1 members"),
    "less than it says": (packed(("a", b""), first=manifest(2)), "it is truncated: 1 of 2 members are there"),
    "a bomb": (bomb(), "it contains more than 400 times its own size"),
    "without a machine": (packed(("a", b"")), "it has no inventory.json"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_capture_is_refused_in_one_line_and_nothing_is_written_elsewhere(
    name: str, temporary: Path, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    content, why = BAD[name]
    file = folder / "c.tar.zst"
    file.write_bytes(content)
    before = sorted(str(one) for one in folder.rglob("*"))
    code, out, err = said(capsys, "replay", str(file), "inventory")
    assert (code, out) == (2, "") and err.startswith(f"nodeagent: cannot replay {file}: {why}"), err
    assert err.count("\n") == 1
    assert sorted(str(one) for one in folder.rglob("*")) == before and not Path("/escaped").exists()


@pytest.mark.parametrize(
    ("page", "said_of_it"),
    [
        (b"{}", "cannot replay FILE: its pages are not those of an agent (KeyError"),
        (b"[" * 100_000, "cannot read /v1/status of FILE: maximum recursion depth exceeded"),
        (b'{"version": "\\u001b[31m1"}', "cannot replay FILE: its pages are not those of an agent (KeyError"),
    ],
)
def test_pages_that_are_not_those_of_an_agent_are_one_line(
    page: bytes, said_of_it: str, temporary: Path, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = folder / "c.tar.zst"
    file.write_bytes(packed(("inventory.json", b"{}"), ("pages/v1/status.json", page)))
    code, out, err = said(capsys, "replay", str(file), "status")
    assert code == 2 and err.startswith(f"nodeagent: {said_of_it.replace('FILE', str(file))}"), err
    assert "\x1b" not in out + err and err.count("\n") == 1


def test_a_capture_that_is_cut_off_anywhere_is_refused(
    temporary: Path, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = capture(folder / "c.tar.zst", machines.machine(folder / "root", "1s1n4c")).read_bytes()
    cut = folder / "cut.tar.zst"
    for end in random.Random(2).sample(range(len(whole)), 25):
        cut.write_bytes(whole[:end])
        code, out, err = said(capsys, "replay", str(cut), "inventory")
        assert (code, out, err.count("\n")) == (2, "", 1), (end, err)


def test_a_capture_with_a_changed_byte_is_refused_or_replayed(
    temporary: Path, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Never a traceback."""
    whole = bytearray(capture(folder / "c.tar.zst", machines.machine(folder / "root", "1s1n4c")).read_bytes())
    drawn, changed = random.Random(3), folder / "changed.tar.zst"
    for _ in range(25):
        one = bytearray(whole)
        one[drawn.randrange(len(one))] ^= 1 << drawn.randrange(8)
        changed.write_bytes(one)
        assert said(capsys, "replay", str(changed), "inventory")[0] in (0, 2)


def test_what_is_too_large_is_refused_while_it_is_read(
    temporary: Path, folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    file = folder / "c.tar.zst"
    for limit, value, why in (
        ("MOST_PACKED_BYTES", 10, "it is larger than "),
        ("MOST_BYTES", 1000, "it contains more than "),
        ("MOST_FILE_BYTES", 10, "'a' is larger than "),
        ("MOST_MEMBERS", 0, "it has more than "),
    ):
        file.write_bytes(packed(("a", b"x" * 100)))
        with monkeypatch.context() as patch:
            patch.setattr(unpack, limit, value)
            code, _, err = said(capsys, "replay", str(file), "inventory")
        assert code == 2 and why in err, err


def test_a_file_that_is_not_there_is_an_error(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = folder / "none"
    assert said(capsys, "replay", str(file), "inventory") == (
        2, "", f"nodeagent: cannot replay {file}: No such file or directory\n",
    )  # fmt: skip


def test_a_member_of_a_newer_build_does_no_harm(
    temporary: Path, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """New members and new fields of the manifest are ignored."""
    whole = capture(folder / "c.tar.zst", machines.machine(folder / "root", "1s1n4c"))
    with tarfile.open(fileobj=io.BytesIO(zstandard.ZstdDecompressor().stream_reader(whole.read_bytes()).read())) as tar:
        every = [(one.name, tar.extractfile(one).read()) for one in tar.getmembers()[1:] if one.isfile()]  # type: ignore[union-attr]
    (folder / "newer.tar.zst").write_bytes(
        packed(*every, ("news/x", b"?"), first=manifest(len(every) + 1, later=[1], missing={}))
    )
    assert said(capsys, "replay", str(folder / "newer.tar.zst"), "inventory")[0] == 0

"""`nodeagent history`: what happened to whom, and who held what at a moment."""

from __future__ import annotations

import contextlib
import json
import random
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec.structs import replace

from nodeagent.cli import main
from nodeagent.cli.shared.moments import local, moment, rfc3339
from nodeagent.core.ledger.ledger import ADOPTED, CONFIRMED, GRANTED, REDUCED, RELEASED, Change
from nodeagent.core.model.cpuset import CpuSet
from nodeagent.core.model.grant import CLAIM, DEVICE_PLUGIN, Grant, Holder
from nodeagent.errors import InputError
from nodeagent.state.audit import Happening, Refusal
from nodeagent.state.store import Store
from tests.support.long_form import share_of

DAY_S = 86400.0
MADE_S = 1_732_795_927.0
"""2024-11-28 12:12:07 UTC."""
UNNAMED = Holder(api=DEVICE_PLUGIN, resource="nodeagent.dev/cpu")
REFUSAL = Refusal(holder="claim ml/c of train, other", want="n/numa0 (cpu=2), gpu0", why="cannot prepare claim: 1 free")


@pytest.fixture(autouse=True)
def _in_berlin(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("TZ", "CET-1CEST,M3.5.0,M10.5.0/3")
    time.tzset()
    yield
    monkeypatch.undo()
    time.tzset()


def holder(pod: str, container: str = "main") -> Holder:
    return replace(UNNAMED, namespace="ns", pod=pod, container=container)


def cpus(one: str, *ids: int, of: Holder = UNNAMED, at: float = MADE_S) -> Grant:
    """A grant of CPUs; its ids are theirs."""
    return Grant(id=one, holder=of, cpus=CpuSet(ids), ids=tuple(f"cpu{cpu}" for cpu in ids), granted_at=at)


def claimed(name: str, *devices: str, pod_claim: str = "") -> Grant:
    whose = Holder(api=CLAIM, resource="gpu.x", namespace="ml", claim=name, uid=f"uid-{name}", pod_claim=pod_claim)
    return Grant(id=f"uid-{name}-0", holder=whose, devices=devices, granted_at=MADE_S, pods=("uid-of-pod",))


def save(store: Store, action: str, grant: Grant, at: float, why: str = "") -> None:
    store.save([Change(action=action, grant=grant, why=why)], op="op", at=at)  # type: ignore[arg-type]


@pytest.fixture(name="ledger")
def _ledger(folder: Path) -> Iterator[Path]:
    """A day of a node; its ledger is in use."""
    with contextlib.closing(Store(folder)) as store:
        grant = cpus("g-1", 7, 8)
        save(store, GRANTED, grant, MADE_S)
        save(store, CONFIRMED, replace(grant, holder=holder("book", "engine")), MADE_S + 5)
        store.record_refusals([REFUSAL], op="op2", at=MADE_S + 60)
        save(store, GRANTED, claimed("train-gpus-x7k2p", "gpu0", pod_claim="gpus"), MADE_S + 120)
        gone = replace(grant, holder=holder("book", "engine"))
        save(store, RELEASED, gone, MADE_S + 3600, "an admin released it")
        save(store, GRANTED, cpus("g-2", 7, of=holder("next"), at=MADE_S + 7200), MADE_S + 7200)
        yield folder


def asked(capsys: pytest.CaptureFixture[str], folder: Path, *words: str) -> list[str]:
    assert main(["history", "--state-dir", str(folder), *words]) == 0
    return capsys.readouterr().out.splitlines()


def documents(capsys: pytest.CaptureFixture[str], folder: Path, *words: str) -> list[dict[str, object]]:
    return [json.loads(line) for line in asked(capsys, folder, "-o", "jsonl", *words)]


# ---------------------------------------------------------------- what happened


def test_people_see_local_time_with_its_zone_and_the_newest_last(
    ledger: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = asked(capsys, ledger)
    assert lines[0].split() == ["TIME", "ACTION", "HOLDER", "WHAT", "WHY", "GRANT"]
    assert lines[1].startswith("2024-11-28 13:12:07 CET   granted     a container not yet listed (nodeagent.dev/cpu)")
    assert [line.split()[3] for line in lines[1:]] == [
        "granted", "confirmed", "refused", "granted", "released", "granted",
    ]  # fmt: skip
    assert [line.split() for line in asked(capsys, ledger, "--last", "1")[1:]] == [lines[-1].split()]


def test_every_line_of_json_has_the_same_fields_in_utc(ledger: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A SIEM need not know which entries have which fields; as a list it is the same."""
    found = documents(capsys, ledger)
    assert len({tuple(one) for one in found}) == 1
    assert found[4] == {
        "time": "2024-11-28T13:12:07.000Z", "first_time": "2024-11-28T13:12:07.000Z", "times": 1,
        "action": "released", "holder": "ns/book/engine", "what": "CPUs 7-8", "why": "an admin released it", "op": "op",
        "grant": "g-1", "api": "device-plugin", "resource": "nodeagent.dev/cpu", "namespace": "ns", "pod": "book",
        "container": "engine", "claim": "", "uid": "", "pod_uids": [], "cpus": "7-8", "hugepages": [], "memory": [],
        "devices": [],
    }  # fmt: skip
    assert json.loads("\n".join(asked(capsys, ledger, "-o", "json"))) == found


@pytest.mark.parametrize(
    ("words", "actions"),
    [
        (["--pod", "ns/book"], "confirmed released"),
        (["--pod", "ns/boo"], ""),
        (["--pod", "ml/train"], "refused granted"),
        (["--pod", "ml/other"], "refused"),
        (["--pod", "uid-of-pod"], "granted"),
        (["--claim", "ml/train-gpus-x7k2p"], "granted"),
        (["--claim", "uid-train-gpus-x7k2p"], "granted"),
        (["--claim", "ml/c"], "refused"),
        (["--cpu", "7"], "granted confirmed released granted"),
        (["--cpu", "8-20"], "granted confirmed released"),
        (["--device", "gpu0"], "refused granted"),
        (["--device", "cpu8"], "granted confirmed released"),
        (["--since", "2024-11-28 14:00"], "released granted"),
        (["--since", "2024-11-28T13:00:00Z", "--until", "2024-11-28 14:30"], "released"),
        (["--until", "2024-11-28 13:12:10"], "granted"),
        (["--cpu", "7", "--until", "2024-11-28 13:20"], "granted confirmed"),
    ],
)
def test_what_is_shown_is_what_was_asked_for(
    words: Sequence[str], actions: str, ledger: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert [one["action"] for one in documents(capsys, ledger, *words)] == actions.split()


def test_refusals_that_are_counted_together_are_one_entry_of_their_whole_time(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with contextlib.closing(Store(folder)) as store:
        for second in range(3):
            store.record_refusals([REFUSAL], op="op", at=MADE_S + second)
    (one,) = documents(capsys, folder)
    assert (one["times"], one["first_time"], one["time"]) == (3, rfc3339(MADE_S), rfc3339(MADE_S + 2))
    assert "refused (3 times)" in asked(capsys, folder)[1]


def test_health_and_configuration_are_part_of_it(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with contextlib.closing(Store(folder)) as store:
        store.record_happenings([Happening(action="health", what="gpu0 unhealthy", why="Xid 79")], at=MADE_S)
        store.record_happenings([Happening(action="configuration", what="applied: auditDays: 3 -> 4")], at=MADE_S + 1)
    assert [one["what"] for one in documents(capsys, folder)] == ["gpu0 unhealthy", "applied: auditDays: 3 -> 4"]
    (one,) = documents(capsys, folder, "--device", "gpu0")
    assert (one["action"], one["why"], one["grant"]) == ("health", "Xid 79", "")
    assert documents(capsys, folder, "--pod", "ns/book") == documents(capsys, folder, "--cpu", "7") == []


def test_drifts_are_part_of_it_and_of_what_concerns_their_pod(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    wrong = "cpuset.cpus: '6', not '4-5'"
    drifts = [
        Happening(action="drift", what=f"{whose}: {wrong}", why="repaired")
        for whose in ("ns/book/engine", "pod ns/book", "ns/book2/engine", "pod uid-7")
    ]
    with contextlib.closing(Store(folder)) as store:
        for second in range(2):
            store.record_happenings(drifts, at=MADE_S + second)
    found = documents(capsys, folder)
    assert [(one["action"], one["times"], one["why"]) for one in found] == [("drift", 2, "repaired")] * 4
    assert [one["what"] for one in documents(capsys, folder, "--pod", "ns/book")] == [one.what for one in drifts[:2]]
    assert [one["what"] for one in documents(capsys, folder, "--pod", "uid-7")] == [drifts[3].what]
    for words in (["--pod", "ns/boo"], ["--cpu", "6"], ["--device", "gpu0"], ["--claim", "ns/book"]):
        assert documents(capsys, folder, *words) == []


# ---------------------------------------------------------------- who held it


@pytest.mark.parametrize(
    ("words", "answer"),
    [
        (
            ["--cpu", "7", "--at", "2024-11-28 13:30"],
            "CPU 7 at 2024-11-28 13:30:00 CET: ns/book/engine held CPUs 7-8 since 2024-11-28 13:12:07 CET until "
            "2024-11-28 14:12:07 CET (released: an admin released it); grant g-1",
        ),
        (
            ["--cpu", "7", "--at", "2024-11-28 13:12:08"],
            "CPU 7 at 2024-11-28 13:12:08 CET: ns/book/engine held CPUs 7-8 since 2024-11-28 13:12:07 CET until "
            "2024-11-28 14:12:07 CET (released: an admin released it); grant g-1",
        ),
        (
            ["--cpu", "7", "--at", "2024-11-28 15:00"],
            "CPU 7 at 2024-11-28 15:00:00 CET: no grant held it; before: ns/book/engine until 2024-11-28 14:12:07 CET; "
            "after: ns/next/main since 2024-11-28 15:12:07 CET",
        ),
        (
            ["--cpu", "7", "--at", "2024-11-28 15:12:07"],
            "CPU 7 at 2024-11-28 15:12:07 CET: ns/next/main held CPUs 7 since 2024-11-28 15:12:07 CET and holds it; "
            "grant g-2",
        ),
        (
            ["--device", "gpu0", "--at", "2024-11-28 20:00"],
            "device gpu0 at 2024-11-28 20:00:00 CET: claim ml/train-gpus-x7k2p held gpu0 since "
            "2024-11-28 13:14:07 CET and holds it; grant uid-train-gpus-x7k2p-0",
        ),
    ],
)
def test_who_held_it_is_one_line(
    words: Sequence[str], answer: str, ledger: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A container's name counts from the beginning, although kubelet said it later."""
    assert asked(capsys, ledger, *words) == [answer]


def test_all_that_was_held_is_a_table(ledger: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lines = asked(capsys, ledger, "--at", "2024-11-28 13:30")
    assert [line.split("   ")[0] for line in lines] == ["HOLDER", "ns/book/engine", "claim ml/train-gpus-x7k2p"]
    (one, _) = documents(capsys, ledger, "--at", "2024-11-28 13:30")
    assert (one["since"], one["until"], one["cpus"]) == (rfc3339(MADE_S), rfc3339(MADE_S + 3600), "7-8")


def test_a_grant_from_before_the_audit_is_known_from_itself(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Its entries were deleted by their age: it is still held, or only its release is left."""
    with contextlib.closing(Store(folder)) as store:
        for name, cpu in (("held", 1), ("gone", 2), ("shorter", 3)):
            save(store, GRANTED, cpus(name, cpu, of=holder(name)), MADE_S)
        save(store, RELEASED, cpus("gone", 2, of=holder("gone")), MADE_S + 3 * DAY_S)
        store.prune(MADE_S + DAY_S)
    for cpu, name in ((1, "held"), (2, "gone"), (3, "shorter")):
        (line,) = asked(capsys, folder, "--cpu", str(cpu), "--at", rfc3339(MADE_S + 1))
        assert f"ns/{name}/main held CPUs {cpu} since 2024-11-28 13:12:07 CET" in line
    assert main(["history", "--state-dir", str(folder), "--cpu", "9", "--at", rfc3339(MADE_S + 1)]) == 1
    begins = local(MADE_S + 3 * DAY_S)
    assert capsys.readouterr().err == (
        f"nodeagent: cannot say who held CPU 9 at 2024-11-28 13:12:08 CET: the history begins at {begins}\n"
    )


@pytest.fixture(name="ahead")
def _ahead(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A node that started with its clock an hour ahead: one grant has ended by then, one lasts; then it was set right,
    and a third one was given a minute later."""
    with contextlib.closing(Store(folder)) as store:
        for name, cpu in (("gone", 1), ("lasts", 2)):
            save(store, GRANTED, cpus(name, cpu, of=holder(name), at=MADE_S + 3600), MADE_S + 3600)
        save(store, RELEASED, cpus("gone", 1, of=holder("gone")), MADE_S + 3620)
        save(store, GRANTED, cpus("right", 3, of=holder("right"), at=MADE_S + 60), MADE_S + 60)
    monkeypatch.setattr("nodeagent.cli.shared.facts.time.time", lambda: MADE_S + 600)
    return folder


def test_a_grant_from_when_the_clock_was_ahead_is_held_now(ahead: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (line,) = asked(capsys, ahead, "--cpu", "2", "--at", "now")
    assert "ns/lasts/main held CPUs 2 since 2024-11-28 14:12:07 CET (by a clock that was not right) and holds" in line
    (line,) = asked(capsys, ahead, "--cpu", "3", "--at", rfc3339(MADE_S + 90))
    assert "ns/right/main held CPUs 3 since 2024-11-28 13:13:07 CET and holds it" in line


@pytest.mark.parametrize(("cpu", "at_s"), [(1, MADE_S - 60), (1, MADE_S + 59), (2, MADE_S + 59), (2, MADE_S + 120)])
def test_what_was_given_while_the_clock_was_ahead_may_have_been_held_before(
    cpu: int, at_s: float, ahead: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Until the first decision by the right clock at the latest for what has ended by then; that of which it is not
    known is not said to be free."""
    assert main(["history", "--state-dir", str(ahead), "--cpu", str(cpu), "--at", rfc3339(at_s)]) == 1
    error = capsys.readouterr().err
    assert f"grant {'gone' if cpu == 1 else 'lasts'} of ns/" in error and "may have held it: the clock was" in error


def test_what_ended_before_the_clock_was_set_right_was_free_afterwards(
    ahead: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (line,) = asked(capsys, ahead, "--cpu", "1", "--at", rfc3339(MADE_S + 120))
    assert "no grant held it" in line


@pytest.mark.parametrize(
    ("words", "error"),
    [
        (["--at", "3 o'clock"], 'cannot use --at "3 o\'clock": expected 03:12, '),
        (["--since", "25:00"], "cannot use --since '25:00': expected "),
        (["--since", "1h", "--until", "2h"], "cannot use --until 2h: it is before --since 1h"),
        (["--at", "now", "--since", "1h"], "cannot use --at with --since, --until or --last"),
        (["--at", "9999-01-01"], "cannot say who holds what at 9999-01-01 00:00:00 CET: it is "),
        (["--cpu", "7-"], "cannot read CPU list '7-' of --cpu"),
        (["--pod", "a/b/c"], "cannot use --pod 'a/b/c': expected NAMESPACE/NAME or a UID"),
    ],
)
def test_what_cannot_be_asked_is_named(
    words: Sequence[str], error: str, ledger: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["history", "--state-dir", str(ledger), *words]) == 2
    said = capsys.readouterr()
    assert said.out == "" and said.err.startswith(f"nodeagent: {error}"[:40]) and said.err.count("\n") == 1


def test_a_ledger_that_is_not_there_is_an_error(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["history", "--state-dir", str(folder)]) == 1
    assert capsys.readouterr().err == f"nodeagent: cannot read {folder}/ledger.db: unable to open database file\n"


# ---------------------------------------------------------------- moments


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("13:12:07", MADE_S),
        ("13:12", MADE_S - 7),
        ("13:13", MADE_S + 53 - DAY_S),
        ("2024-11-28", MADE_S - 13 * 3600 - 727),
        ("today", MADE_S - 13 * 3600 - 727),
        ("yesterday", MADE_S - 13 * 3600 - 727 - DAY_S),
        ("2h", MADE_S - 7200),
        ("90m", MADE_S - 5400),
        ("3d ago", MADE_S - 3 * DAY_S),
        ("now", MADE_S),
        ("2024-11-28T12:12:07Z", MADE_S),
        ("2024-07-01 12:00", 1_719_828_000.0),
    ],
)
def test_a_moment_is_read_as_people_write_it(text: str, found: float) -> None:
    """A time alone is the latest such time; summer is an hour ahead."""
    assert moment(text, MADE_S, option="--at") == found


@given(st.text(max_size=12))
def test_no_text_is_misread(text: str) -> None:
    with contextlib.suppress(InputError):
        assert isinstance(moment(text, MADE_S, option="--at"), float)


# ---------------------------------------------------------------- against a plain oracle


@dataclass
class Told:
    """A random history of CPUs, and who held each of them in each second."""

    seed: int
    draw: random.Random = field(init=False)
    now: int = 0
    ahead_s: int = 0
    """How far the clock is ahead."""
    grants: dict[str, Grant] = field(default_factory=dict)
    seconds: list[dict[int, str]] = field(default_factory=list)
    """CPU -> grant."""

    def __post_init__(self) -> None:
        self.draw = random.Random(self.seed)

    def step(self, store: Store) -> None:
        """One decision of one to three changes, and some time without any."""
        changes = [self.change() for _ in range(self.draw.choice((1, 1, 2, 3)))]
        store.save([one for one in changes if one is not None], op="op", at=MADE_S + self.now + self.ahead_s)
        for _ in range(self.draw.randint(1, 3)):
            self.seconds.append({cpu: one.id for one in self.grants.values() for cpu in one.cpus})
            self.now += 1

    def change(self) -> Change | None:
        every, kind = [*self.grants.values()], self.draw.random()
        if kind < 0.45 or not every:
            free = [cpu for cpu in range(8) if not any(cpu in one.cpus for one in every)]
            some = self.draw.sample(free, min(len(free), self.draw.randint(1, 3)))
            name = f"g-{len(self.seconds)}-{kind}" if self.draw.random() < 0.8 else f"again-{self.draw.randint(0, 2)}"
            if not some or name in self.grants:
                return None
            return self.keep(
                self.draw.choice((GRANTED, GRANTED, ADOPTED)), cpus(name, *some, at=MADE_S + self.now + self.ahead_s)
            )
        one = self.draw.choice(every)
        if kind < 0.8:
            return Change(action=RELEASED, grant=self.grants.pop(one.id), why="over")
        if kind < 0.9:
            return self.keep(CONFIRMED, replace(one, holder=holder(f"p{one.id}"), confirmed=True))
        rest = sorted(one.cpus)[1:]
        return (
            self.keep(REDUCED, replace(one, cpus=CpuSet(rest), ids=tuple(f"cpu{cpu}" for cpu in rest)))
            if rest
            else None
        )

    def keep(self, action: str, grant: Grant) -> Change:
        self.grants[grant.id] = grant
        return Change(action=action, grant=grant)  # type: ignore[arg-type]


@pytest.mark.parametrize("seed", range(share_of(100, 0.2)))
def test_whoever_held_a_cpu_is_named_for_every_second(seed: int, capsys: pytest.CaptureFixture[str]) -> None:
    """Random histories through the real store, which is closed and opened again, and whose old entries are deleted:
    where something is no longer known, nothing false is said."""
    told = Told(seed)
    with tempfile.TemporaryDirectory() as name:
        folder, cut = Path(name), 0
        for _ in range(told.draw.randint(1, 4)):
            with contextlib.closing(Store(folder)) as store:
                for _ in range(told.draw.randint(1, 15)):
                    told.step(store)
                if told.draw.random() < 0.3:
                    cut = told.draw.randint(0, told.now)
                    store.prune(MADE_S + cut)
        for second in told.draw.sample(range(told.now), min(told.now, 12)):
            for cpu in told.draw.sample(range(8), 3):
                said, right = named(capsys, folder, cpu, second), told.seconds[second].get(cpu)
                assert said == right or (said == UNKNOWN and cut), (second, cpu)


@pytest.mark.parametrize("seed", range(share_of(40, 0.2)))
def test_no_holder_is_missed_by_a_clock_that_was_ahead_for_a_while(
    seed: int, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Random histories whose first part has times that are too late by more than all of it lasts (less would show
    nowhere): for every second since the clock is right, the holder is named, alone or with another of that time, or it
    is not known."""
    told = Told(seed)
    with tempfile.TemporaryDirectory() as name:
        folder, told.ahead_s = Path(name), told.draw.choice((100, 1000))
        with contextlib.closing(Store(folder)) as store:
            for _ in range(told.draw.randint(1, 12)):
                told.step(store)
            right_from, told.ahead_s = told.now, 0
            for _ in range(told.draw.randint(1, 12)):
                told.step(store)
        monkeypatch.setattr("nodeagent.cli.shared.facts.time.time", lambda: MADE_S + told.now)
        for second in told.draw.sample(range(right_from, told.now), min(told.now - right_from, 12)):
            for cpu in range(8):
                found, right = all_named(capsys, folder, cpu, second), told.seconds[second].get(cpu)
                assert right is None or right in found or found == [UNKNOWN], (second, cpu, found)


UNKNOWN = "unknown"


def named(capsys: pytest.CaptureFixture[str], folder: Path, cpu: int, second: int) -> str | None:
    """The grant that held a CPU, None if none did, or that it is not known."""
    found = all_named(capsys, folder, cpu, second)
    assert len(found) <= 1
    return found[0] if found else None


def all_named(capsys: pytest.CaptureFixture[str], folder: Path, cpu: int, second: int) -> list[str]:
    """The grants that held a CPU by the clock's times, or that it is not known."""
    when = rfc3339(MADE_S + second + 0.5)
    code = main(["history", "--state-dir", str(folder), "--cpu", str(cpu), "--at", when, "-o", "jsonl"])
    lines = capsys.readouterr().out.splitlines()
    return [UNKNOWN] if code else [str(json.loads(line)["grant"]) for line in lines]

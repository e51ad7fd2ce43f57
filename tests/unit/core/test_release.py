"""When a grant that kubelet does not list is released: each rule by an example, and all of them against a model of
kubelet over random histories.
"""

from __future__ import annotations

import pytest
from msgspec.structs import replace

from nodeagent.core.ledger.ledger import Ledger, grant
from nodeagent.core.ledger.release import Absences, Memory, judge
from nodeagent.core.ledger.witness import Given, Sight, Sighting, Witnesses
from nodeagent.core.model.grant import DEVICE_PLUGIN, Grant, Holder
from tests.doubles.kubelet_model import PATIENCE, World
from tests.support.long_form import share_of

HISTORIES, STEPS = share_of(20_000, 0.2), 60
PACKS = 8


def held(*, confirmed: bool = True, pods: tuple[str, ...] = ("u",), boot_id: str = "") -> Ledger:
    holder = Holder(api=DEVICE_PLUGIN, resource="r")
    return grant(Ledger(), Grant(id="g", holder=holder, ids=("1",), confirmed=confirmed, pods=pods, boot_id=boot_id))


def asked(
    sight: Sight = Sight.UNSEEN,
    *,
    kubelet: int = 1,
    knows: bool = False,
    given: Given | None = None,
    folders: frozenset[str] | None = None,
    boot_id: str = "",
) -> Witnesses:
    seen = {"u": Sighting(sight, "processes run in /x")}
    return Witnesses(kubelet=kubelet, knows_pods=knows, boot_id=boot_id, given=given, folders=folders, sights=seen)


def after(ledger: Ledger, *rounds: tuple[float, bool, Witnesses]) -> Absences:
    """What the last of some rounds concludes: (when, whether kubelet lists the grant, what else is known)."""
    found = Absences(memory=Memory())
    for now, listed, witnesses in rounds:
        found = judge(ledger, {"g"} if listed else set(), set(), found.memory, witnesses, now, PATIENCE)
    return found


RECORDED: Given = {("u", "c"): frozenset({("r", "1")})}
LACKING: Given = {}


def released_at(ledger: Ledger, last: Witnesses, *before: tuple[float, bool, Witnesses]) -> float | None:
    """Seconds from the first round that is like the last until the release; None: not within an hour."""
    times = (0.0, 4.9, 5.0, 59.9, 60.0, 599.9, 600.0, 3600.0)
    return next((one for one in times if after(ledger, *before, (0.0, False, last), (one, False, last)).released), None)


def test_a_running_pod_keeps_its_grant_whatever_lists_say() -> None:
    """It is disputed where this kubelet listed it before, and the reason names the evidence."""
    found = after(held(), (0, True, asked()), (9999, False, asked(Sight.LIVES, knows=True, given=LACKING)))
    assert (found.released, found.disputed, found.due_s) == ((), {"g"}, None)
    assert found.held["g"] == "kubelet no longer lists it, and processes run in /x"


def test_a_running_pod_is_not_disputed_while_kubelet_has_not_listed_it_since_its_start() -> None:
    """That is what every restart of kubelet looks like."""
    lives = asked(Sight.LIVES, kubelet=2)
    found = after(held(), (0, True, asked(kubelet=1)), (1, False, lives), (9999, False, lives))
    assert (found.released, found.disputed) == ((), frozenset())
    assert found.held["g"] == "kubelet does not list it, and processes run in /x"


@pytest.mark.parametrize(
    ("sight", "limit_s"), [(Sight.ABSENT, 0.0), (Sight.EMPTY, 5.0), (Sight.STOPPED, 5.0), (Sight.UNSEEN, 600.0)]
)
def test_what_kubelet_stops_listing_goes_as_soon_as_it_is_seen_to_have_ended(sight: Sight, limit_s: float) -> None:
    """At once where kubelet has removed its cgroup; after a long time where no witness can be asked."""
    assert released_at(held(), asked(sight), (-1, True, asked())) == limit_s


def test_a_list_that_is_older_than_a_grant_does_not_count_as_having_listed_it() -> None:
    """It has the pod before, whose ids kubelet has given to the next one since: that one is not dropped by the list
    that lacks both."""
    older = judge(held(), {"g"}, {"g"}, Memory(), asked(), 0, PATIENCE)
    assert older.memory.listed == frozenset()
    for now in (1, PATIENCE.confirmed_s + 1):
        assert judge(held(), set(), set(), older.memory, asked(Sight.ABSENT), now, PATIENCE).released == ()


@pytest.mark.parametrize("sight", list(Sight))
@pytest.mark.parametrize("confirmed", [True, False])
def test_a_kubelet_that_has_just_started_releases_nothing_by_listing_nothing(sight: Sight, confirmed: bool) -> None:
    """Its checkpoint has the devices, its API server is silent."""
    ledger, last = held(confirmed=confirmed), asked(sight, kubelet=2, given=RECORDED)
    assert released_at(ledger, last, (-1, confirmed, asked(kubelet=1, given=RECORDED))) is None


def test_what_kubelet_has_no_record_of_is_released_where_nothing_of_it_runs() -> None:
    """Neither this kubelet's list nor the checkpoint has it: its pod would have to ask again."""
    assert released_at(held(), asked(Sight.EMPTY, kubelet=2, given=LACKING)) == 5.0


def test_a_lost_checkpoint_is_no_proof() -> None:
    """A file that is not there says nothing; one that lacks a pod whose end no witness has seen says little."""
    assert released_at(held(), asked(Sight.EMPTY, given=None)) is None
    assert released_at(held(), asked(Sight.UNSEEN, given=LACKING)) is None
    assert released_at(held(), asked(Sight.UNSEEN, given=LACKING, knows=True)) == 600.0


def test_a_pod_that_kubelet_has_cleared_away_is_gone() -> None:
    """Its folder or its cgroup was there, and is not."""
    gone = asked(kubelet=2, folders=frozenset(), given=RECORDED)
    assert released_at(held(), gone, (-1, False, asked(folders=frozenset({"u"})))) == 5.0
    absent = asked(Sight.ABSENT, kubelet=2, given=RECORDED)
    assert released_at(held(), absent, (-1, False, asked(Sight.EMPTY, given=RECORDED))) == 5.0


def test_a_pod_that_ended_while_the_agent_was_away_is_gone_once_kubelet_lists_others() -> None:
    """It was listed before in this boot. After a reboot a pod has no cgroup until it is started again, and neither has
    one that was only just admitted."""
    ledger = held(boot_id="this")
    gone = asked(Sight.ABSENT, knows=True, boot_id="this", folders=frozenset(), given=RECORDED)
    assert released_at(ledger, gone) == 5.0
    for other in (
        replace(gone, folders=None),
        replace(gone, boot_id="other"),
        replace(gone, boot_id=""),
        replace(gone, folders=frozenset({"u"})),
        replace(gone, sights={"u": Sighting(Sight.EMPTY)}),
        replace(gone, knows_pods=False),
    ):
        assert released_at(ledger, other) in (600.0, None)
    assert released_at(held(boot_id="this", confirmed=False), gone) == 600.0


def test_a_folder_that_was_never_seen_may_still_be_made() -> None:
    """Kubelet makes it after it has admitted the pod: after a long time it would be there."""
    assert released_at(held(), asked(Sight.ABSENT, folders=frozenset(), given=RECORDED)) == 600.0
    assert released_at(held(), asked(Sight.ABSENT, folders=frozenset({"u"}), given=RECORDED)) is None


def test_a_missing_folder_alone_is_no_proof() -> None:
    """Kubelet may keep the folders of its pods below another --root-dir."""
    assert released_at(held(), asked(Sight.UNSEEN, folders=frozenset(), given=RECORDED)) is None


def test_a_pod_that_kubelet_never_lists_is_given_up_once_it_lists_others() -> None:
    """It then has what its API server says; a pod that is done and not deleted is never listed again."""
    assert released_at(held(), asked(Sight.EMPTY, knows=True, given=RECORDED)) == 600.0


def test_an_allocation_whose_admission_failed_is_released_after_a_minute() -> None:
    """Kubelet recorded nothing, and no pod was ever started with it."""
    ledger, last = held(confirmed=False, pods=()), asked(kubelet=1, given=LACKING)
    fresh = (-1.0, False, asked(kubelet=1, given=LACKING))
    before = judge(Ledger(), set(), set(), Memory(), fresh[2], -1.0, PATIENCE).memory
    first = judge(ledger, set(), set(), before, last, 0.0, PATIENCE)
    assert first.due_s == 60.0
    assert judge(ledger, set(), set(), first.memory, last, 59.9, PATIENCE).released == ()
    assert len(judge(ledger, set(), set(), first.memory, last, 60.0, PATIENCE).released) == 1


def test_an_init_container_that_is_only_in_the_checkpoint_is_nothing_to_report() -> None:
    """Kubelet's list leaves it out for as long as its pod lives."""
    found = after(held(confirmed=False), (0, False, asked(Sight.LIVES, given=RECORDED)))
    assert (found.released, dict(found.held), found.due_s) == ((), {}, None)


@pytest.mark.parametrize("pack", range(PACKS))
def test_nothing_that_lives_is_released_and_nothing_that_is_gone_stays(pack: int) -> None:
    """Kubelet, runtime, API server and agent restart and fall silent in any order, pods come and go and reuse names,
    checkpoints are lost; some nodes can be asked about cgroups, some about the runtime, some about neither."""
    count, done = HISTORIES // PACKS, {"granted": 0, "released": 0}
    for seed in range(pack * count, (pack + 1) * count):
        world = World(seed)
        try:
            for _ in range(STEPS):
                world.step()
            world.settle()
            assert not world.forgotten(), f"{world.forgotten()} stay held"
        except AssertionError as error:
            raise AssertionError(f"history {seed}: {error}") from None
        done = {name: number + world.counts.get(name, 0) for name, number in done.items()}
    assert done["granted"] > count and done["released"] > count // 4

"""Accelerators divided into work queues for claims by an agent that is killed at any step."""

from __future__ import annotations

import functools
import itertools
import random
from collections.abc import Callable
from pathlib import Path

import pytest

from nodeagent.errors import HostError
from tests.support.dsa_keeper_node import Killed, Node
from tests.support.long_form import LONG, share_of


class Countdown:
    """Kills at one step."""

    def __init__(self, at: int) -> None:
        self.left = at

    def __call__(self, _step: str) -> None:
        self.left -= 1
        if self.left < 0:
            raise Killed


def _killed_at(node: Node, at: int, act: Callable[[], object]) -> bool:
    """Whether it was killed before it was done."""
    node.die_at(Countdown(at))
    try:
        act()
    except Killed:
        return True
    finally:
        node.die_at(lambda step: None)
        node.start()
    return False


@pytest.mark.parametrize("older", [False, True])
def test_killed_at_any_step_of_the_first_queue_the_next_agent_makes_it_or_takes_it_down(
    tmp_path: Path, older: bool
) -> None:
    for at in itertools.count(0, 1 if LONG else 5):
        folder = tmp_path / str(at)
        folder.mkdir()
        node = Node(folder, older=older)
        was_killed = _killed_at(node, at, functools.partial(node.make, 2))
        again, _ = node.make(2), node.make(0, "d")
        assert node.is_made(0) and node.is_made(2) and (again or not was_killed or at > 20)
        assert node.down(0, 2) == {} and node.is_untouched()
        _killed_at(node, at, functools.partial(node.make, 2))
        assert node.down(2) == {} and node.keeper.end() == {}
        assert node.is_untouched(), (at, node.kernel.written)
        if not was_killed:
            break
    assert at > 35


@pytest.mark.parametrize("older", [False, True])
def test_killed_at_any_step_of_taking_down_the_next_agent_completes_it(tmp_path: Path, older: bool) -> None:
    for at in itertools.count(0, 1 if LONG else 5):
        folder = tmp_path / str(at)
        folder.mkdir()
        node = Node(folder, older=older)
        node.make(2), node.make(0, "d")
        was_killed = _killed_at(node, at, functools.partial(node.down, 2))
        assert node.is_made(0)
        assert node.down(2) == {} and node.is_made(0)
        was_killed |= _killed_at(node, at, functools.partial(node.down, 0))
        assert node.down(0) == {} and node.keeper.end() == {}
        assert node.is_untouched()
        if not was_killed:
            break
    assert at > 4


@pytest.mark.parametrize("seed", range(share_of(300, 0.1)))
def test_whatever_happens_in_whatever_order_claims_have_theirs_and_nothing_is_left(tmp_path: Path, seed: int) -> None:
    random_ = random.Random(seed)
    node = Node(tmp_path, older=seed % 3 == 0)
    held: dict[int, str] = {}
    for step in range(random_.randrange(3, 14)):
        node.die_at(Countdown(random_.randrange(60)) if random_.random() < 0.6 else (lambda _step: None))
        slot = random_.randrange(3)
        try:
            if slot in held and random_.random() < 0.6:
                assert node.down(slot) == {}
                del held[slot]
            elif str(slot) in node.slots():
                node.make(slot, held.setdefault(slot, f"c{step}"))
        except Killed:
            pass
        node.die_at(lambda _step: None)
        node.start()
        if random_.random() < 0.05:
            node.boot += 1
            node.kernel.reboot()
            node.start()
        for slot, claim in held.items():  # kubelet asks again
            if str(slot) in node.slots() or random_.random() < 0.5:
                try:
                    node.make(slot, claim)
                except HostError as error:
                    assert node.kernel.older and "released first" in str(error)
                else:
                    assert node.is_made(slot)
    assert node.down(*held) == {} and node.keeper.end() == {}
    assert node.is_untouched()

"""Sets properties of virtual functions for claims and sets them back, each recorded first. Blocks.

Every step looks at what is there, so that after a crash at any point the same call completes what it had begun.
"""

from __future__ import annotations

import errno
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence

import structlog

from nodeagent.core.model.inventory import Inventory
from nodeagent.core.network.vf_checks import Property, VfPlace, last_place, place_of, said_of, text_of, value_of
from nodeagent.core.network.vf_properties import NO_MAC, VfProperties
from nodeagent.errors import HostError, InputError
from nodeagent.host.netlink.connection import NetlinkError
from nodeagent.host.netlink.vf_properties import Exchange, PhysicalFunction, host_exchange, opened
from nodeagent.managers.network.vf_property_journal import VfPropertyJournal, VfSet

log = structlog.get_logger()


class VfSetter:
    """One caller at a time."""

    def __init__(
        self,
        journal: VfPropertyJournal,
        inventory: Callable[[], Inventory],
        exchange: Callable[[], Exchange] = host_exchange,
    ) -> None:
        """inventory: returns the machine as last seen. exchange: opens one with the kernel."""
        self._journal = journal
        self._inventory = inventory
        self._exchange = exchange

    def records(self, *, certain: bool = False) -> Mapping[str, VfSet]:
        """Return what is recorded, by virtual function. certain: raise HostError if that cannot be told for the
        moment."""
        return self._journal.read(certain=certain)

    # ---------------------------------------------------------------- for a claim

    def set(self, claim: str, vf: str, wanted: VfProperties) -> None:
        """Have a virtual function as a claim wants it. Raise HostError; what was begun in this call is set back."""
        record = self._journal.read().get(vf)
        if record is not None and record.claim != claim:
            raise HostError(f"cannot set {vf}: what it had before claim {record.claim} is not set back yet")
        if record is not None and record.wanted != wanted:  # the claim was allocated again
            self._give_back_one(record)
            record = None
        try:
            place = place_of(self._inventory(), vf)
        except InputError as error:
            raise HostError(f"cannot set {vf}: {error}") from None
        with opened(self._exchange(), place) as pf:
            found = _there(pf, place)
            if record is not None:  # from before a restart: what it has by now is not what it had
                self._have(pf, place, found, wanted, said_of(wanted))
                return
            _refuse_unreported(place, found, wanted)
            record = VfSet(vf=vf, claim=claim, place=place, wanted=wanted, before=found)
            self._journal.add(record)
            try:
                self._have(pf, place, found, wanted, said_of(wanted))
            except HostError as error:
                raise self._undone(record, place, pf, error) from None
        log.info("vf-properties-set", device=vf, claim=claim, set=[text_of(wanted, one) for one in said_of(wanted)])

    def _have(
        self,
        pf: PhysicalFunction,
        place: VfPlace,
        found: VfProperties,
        wanted: VfProperties,
        which: Iterable[Property],
    ) -> None:
        """Set what a function does not have yet, and read it back. Raise HostError."""
        due = [one for one in which if value_of(found, one) != value_of(wanted, one)]
        for one in due:
            pf.set(wanted, one)
        after = _there(pf, place) if due else found
        for one in due:
            if value_of(after, one) != value_of(wanted, one):
                raise HostError(
                    f"cannot set {text_of(wanted, one)} of VF {place.index} of {place.interface}: the kernel took it, "
                    f"and there is {text_of(after, one)}"
                )

    def _undone(self, record: VfSet, place: VfPlace, pf: PhysicalFunction, error: HostError) -> HostError:
        """Set back what could not be set whole. Return what to raise."""
        try:
            self._set_back(record, place, pf)
        except HostError as left:
            return HostError(f"{error}; {left}")
        return error

    # ---------------------------------------------------------------- back

    def give_back(self, vfs: Collection[str]) -> dict[str, str]:
        """Set back some virtual functions. Return, by function, why one is not as it was. Raise HostError if it cannot
        be told for the moment what is set."""
        errors: dict[str, str] = {}
        for vf, record in self._journal.read(certain=True).items():
            if vf in vfs:
                try:
                    self._give_back_one(record)
                except HostError as error:
                    errors[vf] = str(error)
        return errors

    def _give_back_one(self, record: VfSet) -> None:
        try:
            place = last_place(self._inventory(), record.vf, record.place)
        except InputError as error:
            raise HostError(f"cannot set back {record.vf}: {error}") from None
        if place is None:
            self._forget_gone(record)
            return
        with opened(self._exchange(), place) as pf:
            self._set_back(record, place, pf)

    def _set_back(self, record: VfSet, place: VfPlace, pf: PhysicalFunction) -> None:
        found, before = pf.read(), record.before
        if found is None:
            self._forget_gone(record)
            return
        which = [*reversed(said_of(record.wanted))]
        if before.mac == NO_MAC and Property.MAC in which:
            which.remove(Property.MAC)
            _take_address(pf, found, before)
        self._have(pf, place, found, before, which)
        self._journal.forget(record.vf)
        log.info("vf-properties-set-back", device=record.vf, claim=record.claim)

    def _forget_gone(self, record: VfSet) -> None:
        self._journal.forget(record.vf)
        log.warning("vf-gone", device=record.vf, pf=record.place.pf, claim=record.claim)

    def orphans(self, held: Mapping[str, Collection[str]]) -> Sequence[str]:
        """Return the virtual functions that are set although their claim does not hold them. held: devices by UID of
        the claim."""
        return sorted(vf for vf, one in self._journal.read().items() if vf not in held.get(one.claim, ()))


def _there(pf: PhysicalFunction, place: VfPlace) -> VfProperties:
    found = pf.read()
    if found is None:
        raise HostError(f"cannot read VF {place.index} of {place.interface}: there is none")
    return found


def _refuse_unreported(place: VfPlace, found: VfProperties, wanted: VfProperties) -> None:
    """Raise HostError for what could not be set back, because the driver does not report what it is."""
    for one in said_of(wanted):
        if not value_of(found, one):
            what = f"cannot set {text_of(wanted, one)} of VF {place.index} of {place.interface}"
            raise HostError(f"{what}: its driver does not report what it is, so it could not be set back")


def _take_address(pf: PhysicalFunction, found: VfProperties, before: VfProperties) -> None:
    """Take away the address that a function was given. It may have one of its own by the time it is read. Some drivers
    take none away (`is_valid_ether_addr` in their ndo_set_vf_mac): then it stays, which harms no later holder. Raise
    HostError for anything else."""
    if found.mac == NO_MAC:
        return
    try:
        pf.set(before, Property.MAC)
    except NetlinkError as error:
        if error.code not in (errno.EINVAL, errno.EADDRNOTAVAIL):
            raise
        log.warning("vf-mac-stays", error=str(error))

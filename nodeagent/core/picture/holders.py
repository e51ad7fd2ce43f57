"""Who holds something: grants brought together by pod or claim, and the letter of each holder. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from nodeagent.core.model.cpuset import union
from nodeagent.core.model.grant import CLAIM, DEVICE_PLUGIN, KUBELET, Grant, Holder
from nodeagent.core.model.request import Placement
from nodeagent.core.picture.values import PictureHolder

LETTERS = (
    "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789"
    "ΓΔΘΛΞΠΣΦΨΩαβγδεζηθικλμνξπρστυφχψω"
    "БГДЖЗИЙЛПЦЧШЩЪЫЬЭЮЯбвгджзийклмнптфцчшщъыьэюя"
    "ԱԲԳԴԵԶԷԸԹԺԻԼԽԾԿՀՁՂՃՄՅՆՇՈՉՊՋՌՎՏՐՑՒՓՔՖաբգդեզէըթժիլխծկհձղճմյնշոչպջռվտրցւփքֆ"
)
"""One for each holder, in the order of the picture. Letters of one column that look like no other of them."""
MORE = "#"
"""The letter of the holders for whom there is none left; the legend lists their CPUs."""
PLACED_LETTER = "*"


def holders_of(grants: Iterable[Grant]) -> tuple[tuple[PictureHolder, ...], dict[str, int]]:
    """Return the holders in the order of their first grants, and the index of its holder by grant id."""
    together: dict[str, list[Grant]] = {}
    for grant in grants:
        together.setdefault(_name(grant.holder) or f"{grant.holder} {grant.id}", []).append(grant)
    holders = tuple(_holder(index, name, some) for index, (name, some) in enumerate(together.items()))
    return holders, {grant.id: index for index, some in enumerate(together.values()) for grant in some}


def placed_holder(placement: Placement) -> PictureHolder:
    """Return a placement that is being tried as the holder of what it would take."""
    return PictureHolder(
        letter=PLACED_LETTER,
        name="would be placed here",
        api="",
        cpus=placement.cpus,
        hugepages=placement.hugepages,
        memory=placement.memory,
        devices=placement.devices,
    )


def _name(holder: Holder) -> str:
    """Return what the grants of a holder have in common, or "" if its pod is not known yet."""
    if holder.api == CLAIM:
        return str(holder)
    if holder.api == KUBELET:
        return f"kubelet's pod {holder.uid}"
    return f"{holder.namespace}/{holder.pod}" if holder.pod else ""


def _holder(index: int, name: str, grants: Sequence[Grant]) -> PictureHolder:
    first = grants[0].holder
    uids = {uid for grant in grants for uid in (grant.holder.uid, *grant.pod_uids) if uid}
    return PictureHolder(
        letter=LETTERS[index] if index < len(LETTERS) else MORE,
        name=name,
        api=first.api or DEVICE_PLUGIN,
        namespace=first.namespace,
        pod=first.pod,
        claim=first.claim,
        uids=tuple(sorted(uids)),
        grants=tuple(grant.id for grant in grants),
        cpus=union(grant.cpus for grant in grants),
        hugepages=tuple(pages for grant in grants for pages in grant.hugepages),
        memory=tuple(amount for grant in grants for amount in grant.memory),
        devices=tuple(dict.fromkeys(one for grant in grants for one in (*grant.devices, *grant.shares))),
    )

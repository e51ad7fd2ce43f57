"""`nodeagent explain pod NAMESPACE/NAME` and `explain claim NAMESPACE/NAME`."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

from nodeagent.cli.agent.explain.kernel import kernel_document, print_kernel
from nodeagent.cli.agent.explain.refusals import print_refusals, refusal_documents, refusals
from nodeagent.cli.agent.explain.unit import print_unit, unit_document
from nodeagent.cli.shared.facts import Facts
from nodeagent.cli.shared.node_state import NodeState
from nodeagent.core.advice.tenants import Tenant, pod_of
from nodeagent.core.model.cpuset import union
from nodeagent.core.model.grant import CLAIM, Grant
from nodeagent.errors import InputError

Document = dict[str, Any]


def named(text: str, what: str) -> str:
    """Return NAMESPACE/NAME; without a namespace it is "default". Raise InputError if it is neither."""
    if re.fullmatch(r"[a-z0-9.-]+(/[a-z0-9.-]+)?", text) is None:
        raise InputError(f"cannot explain {what} {text!r}: expected NAMESPACE/NAME")
    return text if "/" in text else f"default/{text}"


def explain_pod(facts: Facts, state: NodeState, pod: str, uid: str = "") -> Document:
    """Return what a pod holds and why, what the kernel says, and what was refused to it.

    uid: which of several pods of that name. Raise InputError if it is unknown, or two pods have the name.
    """
    grants = _of_pod(state, pod)
    found = _one(grants, f"pod {pod}", uid)
    uids = {uid} if uid else {one for grant in found for one in grant.pod_uids}
    uids |= {known for known, name in state.pod_names().items() if name == pod and not uid}
    refused, trouble = refusals(facts.state_dir, lambda one: _names(one.holder, pod))
    if not found and not refused:
        raise InputError(_unknown(facts, f"pod {pod}"))
    cpus = union(one.cpus for one in found)
    return {
        "pod": pod,
        "uids": sorted(uids),
        "holds": _units(state, found),
        "kernel": kernel_document(state, facts.root, pod, uids, cpus),
        "refusals": refusal_documents(state, refused),
        "trouble": trouble,
    }


def explain_claim(facts: Facts, state: NodeState, claim: str, uid: str = "") -> Document:
    """Return what a claim holds and why, and what was refused to it. Raise InputError as `explain_pod` does."""
    mine = [one for one in state.ledger.grants.values() if one.holder.api == CLAIM]
    mine = [one for one in mine if f"{one.holder.namespace}/{one.holder.claim}" == claim]
    if uid:
        mine = [one for one in mine if one.holder.uid == uid]
    if len(several := sorted({one.holder.uid for one in mine})) > 1:
        raise InputError(f"cannot explain claim {claim}: two have that name; name one with --uid {several[0]}")
    about = re.compile(rf"claim {re.escape(claim)}( of .*)?")
    refused, trouble = refusals(facts.state_dir, lambda one: about.fullmatch(one.holder) is not None)
    if not mine and not refused:
        raise InputError(_unknown(facts, f"claim {claim}"))
    names = state.pod_names()
    return {
        "claim": claim,
        "uid": mine[0].holder.uid if mine else "",
        "pods": sorted({names.get(one, one) for grant in mine for one in grant.pod_uids}),
        "holds": _units(state, mine),
        "refusals": refusal_documents(state, refused),
        "trouble": trouble,
    }


def _of_pod(state: NodeState, pod: str) -> list[Grant]:
    """Return the grants of a pod's containers, and of the claims that it may use."""
    every = [*state.ledger.grants.values(), *state.ledger.foreign.values()]
    own = [one for one in every if pod_of(one) == pod]
    uids = {uid for one in own for uid in one.pod_uids}
    uids |= {uid for uid, name in state.pod_names().items() if name == pod}
    return [*own, *(one for one in every if not pod_of(one) and not uids.isdisjoint(one.pod_uids))]


def _one(grants: Iterable[Grant], what: str, uid: str) -> list[Grant]:
    """Return the grants of one pod. Raise InputError if grants of several pods have the name."""
    mine = [one for one in grants if not uid or uid in one.pod_uids]
    own: dict[tuple[str, ...], list[str]] = {}
    for one in mine:
        if one.holder.pod and len(one.pod_uids) == 1:
            own.setdefault(one.pod_uids, []).append(one.id)
    if len(own) > 1:
        said = ", ".join(f"{uids[0]} ({' '.join(ids)})" for uids, ids in sorted(own.items()))
        raise InputError(f"cannot explain {what}: {len(own)} pods have that name: {said}; name one with --uid")
    return mine


def _units(state: NodeState, grants: Iterable[Grant]) -> list[Document]:
    return [unit_document(state, one) for one in Tenant(pods=(), grants=tuple(grants)).units()]


def _names(holder: str, pod: str) -> bool:
    """Return whether a refusal's holder is a pod: NS/POD/CONTAINER, or "claim NS/NAME of POD, POD"."""
    namespace, _, name = pod.partition("/")
    claim = re.fullmatch(r"claim ([^/ ]+)/[^ ]+ of (.+)", holder)
    if claim is not None:
        return claim[1] == namespace and name in claim[2].split(", ")
    return holder == pod or holder.startswith(f"{pod}/")


def _unknown(facts: Facts, what: str) -> str:
    unnamed, trouble = refusals(facts.state_dir, lambda one: one.holder.startswith("a container not yet listed"))
    if trouble:
        return f"cannot explain {what}: it holds nothing; whether it was refused is unknown: {trouble}"
    more = ""
    if unnamed:
        more = f"; {len(unnamed)} refusals of containers that kubelet did not name: `nodeagent history`"
    return f"cannot explain {what}: it holds nothing here, and no refusal names it{more}"


# ---------------------------------------------------------------- as text


def print_holder(document: Mapping[str, Any]) -> None:
    """Print what a pod or a claim holds, and what was refused to it."""
    title = f"pod {document['pod']}" if "pod" in document else f"claim {document['claim']}"
    of = document["uids"] if "pod" in document else document["pods"]
    print(title + (f" ({', '.join(of)})" if of else "") + ("" if document["holds"] else ": holds nothing"))
    for unit in document["holds"]:
        print_unit(unit)
    if "kernel" in document:
        print_kernel(document["kernel"])
    if document["trouble"]:
        print(f"refusals unknown: {document['trouble']}")
    print_refusals(document["refusals"])

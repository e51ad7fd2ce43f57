"""What a kind may do besides finding and describing devices. Every hook is optional and looked for by its name.

`prepare` and `unprepare` are called for claims (managers/kinds), `health` is polled (host/health/kinds.py), and
`config` is the type of the opaque configuration that claims may give its devices (core/opaque).
docs/kinds.md says what a hook may rely on.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from types import MappingProxyType
from typing import Any, Protocol, runtime_checkable

import msgspec

from nodeagent.core.model.device import ContainerEdits, Device
from nodeagent.core.opaque.decode import FORMS, Forms
from nodeagent.host.devices.base import Kind
from nodeagent.host.health.source import Sight

_CALLED = ("prepare", "unprepare", "health")


@runtime_checkable
class Preparing(Kind, Protocol):
    """A kind whose devices are prepared for claims. Both calls run in a thread with a deadline, are idempotent, and
    raise what they like: it is the claim's error."""

    def prepare(self, device: Device, config: Any) -> ContainerEdits | None:
        """Make a device ready for a claim. Return what the container gets besides what `edits` says of the device, or
        None for nothing. config: a value of `config`, or None if the kind has no such type."""
        ...

    def unprepare(self, device: Device, config: Any) -> None:
        """Undo what `prepare` did, or began and did not complete. config: None also if the kind cannot read any longer
        what was recorded."""
        ...


@runtime_checkable
class Observing(Kind, Protocol):
    """A kind that knows the health of its devices."""

    def health(self, device: Device) -> Sight | None:
        """Return what is seen of a device, or None if there is nothing to see. Runs in a thread with a deadline; the
        device is in unknown state if it raises or takes longer."""
        ...


def fault(kind: object) -> str:
    """Return why the hooks of a kind cannot be used, or ""."""
    for name in _CALLED:
        if hasattr(kind, name) and not callable(getattr(kind, name)):
            return f"its {name} is {type(getattr(kind, name)).__name__}, expected a method"
    has = [name for name in _CALLED[:2] if hasattr(kind, name)]
    if len(has) == 1:
        (other,) = {*_CALLED[:2]} - {*has}
        return f"it has {has[0]} and lacks {other}"
    form = getattr(kind, "config", None)
    if form is not None and not (isinstance(form, type) and issubclass(form, msgspec.Struct)):
        return f"its config is {form!r}, expected a subclass of msgspec.Struct"
    if form is not None and form.__name__ in FORMS:
        return f"its configuration {form.__name__} has the name of a built-in one"
    return ""


def preparing(families: Iterable[Kind]) -> Mapping[str, Preparing]:
    """Return those of some kinds that prepare their devices, by name."""
    return MappingProxyType({one.name: one for one in families if isinstance(one, Preparing)})


def prepares(kind: Kind | None) -> bool:
    """Return whether a device of a kind is handed over only once it has been prepared for its claim: by the kind
    itself, or by a manager of the agent."""
    return isinstance(kind, Preparing) or getattr(kind, "connects", False) is True


def observing(families: Iterable[Kind]) -> Mapping[str, Observing]:
    """Return those of some kinds that know the health of their devices, by name."""
    return MappingProxyType({one.name: one for one in families if isinstance(one, Observing)})


def forms(families: Iterable[Kind]) -> Forms:
    """Return the forms of opaque configurations, with those that some kinds bring."""
    own = ((one.name, getattr(one, "config", None)) for one in families)
    return Forms(MappingProxyType({name: form for name, form in own if form is not None}))

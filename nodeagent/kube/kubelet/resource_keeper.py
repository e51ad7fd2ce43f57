"""One resource: its server, its registration with kubelet, and the loop that keeps it registered."""

from __future__ import annotations

import asyncio
import contextlib
import random
import time
from collections.abc import Callable

import structlog

from nodeagent.aio.unless import unless
from nodeagent.errors import NodeagentError
from nodeagent.kube.kubelet import device_plugin as deviceplugin
from nodeagent.kube.kubelet import sockets
from nodeagent.kube.kubelet.register_call import Outcome, RegisterOutcome, register
from nodeagent.kube.kubelet.register_steps import Facts, OfferedTo, Step, next_step
from nodeagent.kube.kubelet.registration_state import Registration, RegistrationState, RegistrationTiming
from nodeagent.pb import deviceplugin_pb2 as pb
from nodeagent.telemetry import metrics

log = structlog.get_logger()


class PluginKeeper:
    """Keeps one resource registered while keep() is running. Building one serves nothing."""

    def __init__(
        self,
        resource: deviceplugin.Resource,
        kubelet: sockets.SocketWatch,
        pace: RegistrationTiming,
        on_change: Callable[[], None],
    ) -> None:
        """Set up the server without starting it.

        `kubelet` watches the socket at which resources are registered; they are served in its folder. `on_change` is
        called when `registration` has changed.
        """
        self.server = deviceplugin.DevicePluginServer(resource, kubelet.path.parent, on_watch=self._watch_changed)
        self.registration = Registration(resource=resource.name, since_unix_s=time.time(), reason="not started")
        self._kubelet = kubelet
        self._pace = pace
        self._on_change = on_change
        self._woken, self._moved = asyncio.Event(), asyncio.Event()
        self._offered_to: sockets.SocketIdentity | None = None
        """The kubelet that was given the server's path in a Register."""
        self._counted = False
        """Whether the resource counts as registered with it."""
        self._seen: sockets.SocketIdentity | None = None
        self._seen_s: float | None = None
        """The kubelet seen last, and since when (monotonic); None once the resource was registered with it."""
        self._due_s = self._clean_s = self._changed_s = time.monotonic()
        """Monotonic times: when the last step should have taken effect; when kubelet should have cleaned up after a
        stream or call that was ended; when kubelet last started or stopped watching."""
        self._patience_s = pace.unwatched_s
        self._retry_s = pace.first_retry_s
        self._jitter = random.Random(resource.name)  # noqa: S311  spreads retries; the name makes it repeatable

    def interrupt(self) -> None:
        """Notify that kubelet's socket or this server's socket has changed: an attempt in progress is pointless."""
        self._retry_s, self._patience_s = self._pace.first_retry_s, self._pace.unwatched_s
        self._due_s = time.monotonic()
        self._moved.set()
        self._woken.set()

    async def keep(self) -> None:
        """Retry until cancelled; errors are reported, never raised. The caller must then call end()."""
        while True:
            self._woken.clear()
            self._moved.clear()
            try:
                await self._advance()
            except Exception as error:
                self._failed(str(error) or type(error).__name__, error)
                self._retry_later()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(self._rest_s()):
                    await self._woken.wait()

    async def end(self) -> None:
        """End the streams, remove the socket, and give kubelet time to notice that a stream has ended."""
        if await self.server.stop():
            await asyncio.sleep(self._pace.clean_up_s)

    # ---------------------------------------------------------------- steps

    async def _advance(self) -> None:
        kubelet = self._kubelet.look()
        if kubelet is not None and kubelet != self._seen:
            self._seen, self._seen_s = kubelet, time.monotonic()
        match next_step(self._facts(kubelet)):
            case Step.AWAIT_KUBELET:
                absence = sockets.absence(self._kubelet.path)
                self._show(RegistrationState.WAITING, reason=f"waiting for {self._kubelet.path}: {absence}")
            case Step.SERVE:
                await self._serve()
            case Step.GIVE_UP:
                self._give_up()
                await self._serve()
            case Step.OFFER if kubelet is not None:
                await self._offer(kubelet)
            case Step.COUNT if kubelet is not None:
                self._count(kubelet)

    def _facts(self, kubelet: sockets.SocketIdentity | None) -> Facts:
        current = OfferedTo.CURRENT if self._offered_to == kubelet else OfferedTo.ANOTHER
        return Facts(
            kubelet=kubelet is not None,
            served=self.server.serving and not self.server.lost,
            offered_to=OfferedTo.NONE if self._offered_to is None else current,
            watched=self.server.watched,
            due=self._left_s() <= 0,
        )

    async def _serve(self) -> None:
        # A kubelet that has just started has nothing to clean up from its predecessor's streams.
        known = self._offered_to is not None and self._offered_to == self._kubelet.look()
        self._offered_to, self._counted = None, False
        if await self.server.stop() and known:
            self._let_clean_up()
        if await self.server.start():
            self._let_clean_up()
        self._due_s = time.monotonic()
        self._woken.set()

    def _give_up(self) -> None:
        if self._counted:
            log.warning("not-watched", resource=self.registration.resource, after_s=self._patience_s)
            self._patience_s = min(2 * self._patience_s, self._pace.unwatched_most_s)

    async def _offer(self, kubelet: sockets.SocketIdentity) -> None:
        request = pb.RegisterRequest(
            version=deviceplugin.VERSION,
            endpoint=self.server.path.name,
            resource_name=self.registration.resource,
            options=self.server.options,
        )
        self._offered_to = kubelet
        answer = await unless(self._moved, register(self._kubelet.path, request, self._pace.register_s))
        if answer is None:
            self._let_clean_up()
        else:
            self._answered(kubelet, answer)

    def _answered(self, kubelet: sockets.SocketIdentity, answer: RegisterOutcome) -> None:
        if answer.outcome is Outcome.TAKEN or self.server.watched:
            self._due_s = time.monotonic() + self._patience_s
            self._count(kubelet)
            return
        self._failed(answer.reason)
        if answer.outcome is Outcome.UNANSWERED:
            self._due_s = time.monotonic() + self._pace.unwatched_s
            return
        self._retry_later()
        if answer.outcome is Outcome.UNSENT:
            self._offered_to = None

    def _count(self, kubelet: sockets.SocketIdentity) -> None:
        if not self._counted:
            self._counted, self._retry_s = True, self._pace.first_retry_s
            name, socket = self.registration.resource, self.server.path.name
            log.info("registered", resource=name, socket=socket, kubelet_inode=kubelet.inode)
            self._time_registration(name)
        self._show(RegistrationState.REGISTERED, kubelet_inode=kubelet.inode)

    def _time_registration(self, name: str) -> None:
        """Record how long the first registration with a kubelet has taken since its socket was seen."""
        if self._seen_s is not None:
            metrics.REGISTRATION_SECONDS.labels(name).observe(time.monotonic() - self._seen_s)
            self._seen_s = None

    # ---------------------------------------------------------------- time

    def _left_s(self) -> float:
        """Return how long until the next step is due; zero or negative if it is due."""
        return max(self._due_s, self._clean_s) - time.monotonic()

    def _rest_s(self) -> float:
        left_s = self._left_s()
        return left_s if left_s > 0 else self._pace.poll_s

    def _let_clean_up(self) -> None:
        self._clean_s = time.monotonic() + self._pace.clean_up_s

    def _retry_later(self) -> None:
        self._due_s = time.monotonic() + self._retry_s * self._jitter.uniform(0.75, 1.0)
        self._retry_s = min(2 * self._retry_s, self._pace.last_retry_s)

    def _watch_changed(self) -> None:
        """Handle the start or end of a watch by kubelet. A stream that lasted shows that waiting longer helped."""
        now_s = time.monotonic()
        if not self.server.watched:
            if now_s - self._changed_s >= self._patience_s:
                self._patience_s = self._pace.unwatched_s
            self._due_s = now_s + self._patience_s
        self._changed_s = now_s
        self._show(self.registration.state, reason=self.registration.reason)
        self._woken.set()

    # ---------------------------------------------------------------- status

    def _failed(self, reason: str, error: Exception | None = None) -> None:
        said = (self.registration.state, self.registration.reason) == (RegistrationState.FAILED, reason)
        self._show(RegistrationState.FAILED, reason=reason)
        if not said:
            unforeseen = None if isinstance(error, NodeagentError) else error
            log.warning("not-registered", resource=self.registration.resource, error=reason, exc_info=unforeseen)

    def _show(self, state: RegistrationState, *, reason: str = "", kubelet_inode: int | None = None) -> None:
        before = self.registration
        after = before.to(
            state, reason, kubelet_inode=kubelet_inode or before.kubelet_inode, watched=self.server.watched
        )
        if after != before:
            self.registration = after
            self._on_change()

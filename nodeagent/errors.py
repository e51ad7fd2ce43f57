"""The error tree.

    NodeagentError
    ├── Refused        a request that does not fit; carries its numbers and what would admit it
    ├── InputError     an invalid value from a user, a peer or a file
    ├── HostError      the machine did not answer or answered nonsense (sysfs, udev, NVML)
    ├── StateError     the ledger's durable form cannot be read or written
    │   └── LedgerTooNewError   a newer build wrote it; waiting does not help
    ├── PeerError      kubelet, the runtime or another peer did not do its part
    └── ConfigError    the configuration is invalid; carries the path of the key

Every message reads "cannot VERB OBJECT: CAUSE" and names the value and its place.
"""


class NodeagentError(Exception):
    """Base class of all errors that this program raises on purpose."""


def cause_of(error: Exception) -> str:
    """Return the cause of an error for the end of a message; for an OSError without its number and path."""
    return (isinstance(error, OSError) and error.strerror) or str(error)


class Refused(NodeagentError):  # noqa: N818 - a refusal is an answer, not an error
    """A request that was understood and does not fit.

    want and free count `unit`: CPUs, devices, shares, pages, blocks, ids or bytes. would_admit is the smallest change
    found that would make it fit, or "".
    """

    def __init__(self, why: str, *, want: int, free: int, unit: str, would_admit: str = "") -> None:
        super().__init__(why)
        self.why = why
        self.want = want
        self.free = free
        self.unit = unit
        self.would_admit = would_admit

    def __str__(self) -> str:
        return f"{self.why}; {self.would_admit}" if self.would_admit else self.why


class InputError(NodeagentError, ValueError):
    """An invalid value, with its source."""


class HostError(NodeagentError):
    """The machine cannot be read or changed; the message names the path."""


class StateError(NodeagentError):
    """The ledger's durable form cannot be read or written."""


class LedgerTooNewError(StateError):
    """The ledger has a layout that this build does not know, and cannot be migrated back to one that it does."""


class PeerError(NodeagentError):
    """Kubelet or another peer did not do its part.

    status: HTTP status of the response, 0 if there was none. retry_after_s: how many seconds the peer asked to wait
    before a retry. lasting: whether the same call would fail again soon.
    """

    status: int = 0
    retry_after_s: float = 0.0
    lasting: bool = False


class ConfigError(NodeagentError):
    """The configuration is invalid."""

    def __init__(self, why: str, *, key: str = "") -> None:
        """key: path of the wrong value, such as $.resources[0].kind, if it is not in the text."""
        super().__init__(why)
        self.key = key

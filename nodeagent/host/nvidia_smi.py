"""What of a GPU is read and set through nvidia-smi: the time slice of CUDA programs, for which NVML has no function,
and with it the compute mode.

`nvidia-smi compute-policy` (driver 455 and later): `-i UUID --set-timeslice N`, N being 0=DEFAULT, 1=SHORT, 2=MEDIUM or
3=LONG; `-l` lists it. It needs root. A driver that is loaded again starts with the default.
"""

from __future__ import annotations

import re

from nodeagent.errors import HostError
from nodeagent.host.driver_programs import DriverProgram, DriverSearch, run, shortened

PROGRAM = "nvidia-smi"
DEADLINE_S = 8.0
ANYWHERE = DriverSearch()
INTERVALS = ("Default", "Short", "Medium", "Long")
"""By the number that nvidia-smi takes."""
_LISTED = re.compile(rf"\btime-?slice\b[\W_]+({'|'.join(INTERVALS)})\b", re.IGNORECASE)
_MODES = ("Default", "Exclusive_Thread", "Exclusive_Process", "Prohibited")


class NvidiaSmi:
    """The program. Every call blocks, for DEADLINE_S at most, and raises HostError."""

    def __init__(self, search: DriverSearch = ANYWHERE) -> None:
        """search: where the program is looked for."""
        self._search = search

    def is_there(self) -> bool:
        """Return whether the program is found."""
        return self._search.find(PROGRAM) is not None

    def compute_mode(self, uuid: str) -> str:
        """Return the compute mode of a GPU, such as Default or Prohibited."""
        text = self._run("-i", uuid, "--query-gpu=compute_mode", "--format=csv,noheader")
        if text not in _MODES:
            raise HostError(f"cannot read the compute mode of {uuid}: {PROGRAM} says {shortened(text)!r}")
        return text

    def time_slice(self, uuid: str) -> str:
        """Return the time slice of a GPU, one of INTERVALS."""
        found = _LISTED.findall(text := self._run("compute-policy", "-i", uuid, "-l"))
        if len(found) != 1:
            raise HostError(f"cannot read the time slice of {uuid}: {PROGRAM} says {shortened(text)!r}")
        return str(found[0]).capitalize()

    def set_time_slice(self, uuid: str, interval: str) -> None:
        """Set the time slice of a GPU to one of INTERVALS, and read it back."""
        number = INTERVALS.index(interval)
        try:
            said = self._run("compute-policy", "-i", uuid, "--set-timeslice", str(number))
        except HostError as error:
            raise HostError(f"cannot set the time slice of {uuid} to {interval}: {error}") from None
        if (now := self.time_slice(uuid)) != interval:
            raise HostError(f"cannot set the time slice of {uuid} to {interval}: it is {now}; {shortened(said)}")

    def _run(self, *words: str) -> str:
        return run(self._program(), words, deadline_s=DEADLINE_S)

    def _program(self) -> DriverProgram:
        found = self._search.find(PROGRAM)
        if found is None:
            raise HostError(f"cannot find {PROGRAM}: neither PATH nor the driver's root (/run/nvidia/driver) has it")
        return found

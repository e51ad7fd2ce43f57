"""Names of files in the state folder that record what was changed for holders. One that is there shows that something
may have to be undone, without loading what can read it."""

from __future__ import annotations

TUNING = "tuning.json"
"""Frequencies and wake-up latencies of CPUs."""
PARTITIONS, MIG_MODES = "partitions.json", "mig-modes.json"
"""MIG instances, and the GPUs that were put into MIG mode."""
SHARING = "sharing.json"
"""MPS daemons and time slices."""
PASSTHROUGH = "passthrough.json"
"""PCI functions under a VFIO driver."""
KINDS = "kinds.json"
"""Devices that kinds have prepared, or begun to."""
VFS = "vfs.json"
"""Virtual functions that were made."""
INTERFACES = "interfaces.json"
"""Network interfaces that were moved into pods."""
DEVICE_INFO = "device-info.json"
"""Device information files for CNI plugins: which are the agent's."""
RESCTRL = "resctrl.json"
"""Groups of resctrl, and the ways that the default group gave up."""

"""The configuration of accelerators by vendor."""

from __future__ import annotations

from typing import Annotated, Literal

import msgspec

from nodeagent.config.base import AbsoluteOrEmpty, Base


class NvidiaConfig(Base, frozen=True):
    """The user-space files of NVIDIA's driver that containers with its GPUs get."""

    driver_files: Literal["auto", "inject", "off"] = "auto"
    """auto: if they are found; inject: always, a GPU without them is not handed over; off: NVIDIA's runtime adds
    them."""
    driver_root: AbsoluteOrEmpty = ""
    """The root of the file system with the driver. Empty: /run/nvidia/driver, /host, /."""


class AmdPartitionConfig(Base, frozen=True):
    """How some GPUs of AMD are partitioned. At least one of compute and memory is given."""

    gpus: Annotated[list[Annotated[str, msgspec.Meta(min_length=1, max_length=256)]], msgspec.Meta(min_length=1)]
    """Shell patterns of PCI addresses or UUIDs."""
    compute: Literal["SPX", "DPX", "TPX", "QPX", "CPX"] | None = None
    """One, two, three or four partitions, or one for each compute die. null: as it is."""
    memory: Literal["NPS1", "NPS2", "NPS4", "NPS8"] | None = None
    """Into how many parts the memory is divided; requested, it changes when the driver is loaded again. null: as it
    is."""


class AmdConfig(Base, frozen=True):
    """GPUs of AMD. They are left alone unless it is given."""

    partitions: list[AmdPartitionConfig] = []
    """Of several that match a GPU, the first."""


class DsaQueuesConfig(Base, frozen=True):
    """Work queues that are alike."""

    size: Annotated[int, msgspec.Meta(ge=1, le=65535)]
    """Entries of each; all queues of an accelerator share its max_work_queues_size."""
    count: Annotated[int, msgspec.Meta(ge=1, le=128)] = 1
    mode: Literal["dedicated", "shared"] = "dedicated"
    """Only dedicated: open to one program at a time. shared is refused, as the kernel may keep such a queue dedicated
    in the hardware."""
    priority: Annotated[int, msgspec.Meta(ge=1, le=15)] = 10


class DsaConfig(Base, frozen=True):
    """Accelerators that the admin gives to the agent, and how it divides them."""

    accelerators: Annotated[
        list[Annotated[str, msgspec.Meta(min_length=1, max_length=256)]], msgspec.Meta(min_length=1)
    ]
    """Shell patterns of names (dsa0, iax1) or PCI addresses."""
    queues: Annotated[list[DsaQueuesConfig], msgspec.Meta(min_length=1)]


class AcceleratorsConfig(Base, frozen=True):
    """Accelerators other than GPUs. They are left alone unless they are given."""

    dsa: list[DsaConfig] = []
    """Intel DSA and IAA whose work queues the agent makes for claims; of several that match one, the first."""

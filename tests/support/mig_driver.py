"""A driver whose GPUs are in a file: the state of tests/doubles/nvml_state_double.c, written and read by tests."""

from __future__ import annotations

import contextlib
import fcntl
import functools
import json
import shutil
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from nodeagent.core.partitions.geometry import Profile, Profiles
from nodeagent.host.nvml.values import NvGpu, Snapshot
from tests.builders.devices import DeviceTree
from tests.support.paths import DATA, NVML_STATE_DOUBLE

FLAGS = ("-shared", "-fPIC", "-Wall", "-Wextra", "-Werror", "-fvisibility=hidden", "-Wl,-soname,libnvidia-ml.so.1")
BUSES = (0x1B, 0x3B, 0x41, 0x5D, 0x9B, 0xAD, 0xBB, 0xCD)
CARDS: dict[str, Any] = json.loads((DATA / "mig" / "cards.json").read_text())
NVIDIA_GPU = {"pci_class": "030200", "vendor": "10de", "device": "2330", "driver": "nvidia"}
FIRST_CAP, CAPS_A_GPU = 100, 300


class Instance(NamedTuple):
    """A GPU instance as the driver has it."""

    gpu: int
    id: int
    profile: str
    start: int
    busy: bool
    complete: bool
    """Whether it has a compute instance."""


def profiles_of(card: str) -> Profiles:
    """The profiles of a card of tests/data/mig/cards.json."""
    return tuple(
        Profile(
            id=id,
            name=name,
            memory_bytes=mib << 20,
            most=most,
            slices=slices,
            multiprocessors=sm,
            copy_engines=ce,
            decoders=dec,
            encoders=enc,
            jpeg_engines=jpeg,
            ofa_engines=ofa,
            size=size,
            starts=tuple(starts),
        )
        for _, id, name, mib, most, slices, sm, ce, dec, enc, jpeg, ofa, size, starts in CARDS[card]["profiles"]
    )


def snapshot_of(*cards: str, **options: Any) -> Snapshot:
    """What NVML shows of GPUs in MIG mode without instances."""
    gpus = tuple(
        NvGpu(
            pci_address=address(number),
            uuid=uuid(number),
            name=CARDS[card]["name"],
            minor=number,
            memory_bytes=CARDS[card]["memory_mib"] << 20,
            mig_enabled=True,
            profiles=profiles_of(card),
            **options,
        )
        for number, card in enumerate(cards)
    )
    return Snapshot(driver_version="580.95", gpus=gpus)


def address(gpu: int) -> str:
    """The PCI address of a GPU of the driver."""
    return f"0000:{BUSES[gpu]:02x}:00.0"


def uuid(gpu: int) -> str:
    return f"GPU-{gpu:08x}-0000-0000-0000-000000000000"


@functools.cache
def library(*, old: bool = False) -> Path:
    """The folder of the compiled double, for LD_LIBRARY_PATH. old: as of a driver before 535, which lacks functions."""
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None:
        pytest.skip("no C compiler for the double of libnvidia-ml.so.1")
    folder = Path(tempfile.mkdtemp(prefix="nvml-state-"))
    flags = (*FLAGS, "-DOLD_DRIVER") if old else FLAGS
    subprocess.run([compiler, *flags, "-o", str(folder / "libnvidia-ml.so.1"), str(NVML_STATE_DOUBLE)], check=True)
    return folder


@dataclass
class MigDriver:
    """The driver of one machine."""

    path: Path
    """The state."""
    cards: Sequence[str]

    @classmethod
    def of(cls, path: Path, *cards: str, mig: bool = True, needs_reset: bool = False) -> MigDriver:
        """A driver with these cards, in MIG mode or not. needs_reset: whether the mode changes only at a reset."""
        lines = []
        for gpu, card in enumerate(cards):
            facts = CARDS[card]
            totals = " ".join(str(facts["totals"][name]) for name in ("sm", "ce", "dec", "enc", "jpeg", "ofa"))
            mode = f"{int(mig)} {int(mig)} {int(needs_reset)} 0 0"
            lines.append(f"gpu {BUSES[gpu]:x} {mode} {facts['memory_mib']} {facts['slices']} {totals} {facts['name']}")
            for number, id, name, mib, most, *units, size, starts in facts["profiles"]:
                numbers = " ".join(map(str, (id, mib, most, *units, size)))
                lines.append(f"profile {gpu} {number} {numbers} {name} {','.join(map(str, starts))}")
        made = cls(path, cards)
        made._write(lines)
        return made

    @property
    def env(self) -> dict[str, str]:
        """What the process that loads the library needs."""
        return {"LD_LIBRARY_PATH": str(library()), "FAKE_NVML_STATE": str(self.path)}

    def machine(self, tree: DeviceTree) -> None:
        """Put the GPUs into a tree, with the driver's table of capabilities and its device nodes."""
        rows = []
        for gpu in range(len(self.cards)):
            tree.pci(address(gpu), **NVIDIA_GPU)  # type: ignore[arg-type]
            tree.node(f"/dev/nvidia{gpu}")
            for gi in range(16):
                first = FIRST_CAP + gpu * CAPS_A_GPU + gi * 10
                rows += [f"gpu{gpu}/gi{gi}/access {first}", f"gpu{gpu}/gi{gi}/ci0/access {first + 1}"]
                tree.node(f"/dev/nvidia-caps/nvidia-cap{first}")
                tree.node(f"/dev/nvidia-caps/nvidia-cap{first + 1}")
        tree.node("/dev/nvidiactl")
        tree.write("proc/driver/nvidia-caps/mig-minors", "\n".join(("config 1", *rows)))

    def install(self, root: Path) -> None:
        """Put the library where an agent finds it whose root this is."""
        folder = root / "run/nvidia/driver/usr/lib64"
        folder.mkdir(parents=True)
        shutil.copy(library() / "libnvidia-ml.so.1", folder)

    # ---------------------------------------------------------------- what it shows

    def instances(self) -> list[Instance]:
        """Every GPU instance, in order."""
        with self._locked():
            lines = [line.split() for line in self.path.read_text().splitlines()]
        complete = {(int(words[1]), int(words[2])) for words in lines if words[0] == "ci"}
        found = []
        for words in lines:
            if words[0] == "gi":
                gpu, id, number, start, busy = map(int, words[1:])
                name = next(one[2] for one in CARDS[self.cards[gpu]]["profiles"] if one[0] == number)
                found.append(Instance(gpu, id, name, start, bool(busy), (gpu, id) in complete))
        return sorted(found)

    def there(self) -> set[tuple[int, str, int]]:
        """(GPU, profile, start) of every instance."""
        return {(one.gpu, one.profile, one.start) for one in self.instances()}

    def faults(self) -> list[str]:
        """The calls that are still to fail."""
        with self._locked():
            return [line for line in self.path.read_text().splitlines() if line.startswith("fault ")]

    # ---------------------------------------------------------------- what others do to it

    def make(self, gpu: int, profile: str, start: int, *, id: int = 1, complete: bool = True) -> None:
        """An instance that another program made."""
        number = next(one[0] for one in CARDS[self.cards[gpu]]["profiles"] if one[2] == profile)
        self._add(f"gi {gpu} {id} {number} {start} 0", *([f"ci {gpu} {id} 0"] if complete else []))

    def destroy(self, gpu: int, id: int) -> None:
        """Destroy an instance, as an admin would."""
        self._change(lambda words: words[0] not in ("gi", "ci") or words[1:3] != [str(gpu), str(id)])

    def use(self, gpu: int, id: int, *, busy: bool = True) -> None:
        """Have a process use an instance, or end."""
        self._edit(("gi", str(gpu), str(id)), 5, int(busy))

    def compute(self, gpu: int, processes: int) -> None:
        """Have processes compute on a whole GPU."""
        self._edit_gpu(gpu, 5, processes)

    def lose(self, gpu: int, *, lost: bool = True) -> None:
        """Let a GPU fall off the bus, or come back."""
        self._edit_gpu(gpu, 6, int(lost))

    def sign(self, gpu: int, name: str, value: int) -> None:
        """Let a GPU say something of its health; the names are those of the double."""
        self._change(lambda words: words[:3] != ["health", str(gpu), name])
        self._add(f"health {gpu} {name} {value}")

    def errors(self, gpu: int, gi: int, count: int) -> None:
        """Let an instance have had uncorrected errors of its memory."""
        self._change(lambda words: words[:3] != ["errors", str(gpu), str(gi)])
        self._add(f"errors {gpu} {gi} {count}")

    def xid(self, gpu: int, code: int, instance: tuple[int, int] = (-1, -1)) -> None:
        """Let the driver report an error, of a GPU or of one of its instances."""
        self._add(f"xid {gpu} {code} {instance[0]} {instance[1]}")

    def fault(self, function: str, what: str, count: int = 1) -> None:
        """Let the next calls of a function hang, hang after they did their work, or fail with an NVML code."""
        self._add(f"fault {function} {what} {count}")

    def heal(self) -> None:
        """Forget the faults that have not happened."""
        self._change(lambda words: words[0] != "fault")

    def reset(self) -> None:
        """A reset of all GPUs, as at a reboot: no instance survives, and a pending mode takes effect. What lasts of
        their health is what the double says of them from here on."""
        self._change(lambda words: words[0] not in ("gi", "ci", "fault", "health", "errors", "xid"))
        with self._locked():
            lines = [line.split() for line in self.path.read_text().splitlines()]
            for words in lines:
                if words[0] == "gpu":
                    words[2], words[5] = words[3], "0"
            self._write_locked(" ".join(words) for words in lines)

    def _edit_gpu(self, gpu: int, field: int, value: int) -> None:
        self._edit(("gpu", f"{BUSES[gpu]:x}"), field, value)

    def _edit(self, head: tuple[str, ...], field: int, value: int) -> None:
        with self._locked():
            lines = [line.split() for line in self.path.read_text().splitlines()]
            (found,) = [words for words in lines if tuple(words[: len(head)]) == head]
            found[field] = str(value)
            self._write_locked(" ".join(words) for words in lines)

    def _add(self, *lines: str) -> None:
        with self._locked():
            self._write_locked([*self.path.read_text().splitlines(), *lines])

    def _change(self, keep: Any) -> None:
        with self._locked():
            self._write_locked(line for line in self.path.read_text().splitlines() if keep(line.split()))

    def _write(self, lines: Sequence[str]) -> None:
        with self._locked():
            self._write_locked(lines)

    def _write_locked(self, lines: Any) -> None:
        draft = self.path.with_suffix(".new")
        draft.write_text("\n".join(lines) + "\n")
        draft.rename(self.path)

    @contextlib.contextmanager
    def _locked(self) -> Iterator[None]:
        """The lock that the library holds during a call."""
        with Path(f"{self.path}.lock").open("a") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield

"""NVML in its own process, against a real shared library that answers, fails, loses a GPU or hangs as told."""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Mapping
from pathlib import Path

import pytest

from nodeagent.host.nvml.client import Failure, Probe, Snapshot, Xid, has_nvidia
from nodeagent.host.nvml.library import LIBRARY
from nodeagent.host.nvml.values import Fabric, sysfs_address
from nodeagent.host.pci import Function
from tests.support.paths import CHECKOUT, NVML_DOUBLE

DEADLINE_S = 20.0


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the compiled double."""
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None:
        pytest.skip("no C compiler for the double of libnvidia-ml.so.1")
    folder = tmp_path_factory.mktemp("nvml")
    built = folder / "libnvidia-ml.so.1"
    flags = ("-shared", "-fPIC", "-Wall", "-Wextra", "-Werror", "-fvisibility=hidden", "-Wl,-soname,libnvidia-ml.so.1")
    subprocess.run([compiler, *flags, "-o", str(built), str(NVML_DOUBLE)], check=True)
    return folder


@contextlib.asynccontextmanager
async def probing(
    library: Path, mode: str = "", *, backoff_s: float = 1.0, root: Path = Path("/"), **env: str
) -> AsyncIterator[Probe]:
    """A probe on the double, closed afterwards."""
    probe = Probe(env=_env(library, mode, env), root=str(root), backoff_s=backoff_s)
    try:
        yield probe
    finally:
        await probe.close()


def _env(library: Path, mode: str, env: Mapping[str, str]) -> dict[str, str]:
    return {"LD_LIBRARY_PATH": str(library), "FAKE_NVML": mode, **env}


async def _snapshot(probe: Probe) -> Snapshot:
    answer = await probe.snapshot(DEADLINE_S)
    assert isinstance(answer, Snapshot), answer
    return answer


async def test_a_snapshot_has_every_gpu_as_the_library_tells_it(library: Path) -> None:
    """Identity, memory, ECC, and what a GPU does not support is None."""
    async with probing(library, FAKE_NVML_ECC="5", FAKE_NVML_ROWS_PENDING="1") as probe:
        answer = await _snapshot(probe)
    assert answer.driver_version == "580.95.05"
    assert answer.errors == ()
    assert [gpu.pci_address for gpu in answer.gpus] == ["0000:1b:00.0", "0000:3b:00.0", "0000:9b:00.0", "0000:bb:00.0"]
    assert answer.gpus[1].uuid == "GPU-00000001-0000-0000-0000-000000000000"
    assert {(gpu.name, gpu.memory_bytes) for gpu in answer.gpus} == {("NVIDIA Double 80GB", 80 << 30)}
    assert [gpu.minor for gpu in answer.gpus] == [0, 1, 2, 3]
    assert [gpu.ecc_uncorrected for gpu in answer.gpus] == [None, 5, 0, 0]
    assert [gpu.rows_pending for gpu in answer.gpus] == [None, True, False, False]
    assert [gpu.rows_failed for gpu in answer.gpus] == [None, False, False, False]


async def test_the_fabric_is_told_once_a_gpu_is_registered_with_it(library: Path) -> None:
    """Not while it is being registered, nor where the GPU or the driver knows of none."""
    async with probing(library, FAKE_NVML_FABRIC="1") as probe:
        gpus = (await _snapshot(probe)).gpus
    fabric = Fabric(cluster="abababab-abab-abab-abab-abababababab", clique=7)
    assert [gpu.fabric for gpu in gpus] == [fabric, fabric, None, None]
    async with probing(library) as probe:
        assert {gpu.fabric for gpu in (await _snapshot(probe)).gpus} == {None}


async def test_links_are_counted_by_the_address_at_their_other_end(library: Path) -> None:
    """Four between the first two; the others reach a switch, with a gap in the numbers and one link down."""
    async with probing(library) as probe:
        gpus = (await _snapshot(probe)).gpus
    assert [gpu.nvlinks for gpu in gpus] == [
        {"0000:3b:00.0": 4},
        {"0000:1b:00.0": 4},
        {"0000:d1:00.0": 2},
        {"0000:d1:00.0": 2},
    ]


async def test_each_link_is_active_inactive_or_not_there(library: Path, tmp_path: Path) -> None:
    """A link goes down between two questions; one that is not wired has no number."""
    down = tmp_path / "down"
    async with probing(library, FAKE_NVML_LINK_DOWN=str(down)) as probe:
        before = (await _snapshot(probe)).gpus
        down.touch()
        after = (await _snapshot(probe)).gpus
    assert [(gpu.nvlinks_active, gpu.nvlinks_inactive) for gpu in before] == [
        ((0, 1, 2, 3), ()),
        ((0, 1, 2, 3), ()),
        ((2, 3), (0,)),
        ((2, 3), (0,)),
    ]
    assert (after[1].nvlinks_active, after[1].nvlinks_inactive) == ((0, 1, 2), (3,))
    assert after[1].nvlinks == {"0000:1b:00.0": 3}


async def test_mig_instances_are_listed_with_profile_and_ids(library: Path) -> None:
    """Places where no instance was made are passed over."""
    async with probing(library) as probe:
        gpus = (await _snapshot(probe)).gpus
    assert [gpu.mig_enabled for gpu in gpus] == [False, False, False, True]
    assert [(mig.profile, mig.memory_bytes >> 30, mig.gpu_instance, mig.compute_instance) for mig in gpus[3].migs] == [
        ("3g.40gb", 40, 2, 0),
        ("1g.10gb", 10, 9, 0),
    ]
    assert gpus[3].migs[0].uuid.startswith("MIG-")


async def test_the_helper_is_kept_between_questions(library: Path) -> None:
    """One process serves all of them, and close ends it."""
    async with probing(library) as probe:
        assert probe.pid is None
        first = await _snapshot(probe)
        pid = probe.pid
        assert await _snapshot(probe) == first
        assert probe.pid == pid is not None
    assert not _alive(pid)


async def test_questions_asked_at_once_are_all_answered(library: Path) -> None:
    """They take turns at one process."""
    async with probing(library) as probe:
        answers = await asyncio.gather(*(_snapshot(probe) for _ in range(5)))
    assert all(answer == answers[0] for answer in answers)


async def _started(probe: Probe) -> int:
    """The process id as soon as there is one: each turn of the loop brings it nearer."""
    while (pid := probe.pid) is None:  # noqa: ASYNC110
        await asyncio.sleep(0)
    return pid


def _alive(pid: int | None) -> bool:
    return Path(f"/proc/{pid}").exists()


@pytest.mark.parametrize("mode", ["hang-init", "hang-uuid"])
async def test_a_library_that_hangs_is_killed_at_the_deadline(library: Path, mode: str) -> None:
    """The reason names the deadline, and no process is left behind."""
    async with probing(library, mode) as probe:
        question = asyncio.create_task(probe.snapshot(1.0))
        pid = await _started(probe)
        began = time.monotonic()
        assert await question == Failure(absent=False, reason="NVML did not answer within 1 s")
        assert time.monotonic() - began < 5
        assert probe.pid is None
        assert not _alive(pid)


async def test_during_the_back_off_the_failure_is_told_at_once(library: Path) -> None:
    """No process is started for it; the words stay the same, so that nothing seems to change."""
    async with probing(library, "hang-init", backoff_s=60) as probe:
        first = await probe.snapshot(0.5)
        began = time.monotonic()
        assert await probe.snapshot(30) == first
        assert time.monotonic() - began < 1
        assert probe.pid is None


async def test_after_the_back_off_a_library_that_works_again_is_used(library: Path) -> None:
    """The driver was reloaded under the running agent."""
    probe = Probe(env=_env(library, "driver-not-loaded", {}), backoff_s=0)
    try:
        assert await probe.snapshot(DEADLINE_S) == Failure(absent=False, reason="NVML failed: Driver Not Loaded")
        probe._env["FAKE_NVML"] = ""
        assert len((await _snapshot(probe)).gpus) == 4
    finally:
        await probe.close()


async def test_no_library_is_absence_and_says_so(tmp_path: Path) -> None:
    """Whatever lies on this machine, an empty library folder and a name that is not there."""
    (tmp_path / "libnvidia-ml.so.1").write_text("not a library")
    async with probing(tmp_path, root=tmp_path) as probe:
        answer = await probe.snapshot(DEADLINE_S)
    assert answer == Failure(absent=True, reason="there is no library libnvidia-ml.so.1")


def _put(root: Path, folder: str, content: bytes) -> Path:
    path = root / folder / LIBRARY
    path.parent.mkdir(parents=True)
    path.write_bytes(content)
    return path


@pytest.mark.parametrize("top", ["run/nvidia/driver", "host"])
@pytest.mark.parametrize("folder", [f"usr/lib/{os.uname().machine}-linux-gnu", "usr/lib64", "usr/lib", "lib64", "lib"])
async def test_a_container_finds_the_library_in_the_drivers_root_and_in_the_hosts_folders(
    library: Path, tmp_path: Path, top: str, folder: str
) -> None:
    """The loader has none (its folder has a text of that name); the operator's driver container or the host has."""
    _put(tmp_path, "loader", b"not a library")
    _put(tmp_path, f"{top}/{folder}", (library / LIBRARY).read_bytes())
    async with probing(tmp_path / "loader", root=tmp_path) as probe:
        assert len((await _snapshot(probe)).gpus) == 4


async def test_the_loaders_library_comes_before_the_drivers_root(library: Path, tmp_path: Path) -> None:
    """Where a runtime class puts the library into the container, that is the one that fits its device nodes."""
    _put(tmp_path, "run/nvidia/driver/usr/lib64", b"not a library")
    async with probing(library, root=tmp_path) as probe:
        assert len((await _snapshot(probe)).gpus) == 4


async def test_a_library_that_does_not_load_is_passed_over_for_one_that_does(library: Path, tmp_path: Path) -> None:
    """A driver container that still unpacks, next to the host's driver."""
    _put(tmp_path, "run/nvidia/driver/usr/lib64", (library / LIBRARY).read_bytes()[:100])
    _put(tmp_path, "host/usr/lib64", (library / LIBRARY).read_bytes())
    async with probing(tmp_path, root=tmp_path) as probe:
        assert len((await _snapshot(probe)).gpus) == 4


async def test_a_library_that_is_there_and_does_not_load_is_no_absence(tmp_path: Path) -> None:
    """It is named, with the loader's reason; the next question may find it whole."""
    path = _put(tmp_path, "run/nvidia/driver/usr/lib64", b"not a library")
    async with probing(tmp_path, root=tmp_path) as probe:
        answer = await probe.snapshot(DEADLINE_S)
    assert answer == Failure(absent=False, reason=f"cannot load {path}: file too short")


async def test_a_library_that_fails_as_a_whole_is_degraded_with_its_words(library: Path) -> None:
    async with probing(library, "unknown") as probe:
        assert await probe.snapshot(DEADLINE_S) == Failure(absent=False, reason="NVML failed: Unknown Error")


@pytest.mark.parametrize(
    ("mode", "said"),
    [
        ("lost", "cannot read GPU number 2 through NVML: GPU is lost"),
        ("lost-late", "cannot read GPU 0000:9b:00.0 through NVML: GPU is lost"),
    ],
)
async def test_a_lost_gpu_does_not_spoil_the_others(library: Path, mode: str, said: str) -> None:
    """Lost before or while it is read: the other three are whole."""
    async with probing(library, mode) as probe:
        answer = await _snapshot(probe)
    assert [gpu.minor for gpu in answer.gpus] == [0, 1, 3]
    assert said in answer.errors


async def test_what_the_library_prints_does_not_disturb_the_answers(library: Path) -> None:
    async with probing(library, "noisy") as probe:
        assert len((await _snapshot(probe)).gpus) == 4


async def test_an_xid_reaches_the_parent_without_a_question(library: Path, tmp_path: Path) -> None:
    """Also after the helper was killed and started again."""
    trigger = tmp_path / "xid"
    async with probing(library, backoff_s=0, FAKE_NVML_XID=str(trigger)) as probe:
        events = probe.events()
        for _ in range(2):
            await _snapshot(probe)
            trigger.touch()
            assert await asyncio.wait_for(anext(events), DEADLINE_S) == Xid(pci_address="0000:3b:00.0", code=79)
            await probe.close()


async def test_a_helper_that_is_killed_fails_that_question_only(library: Path) -> None:
    """kill -9 from outside, in the middle of a question."""
    async with probing(library, "hang-uuid", backoff_s=0) as probe:
        question = asyncio.create_task(probe.snapshot(DEADLINE_S))
        os.kill(await _started(probe), 9)
        assert await question == Failure(absent=False, reason="the NVML helper ended without an answer")
        probe._env["FAKE_NVML"] = ""
        assert len((await _snapshot(probe)).gpus) == 4


async def test_the_helper_dies_with_its_parent_even_while_it_hangs(library: Path) -> None:
    """The parent is a process of its own that is killed."""
    script = (
        "import asyncio, sys\n"
        "from nodeagent.host.nvml.client import Probe\n"
        "async def main():\n"
        "    probe = Probe()\n"
        "    asyncio.ensure_future(probe.snapshot(60))\n"
        "    while probe.pid is None: await asyncio.sleep(0.01)\n"
        "    while 'nvidia-ml' not in open(f'/proc/{probe.pid}/maps').read(): await asyncio.sleep(0.01)\n"
        "    print(probe.pid, flush=True)\n"
        "    await asyncio.sleep(60)\n"
        "asyncio.run(main())\n"
    )
    env = {**os.environ, **_env(library, "hang-init", {})}
    parent = await asyncio.create_subprocess_exec(
        sys.executable, "-c", script, stdout=asyncio.subprocess.PIPE, env=env, cwd=CHECKOUT
    )
    assert parent.stdout is not None
    pid = int(await parent.stdout.readline())
    ended = os.pidfd_open(pid)
    parent.kill()
    await parent.wait()
    gone = asyncio.Event()
    asyncio.get_running_loop().add_reader(ended, gone.set)
    await asyncio.wait_for(gone.wait(), DEADLINE_S)
    asyncio.get_running_loop().remove_reader(ended)
    os.close(ended)


def test_the_daemon_side_does_not_load_the_bindings() -> None:
    """Importing the probe and the kinds brings neither pynvml nor pyudev into the process."""
    script = (
        "import sys, nodeagent.host.nvml.client, nodeagent.host.devices.all_kinds, nodeagent.host.uevents\n"
        "print(sorted({'pynvml', 'pyudev'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize(
    ("told", "wanted"),
    [("00000000:3B:00.0", "0000:3b:00.0"), ("00010000:0A:1F.7", "10000:0a:1f.7"), ("0000:81:00.0", "0000:81:00.0")],
)
def test_an_address_is_written_as_sysfs_writes_it(told: str, wanted: str) -> None:
    assert sysfs_address(told) == wanted


def test_nvml_is_worth_asking_only_where_its_vendor_has_a_display_function() -> None:
    """A sound function or a bridge of that vendor is none."""
    gpu = Function(address="0000:3b:00.0", path="", vendor="10de", pci_class="030200")
    sound = Function(address="0000:3b:00.1", path="", vendor="10de", pci_class="040300")
    assert has_nvidia([sound, gpu])
    assert not has_nvidia([sound])

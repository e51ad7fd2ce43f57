"""The files of NVIDIA's driver: those of the version that is loaded are found, wherever a distribution has them."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec.structs import replace

from nodeagent.core.model.device import ContainerEdits, Device, DriverFiles, DriverUse, Hook
from nodeagent.core.model.inventory import Inventory
from nodeagent.core.model.inventory_json import from_document, to_document
from nodeagent.errors import HostError
from nodeagent.host.driver_root import elf
from nodeagent.host.driver_root.find import CONTAINER_FOLDERS, find
from nodeagent.host.driver_root.render import AUTO, INJECT, OFF, with_driver
from nodeagent.host.sysfs.recording import RecordingSysFs
from nodeagent.host.sysfs.sysfs import SysFs
from tests.builders.driver_root import COMPUTE, VERSION, DriverRoot
from tests.builders.driver_root import elf as library


def _found(root: Path, configured: str = "", *, own: bool = True) -> DriverFiles:
    return find(SysFs(root), VERSION, configured, own=own)[0]


def _warnings(root: Path) -> tuple[str, ...]:
    return find(SysFs(root), VERSION, own=True)[1]


def _by_host(files: DriverFiles) -> dict[str, tuple[str, ...]]:
    return {one.host_path: one.container_paths for one in files.files}


@pytest.mark.parametrize("folder", ["usr/lib/x86_64-linux-gnu", "usr/lib64", "usr/lib", "usr/lib64/nvidia"])
@pytest.mark.skipif(CONTAINER_FOLDERS[0] != "/usr/lib/x86_64-linux-gnu", reason="the folders are those of x86-64")
def test_the_libraries_of_the_loaded_version_are_found_in_the_folders_of_distributions(
    tmp_path: Path, folder: str
) -> None:
    DriverRoot(tmp_path, folder).install()
    found = _found(tmp_path)
    assert found.root == "/"
    cuda = _by_host(found)[f"/{folder}/libcuda.so.{VERSION}"]
    assert cuda == tuple(f"{to}/{name}" for to in CONTAINER_FOLDERS for name in ("libcuda.so", "libcuda.so.1"))
    assert f"/{folder}/libnvidia-gpucomp.so.{VERSION}" in _by_host(found)
    assert _warnings(tmp_path) == ()


def test_nothing_of_another_version_is_given(tmp_path: Path) -> None:
    """An update has replaced the files while the old driver is loaded: the links lead to the new ones."""
    root = DriverRoot(tmp_path)
    root.install()
    root.install("590.10.01")
    found = _found(tmp_path)
    assert not [path for path in _by_host(found) if "590.10.01" in path]
    assert f"/usr/lib/x86_64-linux-gnu/libcuda.so.{VERSION}" in _by_host(found)
    assert found.has_cuda


def test_a_library_is_given_under_its_soname_although_there_is_no_link_to_it(tmp_path: Path) -> None:
    root = DriverRoot(tmp_path)
    root.write(f"usr/lib64/libcuda.so.{VERSION}", library("libcuda.so.1"))
    assert "/usr/lib64/libcuda.so.1" in _by_host(_found(tmp_path))[f"/usr/lib64/libcuda.so.{VERSION}"]


def test_libraries_of_another_word_size_are_left_out(tmp_path: Path) -> None:
    root = DriverRoot(tmp_path, "usr/lib64")
    root.install()
    DriverRoot(tmp_path, "usr/lib").library("libcuda", "libcuda.so.1", bits=32)
    DriverRoot(tmp_path, "usr/lib").library("libnvidia-opencl", "libnvidia-opencl.so.1", bits=32)
    paths = _by_host(_found(tmp_path))
    assert [path for path in paths if path.startswith("/usr/lib/")] == []


def test_the_folders_of_the_loader_s_cache_come_first(tmp_path: Path) -> None:
    """Where an alternatives system keeps several drivers, links of links lead to the folder of the one in use."""
    root = DriverRoot(tmp_path, "opt/nvidia/tesla-580")
    root.install()
    root.link("etc/alternatives/cuda", "/opt/nvidia/tesla-580/libcuda.so.1")
    root.link("usr/lib/x86_64-linux-gnu/libcuda.so.1", "/etc/alternatives/cuda")
    assert not _found(tmp_path).files
    root.cache("/lib/x86_64-linux-gnu/libc.so.6", "/usr/lib/x86_64-linux-gnu/libcuda.so.1")
    found = _found(tmp_path)
    assert f"/opt/nvidia/tesla-580/libcuda.so.{VERSION}" in _by_host(found)
    assert "/opt/nvidia/tesla-580" in found.searched


def test_a_driver_container_s_root_is_a_root_of_its_own(tmp_path: Path) -> None:
    """Its absolute links lead into itself, and the paths are those of the host."""
    root = DriverRoot(tmp_path / "run/nvidia/driver", "usr/lib/x86_64-linux-gnu")
    root.install()
    (root.root / "usr/bin/nvidia-smi").unlink()
    root.write("opt/smi", b"\x7fELF")
    root.link("usr/bin/nvidia-smi", "/opt/smi")
    found = _found(tmp_path, own=False)
    assert found.root == "/run/nvidia/driver"
    assert _by_host(found)["/run/nvidia/driver/opt/smi"] == ("/usr/bin/nvidia-smi",)
    assert all(path.startswith("/run/nvidia/driver/") for path in _by_host(found))


def test_the_host_s_root_at_host_gives_the_host_s_paths(tmp_path: Path) -> None:
    DriverRoot(tmp_path / "host", "usr/lib64").install()
    found = _found(tmp_path, own=False)
    assert f"/usr/lib64/libcuda.so.{VERSION}" in _by_host(found)
    assert found.root == "/"


def test_a_container_s_own_libraries_are_not_taken_for_the_host_s(tmp_path: Path) -> None:
    DriverRoot(tmp_path).install()
    assert _found(tmp_path, own=False).files == ()


def test_a_configured_root_is_the_only_one(tmp_path: Path) -> None:
    DriverRoot(tmp_path / "home/kubernetes/bin/nvidia", "lib64").install()
    DriverRoot(tmp_path).install()
    found = _found(tmp_path, "/home/kubernetes/bin/nvidia/")
    assert found.root == "/home/kubernetes/bin/nvidia"
    assert f"/home/kubernetes/bin/nvidia/lib64/libcuda.so.{VERSION}" in _by_host(found)


def test_a_configured_root_may_be_mounted_where_driver_containers_have_theirs(tmp_path: Path) -> None:
    """As the chart does: the host's paths are those of the configured root."""
    DriverRoot(tmp_path / "run/nvidia/driver", "lib64").install()
    found = _found(tmp_path, "/home/kubernetes/bin/nvidia", own=False)
    assert found.root == "/home/kubernetes/bin/nvidia"
    assert f"/home/kubernetes/bin/nvidia/lib64/libcuda.so.{VERSION}" in _by_host(found)


def test_programs_firmware_and_sockets_are_given_where_they_are(tmp_path: Path) -> None:
    root = DriverRoot(tmp_path)
    root.install()
    root.write("run/nvidia-persistenced/socket", b"")
    paths = _by_host(_found(tmp_path))
    assert paths["/usr/bin/nvidia-smi"] == ("/usr/bin/nvidia-smi",)
    firmware = f"/lib/firmware/nvidia/{VERSION}/gsp_ga10x.bin"
    assert paths[firmware] == (firmware,)
    assert paths["/run/nvidia-persistenced/socket"] == ("/run/nvidia-persistenced/socket",)
    assert "/run/nvidia-fabricmanager/socket" not in paths


def test_what_is_missing_is_a_warning_that_names_the_folders(tmp_path: Path) -> None:
    DriverRoot(tmp_path).install(without=["libnvidia-ml"])
    (tmp_path / "usr/bin/nvidia-smi").unlink()
    assert [one.partition(" of")[0] for one in _warnings(tmp_path)] == [
        f"cannot find libnvidia-ml.so.{VERSION}",
        "cannot find nvidia-smi",
    ]
    assert all("/usr/" in one for one in _warnings(tmp_path))
    assert _found(tmp_path).has_cuda


@pytest.mark.parametrize(
    ("program", "first"),
    [("usr/bin/nvidia-cdi-hook", []), ("usr/local/nvidia/toolkit/nvidia-ctk", ["hook"])],
)
def test_the_vendor_s_hook_renews_the_loader_s_cache_where_it_is(
    tmp_path: Path, program: str, first: list[str]
) -> None:
    root = DriverRoot(tmp_path)
    root.install()
    assert _found(tmp_path).hook is None
    root.write(program, b"\x7fELF")
    hook = _found(tmp_path).hook
    assert hook is not None
    assert hook.path == f"/{program}"
    assert hook.args[: 2 + len(first)] == (program.rpartition("/")[2], *first, "update-ldcache")
    assert _found(tmp_path, own=False).hook is None


@pytest.mark.parametrize("top", ["", "run/nvidia/driver"])
def test_a_capture_has_the_names_of_the_files_and_not_their_content(tmp_path: Path, top: str) -> None:
    """Replayed, it gives the same files."""
    root = DriverRoot(tmp_path / "node" / top)
    root.install()
    root.write("opt/smi", b"\x7fELF")
    (root.root / "usr/bin/nvidia-smi").unlink()
    root.link("usr/bin/nvidia-smi", "/opt/smi")
    recorded = RecordingSysFs(tmp_path / "node")
    first = find(recorded, VERSION, own=True)
    assert first[0].has_cuda
    assert not any(b"ELF" in data for data in recorded.files.values())
    again = tmp_path / "again"
    for folder in recorded.folders:
        (again / folder).mkdir(parents=True, exist_ok=True)
    for path, content in recorded.tree():
        (again / path).parent.mkdir(parents=True, exist_ok=True)
        (again / path).write_bytes(content)
    for path, target in recorded.links.items():
        (again / path).parent.mkdir(parents=True, exist_ok=True)
        (again / path).symlink_to(target)
    assert find(SysFs(again), VERSION, own=True) == first


def test_the_inventory_s_document_has_the_files(tmp_path: Path) -> None:
    DriverRoot(tmp_path).install()
    files = replace(_found(tmp_path), hook=Hook(path="/usr/bin/hook", args=("hook", "x")))
    inventory = Inventory(nvidia_driver=files)
    assert from_document(msgspec.json.encode(to_document(inventory)), source="x").nvidia_driver == files


# ---------------------------------------------------------------- what a library says of itself


@given(st.binary(max_size=200), st.integers(0, 170))
def test_reading_a_library_ends_whatever_it_contains(data: bytes, at: int) -> None:
    whole = bytearray(library("libcuda.so.1"))
    whole[at : at + len(data)] = data
    path = Path(f"/dev/shm/nodeagent-elf-{id(data)}") if Path("/dev/shm").is_dir() else Path(f"elf-{id(data)}")
    path.write_bytes(bytes(whole))
    try:
        found = elf.read(str(path))
        assert found is None or found.bits in (32, 64)
    finally:
        path.unlink()


@pytest.mark.skipif(shutil.which("gcc") is None, reason="there is no gcc to link a library")
def test_a_linker_s_library_says_its_soname(tmp_path: Path) -> None:
    path = tmp_path / "libx.so.1.2"
    subprocess.run(
        ["gcc", "-shared", "-nostdlib", "-Wl,-soname,libx.so.1", "-x", "c", "/dev/null", "-o", str(path)], check=True
    )
    assert elf.read(str(path)) == elf.Library(64, "libx.so.1")
    assert elf.read(sys.executable) == elf.Library(64, "")
    assert elf.read(__file__) is None


# ---------------------------------------------------------------- what containers get


def _gpu(number: int = 0, **facts: object) -> Device:
    address = f"0000:{number + 1:02x}:00.0"
    own = {"id": address, "vendor": "10de", "driver": "nvidia", "paths": (f"/dev/nvidia{number}",), **facts}
    return Device(kind="gpu", **own)  # type: ignore[arg-type]


def _given(files: DriverFiles | None, *devices: Device, mode: str = AUTO, uses: tuple[str, ...] = ()) -> ContainerEdits:
    return with_driver(ContainerEdits(), files, devices, devices, uses=uses, mode=mode)


def test_a_container_gets_what_computing_needs_and_no_second_injector_acts(tmp_path: Path) -> None:
    DriverRoot(tmp_path).install()
    got = _given(_found(tmp_path), _gpu())
    assert got.env == {"NVIDIA_VISIBLE_DEVICES": "void"}
    names = {Path(one.container_path).name for one in got.mounts}
    assert set(COMPUTE.values()) <= names
    assert not {"libGLX_nvidia.so.0", "libnvcuvid.so.1", "nvidia_icd.json"} & names
    assert all(one.read_only for one in got.mounts)


@pytest.mark.parametrize(
    ("use", "names"),
    [
        (DriverUse.GRAPHICS, {"libGLX_nvidia.so.0", "libEGL_nvidia.so.0", "nvidia_icd.json"}),
        (DriverUse.VIDEO, {"libnvcuvid.so.1", "libnvidia-encode.so.1"}),
    ],
)
def test_graphics_and_video_are_given_on_request(tmp_path: Path, use: DriverUse, names: set[str]) -> None:
    DriverRoot(tmp_path).install()
    gpu = _gpu(attributes={"drm_card": "card1", "drm_render": "renderD129"})
    got = _given(_found(tmp_path), gpu, uses=(use,))
    assert names <= {Path(one.container_path).name for one in got.mounts}
    drawing = ["/dev/dri/card1", "/dev/dri/renderD129"] if use == DriverUse.GRAPHICS else []
    assert [one.host_path for one in got.device_nodes] == drawing


def test_the_files_go_with_the_first_gpu_of_a_request(tmp_path: Path) -> None:
    DriverRoot(tmp_path).install()
    files = replace(_found(tmp_path), hook=Hook(path="/usr/bin/nvidia-cdi-hook", args=("nvidia-cdi-hook",)))
    first, second = _gpu(0), _gpu(1)
    one, other = (with_driver(ContainerEdits(), files, [it], [first, second]) for it in (first, second))
    assert one.mounts and one.hooks == (files.hook,)
    assert not other.mounts and not other.hooks
    assert other.env == {"NVIDIA_VISIBLE_DEVICES": "void"}


def test_without_libcuda_a_gpu_is_not_handed_over_and_the_folders_are_named(tmp_path: Path) -> None:
    DriverRoot(tmp_path).install(without=["libcuda"])
    files = _found(tmp_path)
    for mode in (AUTO, INJECT):
        with pytest.raises(HostError, match=rf"no libcuda\.so\.{VERSION} .* in /usr/lib/x86_64-linux-gnu"):
            _given(files, _gpu(), mode=mode)


def test_where_no_file_is_visible_the_vendor_s_runtime_adds_them_unless_injection_is_demanded(tmp_path: Path) -> None:
    nothing = _found(tmp_path)
    assert _given(nothing, _gpu()) == ContainerEdits()
    assert _given(None, _gpu()) == ContainerEdits()
    for files in (nothing, None):
        with pytest.raises(HostError, match=r"cannot hand over 0000:01:00\.0"):
            _given(files, _gpu(), mode=INJECT)


def test_a_mig_instance_gets_the_files_and_no_node_for_drawing(tmp_path: Path) -> None:
    DriverRoot(tmp_path).install()
    nodes = ("/dev/nvidia0", "/dev/nvidia-caps/nvidia-cap57", "/dev/nvidia-caps/nvidia-cap58")
    part = _gpu(id="0000:01:00.0/mig-2-0", parent="0000:01:00.0", paths=nodes, attributes={"mig_profile": "3g.40gb"})
    got = _given(_found(tmp_path), part, uses=(DriverUse.GRAPHICS,))
    assert got.env == {"NVIDIA_VISIBLE_DEVICES": "void"}
    assert "libcuda.so.1" in {Path(one.container_path).name for one in got.mounts}
    assert got.device_nodes == ()


def test_other_gpus_and_those_of_a_guest_get_no_files_of_the_driver(tmp_path: Path) -> None:
    DriverRoot(tmp_path).install()
    files = _found(tmp_path)
    for gpu in (_gpu(vendor="1002", driver="amdgpu"), _gpu(driver="vfio-pci")):
        assert _given(files, gpu, mode=INJECT) == ContainerEdits()
    assert _given(files, _gpu(), mode=OFF) == ContainerEdits()


# ---------------------------------------------------------------- the loader of a container

PROGRAM = r"""
#include <dlfcn.h>
#include <stdio.h>
int main(void) {
    void *cuda = dlopen("libcuda.so.1", RTLD_NOW), *old = dlopen("libcuda.so", RTLD_NOW);
    int (*init)(unsigned) = cuda ? (int (*)(unsigned))dlsym(cuda, "cuInit") : 0;
    if (!init || !old) { puts(dlerror()); return 1; }
    printf("%d\n", init(0));
    return 0;
}
"""
LIBCUDA = "int answer(void); int cuInit(unsigned flags) { (void)flags; return answer(); }"


@pytest.mark.skipif(os.geteuid() != 0, reason="only root may change the root of a program")
@pytest.mark.skipif(shutil.which("gcc") is None, reason="there is no gcc to link libraries")
def test_a_program_finds_the_libraries_in_a_root_without_a_loader_cache(tmp_path: Path) -> None:
    """Real libraries, of which one needs another, in a root with glibc and what the edits mount, and nothing else."""
    host, container = tmp_path / "host", tmp_path / "container"
    folder = host / "usr/lib64"
    folder.mkdir(parents=True)
    _link(
        folder / f"libnvidia-ptxjitcompiler.so.{VERSION}",
        "libnvidia-ptxjitcompiler.so.1",
        "int answer(void) { return 42; }",
    )
    needed = folder / f"libnvidia-ptxjitcompiler.so.{VERSION}"
    _link(folder / f"libcuda.so.{VERSION}", "libcuda.so.1", LIBCUDA, str(needed))
    _link(container / "program", "", PROGRAM, "-ldl", shared=False)
    _copy_loader(container)
    got = _given(_found(host), _gpu())
    for mount in got.mounts:
        at = container / mount.container_path[1:]
        at.parent.mkdir(parents=True, exist_ok=True)
        at.hardlink_to(host / mount.host_path[1:])
    ran = subprocess.run(["chroot", str(container), "/program"], capture_output=True, text=True, check=False)
    assert (ran.returncode, ran.stdout) == (0, "42\n"), ran.stdout + ran.stderr


def _link(path: Path, soname: str, source: str, *more: str, shared: bool = True) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    file = path.with_name(f"{path.name}.c")
    file.write_text(source)
    own = ["-shared", "-fPIC", f"-Wl,-soname,{soname}"] if shared else []
    subprocess.run(["gcc", *own, "-o", str(path), str(file), *more], check=True)
    file.unlink()


def _copy_loader(root: Path) -> None:
    """glibc with its loader, at the paths that programs name."""
    shown = subprocess.run(["ldd", str(root / "program")], capture_output=True, text=True, check=True).stdout
    for path in (Path(word) for line in shown.splitlines() for word in line.split() if word.startswith("/")):
        at = root / str(path)[1:]
        at.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, at)

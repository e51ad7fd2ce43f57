"""Small CUDA programs through the driver's own library, without any toolkit: python cuda.py PROGRAM [ARGUMENT].

Only the standard library is used: the file is run by itself in processes of its own, also in a container. Each program
prints one line of JSON. Source: CUDA Driver API; PTX ISA 6.0, which the driver compiles for the GPU that is there.
"""

from __future__ import annotations

import ctypes
import json
import os
import sys
import time
from typing import Any

OUT_OF_MEMORY, ILLEGAL_ADDRESS = 2, 700
"""CUresult: CUDA_ERROR_OUT_OF_MEMORY, CUDA_ERROR_ILLEGAL_ADDRESS."""
NOWHERE = 0x10
"""An address that no allocation has."""
PTX = b"""
.version 6.0
.target sm_60
.address_size 64

.visible .entry add(.param .u64 pa, .param .u64 pb, .param .u64 pc, .param .u32 pn)
{
    .reg .pred %p<2>;
    .reg .b32 %r<9>;
    .reg .b64 %d<11>;
    ld.param.u64 %d1, [pa];
    ld.param.u64 %d2, [pb];
    ld.param.u64 %d3, [pc];
    ld.param.u32 %r1, [pn];
    mov.u32 %r2, %ctaid.x;
    mov.u32 %r3, %ntid.x;
    mov.u32 %r4, %tid.x;
    mad.lo.s32 %r5, %r2, %r3, %r4;
    setp.ge.u32 %p1, %r5, %r1;
    @%p1 bra DONE;
    mul.wide.u32 %d4, %r5, 4;
    add.s64 %d5, %d1, %d4;
    add.s64 %d6, %d2, %d4;
    add.s64 %d7, %d3, %d4;
    ld.global.u32 %r6, [%d5];
    ld.global.u32 %r7, [%d6];
    add.u32 %r8, %r6, %r7;
    st.global.u32 [%d7], %r8;
DONE:
    ret;
}

.visible .entry store(.param .u64 pa)
{
    .reg .b32 %r<2>;
    .reg .b64 %d<2>;
    ld.param.u64 %d1, [pa];
    mov.u32 %r1, 1;
    st.global.u32 [%d1], %r1;
    ret;
}
"""


class CudaError(Exception):
    """A call failed. code: its CUresult."""

    def __init__(self, call: str, code: int, name: str) -> None:
        super().__init__(f"{call}: {name or code}")
        self.code = code


class Cuda:
    """The first GPU that this process may use (CUDA_VISIBLE_DEVICES), with its primary context."""

    def __init__(self) -> None:
        self._library = ctypes.CDLL("libcuda.so.1")
        self.call("cuInit", ctypes.c_uint(0))
        device, context = ctypes.c_int(), ctypes.c_void_p()
        self.call("cuDeviceGet", ctypes.byref(device), ctypes.c_int(0))
        name = ctypes.create_string_buffer(100)
        self.call("cuDeviceGetName", name, ctypes.c_int(100), device)
        self.name = name.value.decode()
        self.call("cuDevicePrimaryCtxRetain", ctypes.byref(context), device)
        self.call("cuCtxSetCurrent", context)

    def call(self, name: str, *arguments: Any) -> None:
        """Call a function of the library. Raise CudaError."""
        code = getattr(self._library, name)(*arguments)
        if code:
            text = ctypes.c_char_p()
            self._library.cuGetErrorName(ctypes.c_int(code), ctypes.byref(text))
            raise CudaError(name, code, (text.value or b"").decode())

    def allocate(self, size: int) -> ctypes.c_uint64:
        """Return the address of memory of the GPU."""
        address = ctypes.c_uint64()
        self.call("cuMemAlloc_v2", ctypes.byref(address), ctypes.c_size_t(size))
        return address

    def pinned(self, size: int) -> ctypes.c_void_p:
        """Return the address of memory of the host that the GPU reads by itself."""
        address = ctypes.c_void_p()
        self.call("cuMemAllocHost_v2", ctypes.byref(address), ctypes.c_size_t(size))
        return address

    def to_gpu(self, to: ctypes.c_uint64, data: Any, size: int) -> None:
        self.call("cuMemcpyHtoD_v2", to, data, ctypes.c_size_t(size))

    def from_gpu(self, data: Any, address: ctypes.c_uint64, size: int) -> None:
        self.call("cuMemcpyDtoH_v2", data, address, ctypes.c_size_t(size))

    def launch(self, name: str, *arguments: Any, blocks: int = 1, threads: int = 1) -> None:
        """Run a function of PTX and wait for its end."""
        module, function = ctypes.c_void_p(), ctypes.c_void_p()
        self.call("cuModuleLoadData", ctypes.byref(module), PTX)
        self.call("cuModuleGetFunction", ctypes.byref(function), module, name.encode())
        values = (ctypes.c_void_p * len(arguments))(*(ctypes.addressof(one) for one in arguments))
        grid = [ctypes.c_uint(one) for one in (blocks, 1, 1, threads, 1, 1, 0)]
        self.call("cuLaunchKernel", function, *grid, ctypes.c_void_p(), values, ctypes.c_void_p())
        self.call("cuCtxSynchronize")


def add() -> dict[str, Any]:
    """Add two vectors on the GPU."""
    cuda, count = Cuda(), 1 << 20
    numbers = ctypes.c_uint32 * count
    first, second, result = numbers(*range(count)), numbers(*range(0, 2 * count, 2)), numbers()
    size = ctypes.sizeof(numbers)
    a, b, c = (cuda.allocate(size) for _ in range(3))
    cuda.to_gpu(a, first, size)
    cuda.to_gpu(b, second, size)
    cuda.launch("add", a, b, c, ctypes.c_uint32(count), blocks=count // 256, threads=256)
    cuda.from_gpu(result, c, size)
    return {"gpu": cuda.name, "right": all(result[i] == 3 * i for i in range(count))}


def illegal() -> dict[str, Any]:
    """Store to an address that is not mapped: the driver ends this context and reports Xid 31."""
    cuda = Cuda()
    try:
        cuda.launch("store", ctypes.c_uint64(NOWHERE))
    except CudaError as error:
        return {"gpu": cuda.name, "error": str(error), "illegal": error.code == ILLEGAL_ADDRESS}
    return {"gpu": cuda.name, "error": "", "illegal": False}


def fill(mib: str) -> dict[str, Any]:
    """Allocate memory in steps of 64 MiB until so much is allocated, or no more is to be had."""
    cuda, had = Cuda(), 0
    try:
        while had < int(mib):
            cuda.allocate(64 << 20)
            had += 64
    except CudaError as error:
        return {"mib": had, "error": str(error), "out_of_memory": error.code == OUT_OF_MEMORY}
    return {"mib": had, "error": "", "out_of_memory": False}


def bandwidth(cpus: str) -> dict[str, Any]:
    """Copy from memory near some CPUs to the GPU; the fastest of ten copies of 256 MiB, in GB/s."""
    os.sched_setaffinity(0, {int(one) for one in cpus.split(",")})
    cuda, size = Cuda(), 256 << 20
    to, data = cuda.allocate(size), cuda.pinned(size)
    ctypes.memset(data, 1, size)
    best = 0.0
    for _ in range(10):
        began = time.perf_counter()
        cuda.to_gpu(to, data, size)
        best = max(best, size / (time.perf_counter() - began) / 1e9)
    return {"gb_s": round(best, 2)}


PROGRAMS = {"add": add, "illegal": illegal, "fill": fill, "bandwidth": bandwidth}

if __name__ == "__main__":
    try:
        print(json.dumps(PROGRAMS[sys.argv[1]](*sys.argv[2:])))
    except (CudaError, OSError) as failure:
        print(json.dumps({"failed": str(failure)}))

"""Measures memory and wake-ups on the CPUs that the calling thread may run on.

In C, because Python would measure itself. Nothing here sets an affinity or a priority. Every loop ends after the seconds
that it is given. Sources: mbind(2), move_pages(2), clock_nanosleep(2).
"""

cimport cython
from libc.errno cimport errno
from libc.stdint cimport int64_t, uint32_t, uint64_t
from libc.stdlib cimport free, malloc
from libc.string cimport memset
from posix.time cimport CLOCK_MONOTONIC, CLOCK_THREAD_CPUTIME_ID, clock_gettime, timespec
from posix.types cimport clockid_t

import os

cdef extern from "<sys/mman.h>" nogil:
    void* mmap(void* at, size_t size, int protection, int flags, int file, long offset)
    int munmap(void* at, size_t size)
    int madvise(void* at, size_t size, int advice)
    enum: PROT_READ, PROT_WRITE, MAP_PRIVATE, MAP_ANONYMOUS, MADV_HUGEPAGE
    void* MAP_FAILED

cdef extern from "<unistd.h>" nogil:
    long syscall(long number, ...)

cdef extern from "<sys/syscall.h>" nogil:
    enum: SYS_mbind, SYS_move_pages

cdef extern from "<time.h>" nogil:
    int clock_nanosleep(int clock, int flags, const timespec* until, timespec* rest)
    enum: TIMER_ABSTIME

cdef enum:
    BIND = 2             # MPOL_BIND of linux/mempolicy.h
    LINE = 64            # no cache line that matters here is shorter
    WORD_BITS = 64
    MASK_WORDS = 16      # nodes 0 to 1023
    BATCH = 4096         # accesses between two looks at the clock
    CHUNK_WORDS = 131072  # the same for words that are read in a row: 1 MiB
    SAMPLES = 64
    PAGE = 4096
    SECOND_NS = 1000000000
    MOST_WAKEUPS = 1000000


cdef int64_t _now_ns() noexcept nogil:
    return _clock_ns(CLOCK_MONOTONIC)


cdef int64_t _used_ns() noexcept nogil:
    """Return the time that this thread has run: time in which others had its CPU says nothing of memory."""
    return _clock_ns(CLOCK_THREAD_CPUTIME_ID)


cdef int64_t _clock_ns(clockid_t clock) noexcept nogil:
    cdef timespec now
    clock_gettime(clock, &now)
    return <int64_t>now.tv_sec * SECOND_NS + now.tv_nsec


@cython.final
cdef class Memory:
    """Memory on one NUMA node, every page of it touched."""

    cdef char* _base
    cdef size_t _size
    cdef bint _linked

    def __cinit__(self, size_t size_bytes, int node):
        """size_bytes: a multiple of 1 MiB. node: -1 for wherever the kernel puts it. Raise OSError if there is none."""
        cdef unsigned long mask[MASK_WORDS]
        cdef void* found
        if size_bytes == 0 or size_bytes % (CHUNK_WORDS * 8):
            raise ValueError(f"cannot use {size_bytes} bytes: expected a multiple of 1 MiB")
        if node < -1 or node >= MASK_WORDS * WORD_BITS:
            raise ValueError(f"cannot use NUMA node {node}: expected -1 to {MASK_WORDS * WORD_BITS - 1}")
        found = mmap(NULL, size_bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0)
        if found == MAP_FAILED:
            raise OSError(errno, os.strerror(errno))
        self._base, self._size = <char*>found, size_bytes
        madvise(found, size_bytes, MADV_HUGEPAGE)  # a kernel without them has small pages
        if node >= 0:
            memset(mask, 0, sizeof(mask))
            mask[node // WORD_BITS] = <unsigned long>1 << (node % WORD_BITS)
            # The kernel counts the bits from 1 (mbind(2), BUGS).
            if syscall(SYS_mbind, found, size_bytes, BIND, mask, MASK_WORDS * WORD_BITS + 1, 0) < 0:
                raise OSError(errno, os.strerror(errno))
        with nogil:
            memset(found, 1, size_bytes)

    def __dealloc__(self):
        if self._base != NULL:
            munmap(self._base, self._size)

    def nodes(self) -> list[int]:
        """Return the NUMA nodes on which a sample of its pages lies. Raise OSError if the kernel does not tell."""
        cdef void* pages[SAMPLES]
        cdef int status[SAMPLES]
        cdef Py_ssize_t i
        for i in range(SAMPLES):
            pages[i] = self._base + (self._size // PAGE * i // SAMPLES) * PAGE
        if syscall(SYS_move_pages, 0, SAMPLES, pages, NULL, status, 0) < 0:
            raise OSError(errno, os.strerror(errno))
        return sorted({status[i] for i in range(SAMPLES)})

    def latency_ns(self, double seconds) -> float:
        """Return the mean time of one access that depends on the one before, in random order, in nanoseconds."""
        cdef int64_t took
        cdef uint64_t steps = 0
        self._be_linked()
        with nogil:
            took = _chase(self._base, <int64_t>(seconds * SECOND_NS), &steps)
        return took / <double>steps

    def lines_walked(self) -> int:
        """Return how many cache lines a walk reads before it is back where it began: all of them."""
        cdef uint64_t count = 1
        cdef char* at
        self._be_linked()
        at = (<char**>self._base)[0]
        while at != self._base:
            at = (<char**>at)[0]
            count += 1
        return count

    cdef _be_linked(self):
        if not self._linked and not _link(self._base, self._size // LINE):
            raise MemoryError()
        self._linked = True

    def bytes_per_s(self, double seconds) -> float:
        """Return how many bytes a second one thread reads in a row."""
        cdef int64_t took
        cdef uint64_t read = 0
        with nogil:
            took = _stream(<uint64_t*>self._base, self._size // 8, <int64_t>(seconds * SECOND_NS), &read)
        return read * 1e9 / took


cdef bint _link(char* base, size_t lines) noexcept nogil:
    """Make every line point to another one, in one random cycle through all of them. Return whether there was memory
    to do so."""
    cdef uint32_t* order = <uint32_t*>malloc(lines * sizeof(uint32_t))
    cdef uint64_t seed = 20011, far
    cdef size_t i
    cdef uint32_t other
    if order == NULL:
        return False
    for i in range(lines):
        order[i] = <uint32_t>i
    for i in range(lines - 1, 0, -1):
        # Two steps of a generator of 31 bits; its low bits are poor, and 62 bits leave room for any number of lines.
        seed = (seed * 1103515245 + 12345) & 0x7FFFFFFF
        far = seed
        seed = (seed * 1103515245 + 12345) & 0x7FFFFFFF
        far = (far * 0x7FFFFFFF + seed) % i
        other = order[far]
        order[far] = order[i]
        order[i] = other
    for i in range(lines):
        (<char**>(base + <size_t>order[i] * LINE))[0] = base + <size_t>order[(i + 1) % lines] * LINE
    free(order)
    return True


cdef int64_t _chase(char* at, int64_t within_ns, uint64_t* steps) noexcept nogil:
    cdef int64_t until = _now_ns() + within_ns, used = _used_ns()
    cdef char* here = at
    cdef Py_ssize_t i
    while _now_ns() < until or steps[0] == 0:
        for i in range(BATCH):
            here = (<char**>here)[0]
        steps[0] += BATCH
    # The compiler may not leave out a walk whose end is used.
    return max(1, _used_ns() - used) + (1 if here == NULL else 0)


cdef int64_t _stream(const uint64_t* words, size_t count, int64_t within_ns, uint64_t* read) noexcept nogil:
    cdef int64_t until = _now_ns() + within_ns, used = _used_ns()
    cdef uint64_t mixed = 0
    cdef size_t at = 0, i
    while _now_ns() < until or read[0] == 0:
        for i in range(at, at + CHUNK_WORDS):
            mixed ^= words[i]
        at = (at + CHUNK_WORDS) % count
        read[0] += CHUNK_WORDS * 8
    return max(1, _used_ns() - used) + (1 if mixed == 1 else 0)


def wakeups_ns(double seconds, int64_t interval_ns) -> list[int]:
    """Return how late the kernel wakes this thread, in nanoseconds, for each of the intervals that fit into the seconds,
    in order of size. As cyclictest does, with absolute times."""
    if not 1000 <= interval_ns <= SECOND_NS:
        raise ValueError(f"cannot wake up every {interval_ns} ns: expected 1000 to {SECOND_NS}")
    cdef Py_ssize_t count = min(MOST_WAKEUPS, max(1, <Py_ssize_t>(seconds * SECOND_NS / interval_ns)))
    cdef int64_t* late = <int64_t*>malloc(count * sizeof(int64_t))
    cdef Py_ssize_t done, i
    if late == NULL:
        raise MemoryError()
    try:
        with nogil:
            done = _sleep(late, count, interval_ns, <int64_t>(seconds * SECOND_NS))
        return sorted([late[i] for i in range(done)])
    finally:
        free(late)


cdef Py_ssize_t _sleep(int64_t* late, Py_ssize_t count, int64_t interval_ns, int64_t within_ns) noexcept nogil:
    cdef int64_t began = _now_ns(), due = began, now
    cdef timespec until
    cdef Py_ssize_t done = 0
    while done < count:
        due += interval_ns
        until.tv_sec, until.tv_nsec = due // SECOND_NS, due % SECOND_NS
        while clock_nanosleep(CLOCK_MONOTONIC, TIMER_ABSTIME, &until, NULL) != 0:
            pass  # a signal; the time is absolute
        now = _now_ns()
        late[done] = now - due
        done += 1
        if now > due + interval_ns:
            due = now  # what was missed is one late wake-up, not many
        if now - began >= within_ns:
            break
    return done

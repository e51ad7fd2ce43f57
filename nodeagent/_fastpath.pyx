"""Compiled kernels on 64-bit words. Below the checked entry points no Python object is touched.

The entry points of this file take and return Python integers as bit masks: bit N is id N.
"""

cimport cython
from cpython cimport array
from libc.stdint cimport INT64_MAX, INT64_MIN, int64_t, uint8_t, uint32_t, uint64_t
from libc.stdlib cimport free, malloc, qsort
from libc.string cimport memcmp, memcpy, memset
from cpython.unicode cimport PyUnicode_AsUTF8AndSize, PyUnicode_DecodeASCII

cdef enum:
    WORDS = 128                      # 8,192 ids: the most CPUs a kernel is built for
    IDS = WORDS * 64

MAX_ID = IDS - 1
COMPILED = True
Choice = Placed = tuple
"""What Layout.choose and Machine.place return; the stub has the element types."""

cdef extern from *:
    """
    #include <stdint.h>
    static inline int na_ctz(uint64_t word) { return __builtin_ctzll(word); }
    /* Without the instruction, which not every x86-64 has, the compiler would call a function. */
    static inline int na_popcount(uint64_t word) {
        word -= word >> 1 & 0x5555555555555555u;
        word = (word & 0x3333333333333333u) + (word >> 2 & 0x3333333333333333u);
        return (word + (word >> 4) & 0x0f0f0f0f0f0f0f0fu) * 0x0101010101010101u >> 56;
    }
    """
    int na_ctz(uint64_t word) noexcept nogil
    int na_popcount(uint64_t word) noexcept nogil


# ---------------------------------------------------------------- id lists

cdef enum:
    PARSE_OK = 0
    PARSE_EMPTY_ITEM = -1
    PARSE_NOT_NUMBER = -2
    PARSE_BACKWARDS = -3
    PARSE_TOO_LARGE = -4


cdef Py_ssize_t _number(const char* text, Py_ssize_t at, Py_ssize_t end, long* value) noexcept nogil:
    """Read decimal digits from `at`; return the position after them or an error. Like kubelet, accept a leading "+"."""
    cdef long total = 0
    cdef Py_ssize_t start
    if at < end and text[at] == c'+':
        at += 1
    start = at
    while at < end and c'0' <= text[at] <= c'9':
        total = total * 10 + (text[at] - c'0')
        if total >= IDS:
            return PARSE_TOO_LARGE
        at += 1
    if at == start:
        return PARSE_EMPTY_ITEM if at == end or text[at] == c',' else PARSE_NOT_NUMBER
    value[0] = total
    return at


cdef void _fill(uint64_t* words, long low, long high) noexcept nogil:
    """Set the bits low..high."""
    cdef long first = low >> 6, last = high >> 6, word
    cdef uint64_t ones = ~<uint64_t>0
    cdef uint64_t head = ones << (low & 63), tail = ones >> (63 - (high & 63))
    if first == last:
        words[first] |= head & tail
        return
    words[first] |= head
    for word in range(first + 1, last):
        words[word] = ones
    words[last] |= tail


cdef int _parse(const char* text, Py_ssize_t size, uint64_t* words, Py_ssize_t* place) noexcept nogil:
    """Set a bit for each id in text[:size]; return PARSE_OK, or an error with its place."""
    cdef Py_ssize_t at = 0, item, after
    cdef long low = 0, high = 0
    if size == 0:
        return PARSE_OK
    while True:
        item = at
        place[0] = item
        after = _number(text, at, size, &low)
        if after < 0:
            return <int>after
        high = low
        if after < size and text[after] == c'-':
            after = _number(text, after + 1, size, &high)
            if after < 0:
                return <int>after
        if after < size and text[after] != c',':
            return PARSE_NOT_NUMBER
        if high < low:
            return PARSE_BACKWARDS
        _fill(words, low, high)
        if after == size:
            return PARSE_OK
        at = after + 1


cdef char* _digits(char* out, long value) noexcept nogil:
    cdef char[8] reverse
    cdef int count = 0
    while True:
        reverse[count] = <char>(c'0' + value % 10)
        count += 1
        value //= 10
        if value == 0:
            break
    while count:
        count -= 1
        out[0] = reverse[count]
        out += 1
    return out


cdef Py_ssize_t _format(const uint64_t* words, Py_ssize_t count, char* out) noexcept nogil:
    """Write the ranges of words[:count]; return the length written."""
    cdef char* at = out
    cdef long low, high, end = count * 64
    low = _next(words, 0, end, 0)
    while low < end:
        high = _next(words, low, end, 1) - 1
        if at != out:
            at[0] = c','
            at += 1
        at = _digits(at, low)
        if high > low:
            at[0] = c'-'
            at = _digits(at + 1, high)
        low = _next(words, high + 1, end, 0)
    return at - out


cdef long _next(const uint64_t* words, long at, long end, bint clear) noexcept nogil:
    """Return the first position from `at` whose bit is set (or clear), or `end` if there is none."""
    cdef uint64_t word
    while at < end:
        word = words[at >> 6]
        if clear:
            word = ~word
        word >>= at & 63
        if word:
            at += na_ctz(word)
            return at if at < end else end
        at = (at | 63) + 1
    return end


cdef Py_ssize_t _words_of(object mask, uint64_t* words) except -1:
    """Write a mask into words; return how many words it needs."""
    cdef Py_ssize_t bits
    if not isinstance(mask, int) or mask < 0:
        raise ValueError(f"a mask is a non-negative integer, not {mask!r}")
    bits = mask.bit_length()
    if bits > IDS:
        raise ValueError(f"id {bits - 1} is not in 0 to {IDS - 1}")
    if bits == 0:
        return 0
    cdef Py_ssize_t count = (bits + 63) // 64
    cdef bytes raw = mask.to_bytes(count * 8, "little")
    memcpy(words, <const char*>raw, count * 8)
    return count


cdef object _mask_of(const uint64_t* words, Py_ssize_t count):
    """Return the mask in words[:count]."""
    while count and words[count - 1] == 0:
        count -= 1
    return int.from_bytes((<const char*>words)[:count * 8], "little")


_WHY = {
    PARSE_EMPTY_ITEM: "a number is missing",
    PARSE_NOT_NUMBER: "not a number or range",
    PARSE_BACKWARDS: "the range runs backwards",
    PARSE_TOO_LARGE: f"the id is not in 0 to {IDS - 1}",
}


def parse_list(str text not None):
    """Return the mask of an id list such as "0-3,8". Raise ValueError naming what is wrong and where."""
    cdef uint64_t[WORDS] words
    cdef Py_ssize_t place = 0
    cdef int error
    memset(words, 0, sizeof(words))
    cdef Py_ssize_t size = 0
    cdef const char* start = PyUnicode_AsUTF8AndSize(text, &size)
    error = _parse(start, size, words, &place)
    if error != PARSE_OK:
        item = start[place:size].split(b",")[0][:20].decode("utf-8", "replace")
        raise ValueError(f"{_WHY[error]} at {item!r}, position {place}")
    return _mask_of(words, WORDS)


def format_list(mask):
    """Return the id list of a mask, in kernel syntax; "" if it is empty."""
    cdef uint64_t[WORDS] words
    cdef Py_ssize_t count = _words_of(mask, words), size
    cdef char[IDS * 5] out           # at most four digits and a comma each
    size = _format(words, count, out)
    return PyUnicode_DecodeASCII(out, size, NULL)


def ids(mask):
    """Return the ids of a mask in ascending order."""
    cdef uint64_t[WORDS] words
    cdef Py_ssize_t count = _words_of(mask, words), i
    cdef uint64_t word
    cdef list out = []
    for i in range(count):
        word = words[i]
        while word:
            out.append(i * 64 + na_ctz(word))
            word &= word - 1
    return out


include "_fastpath_tables.pxi"
include "_fastpath_classes.pxi"
include "_fastpath_search.pxi"
include "_fastpath_shares.pxi"
include "_fastpath_ask.pxi"
include "_fastpath_layout.pxi"
include "_fastpath_covers.pxi"
include "_fastpath_devices.pxi"
include "_fastpath_pool.pxi"
include "_fastpath_conflicts.pxi"
include "_fastpath_draws.pxi"
include "_fastpath_joint.pxi"
include "_fastpath_pages.pxi"
include "_fastpath_policy.pxi"
include "_fastpath_machine.pxi"

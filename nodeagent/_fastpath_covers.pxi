# Sets of NUMA nodes with enough of everything, fewest packages first, then fewest nodes. Included by _fastpath.pyx.
#
# The demand on a set is a vector (CPUs, pages of each size, bytes of memory, devices of each kind), and so is what a
# unit gives: a node, or the nodes of a package. A branch is abandoned as soon as the best remaining units cannot make up
# what is missing.

cdef enum:
    COVER_STEPS = 20000               # branches examined for one request before the best result so far is taken
    LEVEL_SETS = 512                  # equally small sets that are kept
    CHUNK_BYTES = 16384


cdef struct Chunk:
    Chunk* before
    Py_ssize_t size, used


cdef struct Arena:
    # Zeroed memory of one request, freed all at once.
    Chunk* top
    bint failed                       # once there was not enough


cdef void* _grab(Arena* arena, Py_ssize_t size) noexcept nogil:
    """Return zeroed memory, aligned to 16 bytes. NULL, and `failed`: out of memory."""
    cdef Chunk* chunk = arena.top
    cdef Py_ssize_t need = (size + 15) & ~<Py_ssize_t>15, whole
    cdef char* found
    if chunk == NULL or chunk.used + need > chunk.size:
        whole = max(<Py_ssize_t>CHUNK_BYTES, need + 32)
        chunk = <Chunk*>malloc(whole)
        if chunk == NULL:
            arena.failed = True
            return NULL
        chunk.before, chunk.size, chunk.used = arena.top, whole, 32
        arena.top = chunk
    found = <char*>chunk + chunk.used
    chunk.used += need
    memset(found, 0, need)
    return found


cdef void _release(Arena* arena, Chunk* top, Py_ssize_t used) noexcept nogil:
    """Free what was grabbed after the chunk `top` had `used` bytes in use; NULL: everything."""
    cdef Chunk* chunk
    while arena.top != top:
        chunk = arena.top
        arena.top = chunk.before
        free(chunk)
    if top != NULL:
        top.used = used


cdef struct Steps:
    # The search budget of a request, and whether anything was left out for lack of it.
    int64_t left
    bint cut


cdef struct Cover:
    int units, parts, words
    int64_t* gives                    # units x parts
    int64_t* want                     # by part
    uint64_t* packages                # units x words: masks of packages
    int64_t* ahead                    # [i][part][r]: the most that r units from i on can give; NULL until it is needed
    Steps* steps
    # The sets of one size, one after the other.
    int count, spans, depth           # spans: packages they span exactly; 0: any, -1: none
    int* chosen                       # by depth
    int64_t* missing                  # by depth x parts
    uint64_t* mask                    # by depth x words


cdef bint _open_cover(Arena* arena, Cover* c, int units, int parts, int words, Steps* steps) noexcept nogil:
    """Make room for a cover; what units give and span, and what is wanted, is for the caller to fill in. False: out of
    memory."""
    memset(c, 0, sizeof(c[0]))
    c.units, c.parts, c.words, c.steps = units, parts, words, steps
    c.gives = <int64_t*>_grab(arena, units * parts * sizeof(int64_t))
    c.want = <int64_t*>_grab(arena, parts * sizeof(int64_t))
    c.packages = <uint64_t*>_grab(arena, units * words * sizeof(uint64_t))
    c.chosen = <int*>_grab(arena, (units + 1) * sizeof(int))
    c.missing = <int64_t*>_grab(arena, (units + 1) * parts * sizeof(int64_t))
    c.mask = <uint64_t*>_grab(arena, (units + 1) * words * sizeof(uint64_t))
    return not arena.failed


cdef bint _look_ahead(Arena* arena, Cover* c) noexcept nogil:
    """Fill the table of what the best units from each position on can give. False: out of memory."""
    cdef int i, part, r, n = c.units
    cdef Py_ssize_t row = n + 1
    cdef int64_t* column
    cdef int64_t* here
    if c.ahead != NULL:
        return True
    c.ahead = <int64_t*>_grab(arena, (n + 1) * c.parts * row * sizeof(int64_t))
    column = <int64_t*>_grab(arena, (n + 1) * sizeof(int64_t))
    if arena.failed:
        c.ahead = NULL
        return False
    for part in range(c.parts):
        for i in range(n - 1, -1, -1):
            _put_in_order(column, n - 1 - i, c.gives[i * c.parts + part])
            here = c.ahead + (i * c.parts + part) * row
            for r in range(n - i):
                here[r + 1] = here[r] + column[r]
    return True


cdef void _put_in_order(int64_t* column, int count, int64_t value) noexcept nogil:
    """Add a value to a column of `count`, the largest first."""
    while count > 0 and column[count - 1] < value:
        column[count] = column[count - 1]
        count -= 1
    column[count] = value


cdef int _least_size(const Cover* c) noexcept nogil:
    """Return a lower bound on the size of a set with enough; more than the number of units if none has. After
    _look_ahead."""
    cdef int part, r, most = 0
    for part in range(c.parts):
        r = 0
        while r <= c.units and c.ahead[part * (c.units + 1) + r] < c.want[part]:
            r += 1
        most = max(most, r)
    return most


cdef bint _start_sets(Arena* arena, Cover* c, int count, int spans) noexcept nogil:
    """Begin with the sets of `count` units, in order of their members. False: out of memory."""
    c.count, c.spans, c.depth, c.chosen[0] = count, spans, 0, 0
    memcpy(c.missing, c.want, c.parts * sizeof(int64_t))
    return count == 1 or _look_ahead(arena, c)


cdef bint _next_set(Cover* c) noexcept nogil:
    """Go on to the next set, c.chosen; return whether there is one."""
    if c.count == 1:
        return _next_unit(c)
    while c.depth >= 0:
        if c.depth == c.count:
            c.depth -= 1
            if c.depth >= 0:
                c.chosen[c.depth] += 1
            if _spans(c.mask + c.count * c.words, c.words, c.spans) and _is_enough(c, c.missing + c.count * c.parts):
                return True
        elif c.chosen[c.depth] > c.units - (c.count - c.depth) or not _take_step(c.steps) or _falls_short(c):
            c.depth -= 1
            if c.depth >= 0:
                c.chosen[c.depth] += 1
        elif _add_unit(c):
            c.depth += 1
            c.chosen[c.depth] = c.chosen[c.depth - 1] + 1
        else:
            c.chosen[c.depth] += 1
    return False


cdef int _member(const Cover* c, int at) noexcept nogil:
    """Return a member of the current set."""
    # The last one was already moved on.
    return c.chosen[at] - (at == c.count - 1)


cdef bint _next_unit(Cover* c) noexcept nogil:
    cdef int unit, part
    cdef bint enough
    while c.chosen[0] < c.units:
        unit = c.chosen[0]
        c.chosen[0] += 1
        enough = _spans(c.packages + unit * c.words, c.words, c.spans)
        for part in range(c.parts):
            enough = enough and c.gives[unit * c.parts + part] >= c.want[part]
        if enough:
            return True
    return False


cdef bint _add_unit(Cover* c) noexcept nogil:
    """Add the unit of this depth to those above; return whether they do not span too many packages."""
    cdef int unit = c.chosen[c.depth], i
    cdef uint64_t* mask = c.mask + c.depth * c.words
    cdef int64_t* missing = c.missing + c.depth * c.parts
    for i in range(c.words):
        mask[c.words + i] = mask[i] | c.packages[unit * c.words + i]
    if c.spans and _count_bits(mask + c.words, c.words) > max(c.spans, 0):
        return False
    for i in range(c.parts):
        missing[c.parts + i] = missing[i] - c.gives[unit * c.parts + i]
    return True


cdef bint _falls_short(const Cover* c) noexcept nogil:
    """Return whether even the best units from this one on cannot make up what is missing."""
    cdef int part, unit = c.chosen[c.depth], left = c.count - c.depth
    cdef int64_t lacks
    for part in range(c.parts):
        lacks = c.missing[c.depth * c.parts + part]
        if lacks > 0 and c.ahead[(unit * c.parts + part) * (c.units + 1) + left] < lacks:
            return True
    return False


cdef bint _is_enough(const Cover* c, const int64_t* missing) noexcept nogil:
    cdef int part
    for part in range(c.parts):
        if missing[part] > 0:
            return False
    return True


cdef bint _take_step(Steps* steps) noexcept nogil:
    """Count one step. Return whether any was left."""
    steps.left -= 1
    if steps.left < 0:
        steps.cut = True
    return steps.left >= 0


cdef bint _spans(const uint64_t* mask, int words, int spans) noexcept nogil:
    """Return whether a set spans as many packages as it has to (0: any; -1: none)."""
    return spans == 0 or _count_bits(mask, words) == max(spans, 0)


cdef int _count_bits(const uint64_t* words, Py_ssize_t count) noexcept nogil:
    cdef Py_ssize_t i
    cdef int total = 0
    for i in range(count):
        total += na_popcount(words[i])
    return total


# ------------------------------------------------------------------ levels of equally small sets

cdef struct NodeSet:
    NodeSet* next
    int64_t distance
    int* members                      # units, in order
    int order                         # among the sets of its level


cdef struct Level:
    Level* next
    int size, count                   # nodes of each set; how many sets
    NodeSet* first


cdef struct Levels:
    # The levels of a cover, each found when it is first needed.
    Cover cover
    const uint8_t* needed             # by unit: whether every set must have it
    bint any_unit                     # whether one unit with enough is as good as another
    int packages, most_packages, count
    bint done
    Level* first


cdef bint _open_levels(Arena* arena, Levels* l) noexcept nogil:
    """Prepare to find levels, once the cover is filled in. False: out of memory."""
    cdef Cover* c = &l.cover
    cdef int unit, i
    cdef bint without = False
    cdef uint64_t* mask = <uint64_t*>_grab(arena, c.words * sizeof(uint64_t))
    if mask == NULL:
        return False
    for unit in range(c.units):
        without = without or _count_bits(c.packages + unit * c.words, c.words) == 0
        for i in range(c.words):
            mask[i] |= c.packages[unit * c.words + i]
    l.most_packages = _count_bits(mask, c.words)
    l.packages = -1 if without else 0
    l.count = c.units + 1
    l.done = False
    l.first = NULL
    return True


cdef Level* _next_level(Arena* arena, Levels* l, Level* last) noexcept nogil:
    """Return the level after `last` (NULL: the first); NULL if there is none, or no step left to find it."""
    cdef Level* level = l.first if last == NULL else last.next
    if level != NULL:
        return level
    while not l.done and not arena.failed:
        if l.count > l.cover.units:
            _more_packages(arena, l)
            continue
        level = _collect(arena, l)
        l.count += 1
        l.done = l.cover.steps.left < 0
        if level != NULL and level.count:
            if last == NULL:
                l.first = level
            else:
                last.next = level
            return level
    return NULL


cdef void _more_packages(Arena* arena, Levels* l) noexcept nogil:
    """Go on to the sets that span one package more."""
    l.packages += 1
    l.done = l.packages > l.most_packages
    l.count = max(1, l.packages)
    if l.packages > 1 and not l.done and _look_ahead(arena, &l.cover):
        l.count = max(l.count, _least_size(&l.cover))


cdef Level* _collect(Arena* arena, Levels* l) noexcept nogil:
    """Return the sets of the current size that have all needed units; NULL: out of memory."""
    cdef Cover* c = &l.cover
    cdef Level* level = <Level*>_grab(arena, sizeof(Level))
    cdef NodeSet** end
    cdef int found = 0
    if level == NULL or not _start_sets(arena, c, l.count, l.packages if l.packages else -1):
        return NULL
    level.size = c.count
    end = &level.first
    while _next_set(c):
        found += 1
        if found > LEVEL_SETS:
            c.steps.cut = True
            break
        if not _has_needed(c, l.needed):
            continue
        end[0] = _copy_set(arena, c, level.count)
        if end[0] == NULL:
            return NULL
        end = &end[0].next
        level.count += 1
        if l.any_unit and c.count == 1:
            break
    return level


cdef bint _has_needed(const Cover* c, const uint8_t* needed) noexcept nogil:
    cdef int unit, at = 0
    for unit in range(c.units):
        while at < c.count and _member(c, at) < unit:
            at += 1
        if needed[unit] and (at == c.count or _member(c, at) != unit):
            return False
    return True


cdef NodeSet* _copy_set(Arena* arena, const Cover* c, int order) noexcept nogil:
    cdef NodeSet* copy = <NodeSet*>_grab(arena, sizeof(NodeSet) + c.count * sizeof(int))
    cdef int at
    if copy == NULL:
        return NULL
    copy.order = order
    copy.members = <int*>(copy + 1)
    for at in range(c.count):
        copy.members[at] = _member(c, at)
    return copy

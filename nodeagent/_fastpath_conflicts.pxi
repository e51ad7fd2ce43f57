# Sets of devices without two that exclude each other: what a choice of devices may draw from. Included by _fastpath.pyx.
#
# Most machines have one such set, all devices. Where a whole and its parts, or several ways to one thing, are there, each
# set leaves some out; together they lose nothing: every choice that can be granted lies in one of them. If there are too
# many, a few are taken that give what is wanted if any set does: then the answer may not be the best, and is marked so.

cdef enum:
    MOST_DRAWS = 32                   # sets that are searched exactly
    FEW_DRAWS = 4                     # sets that are searched if there are more
    MOST_OPTIONS = 64                 # maximal sets of one group of devices that exclude each other that are looked at


cdef struct Group:
    # Devices that exclude each other, directly or through others, numbered in order of id; sets of them are bit masks.
    Group* next
    int members, words
    int* device                       # by member
    int* order                        # members, those with the fewest exclusions first
    uint64_t* excludes                # members x words
    int options
    uint64_t* option                  # options x words: the sets to choose from, the best first
    int* gives                        # options x kinds
    # The search for maximal sets: four rows of words for each depth.
    uint64_t* stack
    int found
    uint64_t* sets                    # (MOST_OPTIONS + 1) x words


cdef struct Draws:
    # The sets that a choice may draw from.
    int count
    bint complete                     # whether that is all of them
    uint8_t* usable[MOST_DRAWS]       # of each, by device


cdef bint _find_draws(Arena* arena, const Devices* d, const uint8_t* usable, const uint8_t* must, const int* need,
                      Draws* draws) noexcept nogil:
    """Find the sets without conflicts of some devices. False: out of memory."""
    cdef Group* first = NULL
    cdef Group* group
    cdef int64_t product = 1
    draws.count, draws.complete = 0, True
    if not _find_groups(arena, d, usable, &first):
        return False
    group = first
    while group != NULL:
        if not _find_options(arena, d, group, must, draws):
            return False
        product = min(<int64_t>MOST_DRAWS + 1, product * group.options)
        group = group.next
    if product <= MOST_DRAWS:
        return _draw_all(arena, d, usable, first, <int>product, draws)
    draws.complete = False
    return _draw_few(arena, d, usable, first, need, draws)


# ------------------------------------------------------------------ groups

cdef bint _find_groups(Arena* arena, const Devices* d, const uint8_t* usable, Group** end) noexcept nogil:
    """List the groups in order of their first members. False: out of memory."""
    cdef int* member_of = <int*>_grab(arena, d.devices * sizeof(int))
    cdef int* ahead = <int*>_grab(arena, d.devices * sizeof(int))
    cdef int position, device, count
    if arena.failed:
        return False
    for position in range(d.devices):
        device = d.by_rank[position]
        if not usable[device] or member_of[device] or not _is_excluded(d, usable, device):
            continue
        count = _reach(d, usable, device, member_of, ahead)
        end[0] = _group_of(arena, d, usable, ahead, count, member_of)
        if end[0] == NULL:
            return False
        end = &end[0].next
    return True


cdef bint _is_excluded(const Devices* d, const uint8_t* usable, int device) noexcept nogil:
    cdef int at
    for at in range(d.excluded_start[device], d.excluded_start[device + 1]):
        if usable[d.excluded[at]]:
            return True
    return False


cdef int _reach(const Devices* d, const uint8_t* usable, int device, int* seen, int* out) noexcept nogil:
    """Write the positions, in order of id, of all devices that a device reaches through exclusions; return how many."""
    cdef int count = 1, done = 0, at, other
    out[0] = device
    seen[device] = 1
    while done < count:
        device = out[done]
        done += 1
        for at in range(d.excluded_start[device], d.excluded_start[device + 1]):
            other = d.excluded[at]
            if usable[other] and not seen[other]:
                seen[other] = 1
                out[count] = other
                count += 1
    for at in range(count):
        out[at] = d.rank[out[at]]
    qsort(out, count, sizeof(int), _by_number)
    return count


cdef int _by_number(const void* x, const void* y) noexcept nogil:
    return (<const int*>x)[0] - (<const int*>y)[0]


cdef Group* _group_of(Arena* arena, const Devices* d, const uint8_t* usable, const int* positions, int count,
                      int* member_of) noexcept nogil:
    """Return a group of the devices at some positions; NULL: out of memory. member_of: scratch by device, set for them."""
    cdef Group* g = <Group*>_grab(arena, sizeof(Group))
    cdef int member, at, other
    if g == NULL:
        return NULL
    g.members, g.words = count, (count + 63) // 64
    g.device = <int*>_grab(arena, 2 * count * sizeof(int))
    g.order = g.device + count
    g.excludes = <uint64_t*>_grab(arena, count * g.words * sizeof(uint64_t))
    g.stack = <uint64_t*>_grab(arena, 4 * (count + 2) * g.words * sizeof(uint64_t))
    g.sets = <uint64_t*>_grab(arena, (MOST_OPTIONS + 1) * g.words * sizeof(uint64_t))
    if arena.failed:
        return NULL
    for member in range(count):
        g.device[member] = d.by_rank[positions[member]]
        member_of[g.device[member]] = member + 1
        _insert(d, g, member)
    for member in range(count):
        for at in range(d.excluded_start[g.device[member]], d.excluded_start[g.device[member] + 1]):
            other = d.excluded[at]
            if usable[other]:
                _set(g.excludes + member * g.words, member_of[other] - 1)
    return g


cdef void _insert(const Devices* d, Group* g, int member) noexcept nogil:
    """Put a member into the order; those before it are there."""
    cdef int at = member
    while at > 0 and d.excluded_count[g.device[g.order[at - 1]]] > d.excluded_count[g.device[member]]:
        g.order[at] = g.order[at - 1]
        at -= 1
    g.order[at] = member


cdef inline void _set(uint64_t* words, int bit) noexcept nogil:
    words[bit >> 6] |= <uint64_t>1 << (bit & 63)


cdef inline void _clear(uint64_t* words, int bit) noexcept nogil:
    words[bit >> 6] &= ~(<uint64_t>1 << (bit & 63))


cdef inline bint _has(const uint64_t* words, int bit) noexcept nogil:
    return words[bit >> 6] >> (bit & 63) & 1


# ------------------------------------------------------------------ the maximal sets of a group

cdef bint _find_options(Arena* arena, const Devices* d, Group* g, const uint8_t* must, Draws* draws) noexcept nogil:
    """List the sets to choose from: the maximal ones, but none that gives no more than another. False: out of memory."""
    cdef int member, option
    cdef int* counts
    for member in range(g.members):
        _set(g.stack, member)
    _grow(g, 0)
    if g.found > MOST_OPTIONS:
        draws.complete = False
        g.found = MOST_OPTIONS
    _sort_sets(d, g)
    counts = <int*>_grab(arena, g.found * d.classes * sizeof(int))
    g.option = <uint64_t*>_grab(arena, g.found * g.words * sizeof(uint64_t))
    g.gives = <int*>_grab(arena, g.found * d.kinds * sizeof(int))
    if arena.failed:
        return False
    for option in range(g.found):
        _add_option(d, g, g.sets + option * g.words, must, counts)
    return True


cdef void _grow(Group* g, int depth) noexcept nogil:
    """Find the maximal sets without two that exclude each other (Bron and Kerbosch, 1973, with a pivot): those with the
    members chosen so far, some of those ahead, and none of those that are done."""
    cdef int w = g.words, i, at, member, pivot
    cdef uint64_t* ahead = g.stack + depth * 4 * w
    cdef uint64_t* done = ahead + w
    cdef uint64_t* chosen = ahead + 2 * w
    cdef uint64_t* next = ahead + 3 * w
    cdef uint64_t* below = ahead + 4 * w
    if _count_bits(ahead, w) == 0:
        if _count_bits(done, w) == 0:
            memcpy(g.sets + g.found * w, chosen, w * sizeof(uint64_t))
            g.found += 1
        return
    # Every set that can still grow has the pivot or one that the pivot excludes.
    pivot = _pivot(g, ahead, done)
    for i in range(w):
        next[i] = ahead[i] & (g.excludes[pivot * w + i] | (<uint64_t>1 << (pivot & 63) if i == pivot >> 6 else <uint64_t>0))
    for at in range(g.members):
        member = g.order[at]
        if not _has(next, member):
            continue
        _clear(ahead, member)
        for i in range(w):
            below[i] = ahead[i] & ~g.excludes[member * w + i]
            below[w + i] = done[i] & ~g.excludes[member * w + i]
            below[2 * w + i] = chosen[i]
        _set(below + 2 * w, member)
        _grow(g, depth + 1)
        if g.found > MOST_OPTIONS:
            return
        _set(done, member)


cdef int _pivot(const Group* g, const uint64_t* ahead, const uint64_t* done) noexcept nogil:
    """Return the first of the members that exclude the fewest of those ahead."""
    cdef int member, i, count, best = -1, least = 0
    for member in range(g.members):
        if not (_has(ahead, member) or _has(done, member)):
            continue
        count = 0
        for i in range(g.words):
            count += na_popcount(g.excludes[member * g.words + i] & ahead[i])
        if best < 0 or count < least:
            best, least = member, count
    return best


cdef void _sort_sets(const Devices* d, Group* g) noexcept nogil:
    """Sort the sets: the largest first; of equally large ones those that hand over least, since parts are preferred to
    their whole; then by id."""
    cdef int at, other, w = g.words, i
    cdef uint64_t* sets = g.sets
    cdef uint64_t word
    for at in range(1, g.found):
        other = at
        while other > 0 and _set_before(d, g, sets + other * w, sets + (other - 1) * w):
            for i in range(w):
                word = sets[other * w + i]
                sets[other * w + i] = sets[(other - 1) * w + i]
                sets[(other - 1) * w + i] = word
            other -= 1


cdef bint _set_before(const Devices* d, const Group* g, const uint64_t* x, const uint64_t* y) noexcept nogil:
    cdef int more = _count_bits(x, g.words) - _count_bits(y, g.words), i
    cdef int64_t hands = _handed_over(d, g, x) - _handed_over(d, g, y)
    cdef uint64_t differ
    if more or hands:
        return more > 0 if more else hands < 0
    for i in range(g.words):
        differ = x[i] ^ y[i]
        if differ:
            return x[i] >> na_ctz(differ) & 1
    return False


cdef int64_t _handed_over(const Devices* d, const Group* g, const uint64_t* some) noexcept nogil:
    cdef int member
    cdef int64_t total = 0
    for member in range(g.members):
        if _has(some, member):
            total += d.things[g.device[member]]
    return total


cdef void _add_option(const Devices* d, Group* g, const uint64_t* some, const uint8_t* must, int* counts) noexcept nogil:
    """Add a set to the options, unless one of them gives as much of every class and has all that must be taken."""
    cdef int member, other, cls
    cdef int* mine = counts + g.options * d.classes
    memset(mine, 0, d.classes * sizeof(int))
    for member in range(g.members):
        mine[d.class_of[g.device[member]]] += _has(some, member)
    for other in range(g.options):
        if _is_dominated(d, g, some, mine, g.option + other * g.words, counts + other * d.classes, must):
            return
    memcpy(g.option + g.options * g.words, some, g.words * sizeof(uint64_t))
    for cls in range(d.classes):
        g.gives[g.options * d.kinds + d.kind_of[cls]] += mine[cls]
    g.options += 1


cdef bint _is_dominated(const Devices* d, const Group* g, const uint64_t* some, const int* mine, const uint64_t* other,
                        const int* theirs, const uint8_t* must) noexcept nogil:
    cdef int cls, member
    for cls in range(d.classes):
        if mine[cls] > theirs[cls]:
            return False
    for member in range(g.members):
        if must[g.device[member]] and _has(some, member) and not _has(other, member):
            return False
    return True


# ------------------------------------------------------------------ one option of each group

cdef uint8_t* _new_draw(Arena* arena, const Devices* d, const uint8_t* usable, const Group* first,
                        Draws* draws) noexcept nogil:
    """Return a new set: the devices that are in no group, so far; NULL: out of memory."""
    cdef uint8_t* found = <uint8_t*>_grab(arena, d.devices)
    cdef const Group* group = first
    cdef int member
    if found == NULL:
        return NULL
    memcpy(found, usable, d.devices)
    while group != NULL:
        for member in range(group.members):
            found[group.device[member]] = 0
        group = group.next
    draws.usable[draws.count] = found
    draws.count += 1
    return found


cdef void _draw_option(const Group* group, int option, uint8_t* usable) noexcept nogil:
    """Add an option of a group to a set."""
    cdef int member
    for member in range(group.members):
        if _has(group.option + option * group.words, member):
            usable[group.device[member]] = 1


cdef bint _draw_all(Arena* arena, const Devices* d, const uint8_t* usable, const Group* first, int product,
                    Draws* draws) noexcept nogil:
    """Draw every combination, the last group's options alternating fastest. False: out of memory."""
    cdef int number, rest, block
    cdef const Group* group
    cdef uint8_t* found
    for number in range(product):
        found = _new_draw(arena, d, usable, first, draws)
        if found == NULL:
            return False
        group, rest, block = first, number, product
        while group != NULL:
            block = block // group.options
            _draw_option(group, rest // block, found)
            rest %= block
            group = group.next
    return True

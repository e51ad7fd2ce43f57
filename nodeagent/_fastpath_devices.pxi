# Exact choice of devices: k of n, by how near they are to each other. Included by _fastpath.pyx.
#
# Interchangeable devices (same kind, same place, same links) form a class, so 128 virtual functions are one class of
# 128 and the search is over how many of each class are taken: depth first, with a lower bound on what the devices still
# missing must add. Ties are kept separately by the places of their members (anchors), since they differ in which CPUs
# they want near; within one place the set that cuts the fewest links to what stays free wins, then the lowest.

cdef enum:
    TIES = 64
    PICK_BUDGET = 2000000


cdef struct Pick:
    int classes, kinds, anchors
    const int* kind_of                # by class
    int* there                        # how many devices of a class may be taken
    int* free                         # how many of a class are not held, whether or not they may be taken
    int* must                         # how many of them have to be taken
    const int* anchor                 # by class: its place
    int* rest                         # by class: how many devices the classes of its kind after it have
    int* first                        # (classes + 1) x kinds: the first class of a kind from a class on
    int* end                          # by kind: behind its last class
    int* left                         # by kind: how many are still to be taken
    int* taken                        # by class
    int* places                       # by anchor: scratch
    int* tie_taken                    # TIES x classes
    const int64_t* far                # classes x classes: what a pair costs
    const int64_t* link               # classes x classes: what cutting a pair costs
    int64_t* adds                     # by class: what one more device of it costs now
    int64_t best, steps
    int64_t[TIES] tie_cut
    int ties
    bint dropped                      # there were more ties than are kept


cdef bint _open_pick(Arena* arena, Pick* p, int classes, int kinds, int anchors) noexcept nogil:
    """Make room for a choice; what there is and what is wanted is for the caller to fill in. False: out of memory."""
    memset(p, 0, sizeof(p[0]))
    p.classes, p.kinds, p.anchors = classes, kinds, anchors
    p.best = <int64_t>1 << 60
    p.adds = <int64_t*>_grab(arena, classes * sizeof(int64_t))
    p.there = <int*>_grab(arena, (5 * classes + (classes + 3) * kinds + anchors + TIES * classes) * sizeof(int))
    p.free = p.there + classes
    p.must = p.free + classes
    p.rest = p.must + classes
    p.taken = p.rest + classes
    p.left = p.taken + classes
    p.first = p.left + kinds
    p.end = p.first + (classes + 1) * kinds
    p.places = p.end + kinds
    p.tie_taken = p.places + anchors
    return not arena.failed


cdef void _pick_all(Pick* p) noexcept nogil:
    """Find every best way to take what is wanted."""
    cdef int cls, kind
    cdef int* first
    for kind in range(p.kinds):
        p.first[p.classes * p.kinds + kind] = p.classes
    for cls in range(p.classes - 1, -1, -1):
        first = p.first + cls * p.kinds
        memcpy(first, first + p.kinds, p.kinds * sizeof(int))
        kind = p.kind_of[cls]
        p.end[kind] = max(p.end[kind], cls + 1)
        p.rest[cls] = p.rest[first[kind]] + p.there[first[kind]] if first[kind] < p.classes else 0
        first[kind] = cls
    for kind in range(p.kinds):
        first = p.first + kind
        if p.left[kind] > (p.there[first[0]] + p.rest[first[0]] if first[0] < p.classes else 0):
            return
    _pick(p, 0, 0)


cdef void _pick(Pick* p, int cls, int64_t cost) noexcept nogil:
    """Decide how many of class `cls` are taken, most first, then go on with the next class."""
    cdef int kind = -1
    cdef int64_t others = 0
    while True:
        p.steps += 1
        while cls < p.classes and p.left[p.kind_of[cls]] == 0 and p.must[cls] == 0:
            cls += 1
        if cls == p.classes:
            if cost <= p.best:
                _keep_pick(p, cost)
            return
        if p.kind_of[cls] != kind:
            kind = p.kind_of[cls]
            others = _bound_of_others(p, cls, kind)
        if p.steps > PICK_BUDGET or cost + others + _bound(p, cls, kind) > p.best:
            return
        _take_some(p, cls, cost)
        if p.must[cls] or p.rest[cls] < p.left[kind]:
            return
        cls += 1


cdef void _take_some(Pick* p, int cls, int64_t cost) noexcept nogil:
    """Take some of a class, most first, as long as the classes after it have the rest."""
    cdef int kind = p.kind_of[cls], count
    cdef int64_t here
    for count in range(min(p.there[cls], p.left[kind]), max(1, p.must[cls]) - 1, -1):
        if count + p.rest[cls] < p.left[kind]:
            return
        here = cost + count * p.adds[cls] + <int64_t>count * (count - 1) // 2 * p.far[cls * p.classes + cls]
        _move(p, cls, count)
        _pick(p, cls + 1, here)
        _move(p, cls, -count)


cdef void _move(Pick* p, int cls, int count) noexcept nogil:
    """Take `count` more devices of a class; update what each class costs in addition to them."""
    cdef int other
    cdef const int64_t* far = p.far + cls * p.classes
    cdef int64_t* adds = p.adds
    p.taken[cls] += count
    p.left[p.kind_of[cls]] -= count
    if count == 1:
        for other in range(p.classes):
            adds[other] += far[other]
    elif count == -1:
        for other in range(p.classes):
            adds[other] -= far[other]
    else:
        for other in range(p.classes):
            adds[other] += count * far[other]


cdef int64_t _bound_of_others(const Pick* p, int cls, int kind) noexcept nogil:
    """Return the least that the missing devices of all kinds but one must add."""
    cdef int other
    cdef int64_t total = 0
    for other in range(p.kinds):
        if other != kind and p.left[other]:
            total += _bound(p, cls, other)
    return total


cdef int64_t _bound(const Pick* p, int cls, int kind) noexcept nogil:
    """Return the least that the missing devices of a kind must add, each at its own price in addition to those taken."""
    cdef int other, need = p.left[kind], best, last = -1
    cdef int64_t total = 0, floor = -1, price
    if need == 1:
        return _least_addition(p, cls, kind)
    while need > 0:
        best = -1
        for other in range(p.first[cls * p.kinds + kind], p.end[kind]):
            price = p.adds[other]
            if p.kind_of[other] == kind and (price > floor or (price == floor and other > last)) \
                    and (best < 0 or price < p.adds[best]):
                best = other
        if best < 0:
            return p.best + 1
        total += min(need, p.there[best]) * p.adds[best]
        need -= p.there[best]
        floor = p.adds[best]
        last = best
    return total


cdef int64_t _least_addition(const Pick* p, int cls, int kind) noexcept nogil:
    """Return the least that one device of a kind must add."""
    cdef int other
    cdef int64_t least = p.best + 1
    for other in range(p.first[cls * p.kinds + kind], p.end[kind]):
        if p.adds[other] < least and p.kind_of[other] == kind and p.there[other]:
            least = p.adds[other]
    return least


cdef int64_t _cut(const Pick* p) noexcept nogil:
    """Return the links between the devices taken and those of the same kind that stay free."""
    cdef int a, b
    cdef int64_t total = 0
    for a in range(p.classes):
        if p.taken[a]:
            for b in range(p.classes):
                if p.kind_of[a] == p.kind_of[b]:
                    total += p.taken[a] * (p.free[b] - p.taken[b]) * p.link[a * p.classes + b]
    return total


cdef void _keep_pick(Pick* p, int64_t cost) noexcept nogil:
    """Record a complete pick: alone if it is better than all, else alongside its equals, one for each place."""
    cdef int tie, cls
    cdef int64_t cut = _cut(p)
    if cost < p.best:
        p.best = cost
        p.ties = 0
        p.dropped = False
    for tie in range(p.ties):
        if _same_place(p, p.tie_taken + tie * p.classes):
            if cut >= p.tie_cut[tie]:
                return
            break
    else:
        if p.ties == TIES:
            p.dropped = True
            return
        tie = p.ties
        p.ties += 1
    p.tie_cut[tie] = cut
    for cls in range(p.classes):
        p.tie_taken[tie * p.classes + cls] = p.taken[cls]


cdef bint _same_place(Pick* p, const int* other) noexcept nogil:
    cdef int cls, place
    for place in range(p.anchors):
        p.places[place] = 0
    for cls in range(p.classes):
        p.places[p.anchor[cls]] += p.taken[cls] - other[cls]
    for place in range(p.anchors):
        if p.places[place]:
            return False
    return True


def choose_devices(list classes not None, list need not None, const int64_t[::1] far not None,
                   const int64_t[::1] link not None):
    """Return every best way to take need[kind] devices of each kind, one for each set of places.

    classes: tuples (kind, there, must, anchor, alone, free): how many devices may be taken, how many have to be, the
    number of their place, what one costs by itself and how many are not held. far: classes x classes numbers, row by
    row, what a pair of one device of class a and one of class b costs; link: what cutting such a pair costs. Both
    symmetric, not negative.
    Returns (cost, [(cut, [taken by class]) ...], exact), or None if there are too few devices.
    """
    cdef int n = len(classes), kinds = len(need), i, j, anchors = 0
    cdef Pick p
    cdef Arena arena
    if far.shape[0] != n * n or link.shape[0] != n * n:
        raise ValueError(f"cannot choose devices: {far.shape[0]} costs for {n} classes")
    for kind, there, must, anchor, alone, unheld in classes:
        if not (0 <= kind < kinds and 0 <= must <= there and 0 <= anchor < IDS and alone >= 0 and unheld >= there):
            raise ValueError(f"cannot choose devices: class {(kind, there, must, anchor, alone, unheld)} is out of range")
        anchors = max(anchors, anchor + 1)
    memset(&arena, 0, sizeof(arena))
    try:
        if not _open_pick(&arena, &p, n, kinds, anchors):
            raise MemoryError
        kind_of, anchor_of = <int*>_grab(&arena, n * sizeof(int)), <int*>_grab(&arena, n * sizeof(int))
        if arena.failed:
            raise MemoryError
        p.kind_of, p.anchor = kind_of, anchor_of
        for i in range(kinds):
            p.left[i] = need[i]
        for i in range(n):
            kind_of[i], p.there[i], p.must[i], anchor_of[i], p.adds[i], p.free[i] = classes[i]
        if n:
            p.far, p.link = &far[0], &link[0]
        with nogil:
            _pick_all(&p)
        if p.ties == 0:
            return None
        ties = [(p.tie_cut[i], [p.tie_taken[i * n + j] for j in range(n)]) for i in range(p.ties)]
        return p.best, ties, p.steps <= PICK_BUDGET and not p.dropped
    finally:
        _release(&arena, NULL, 0)

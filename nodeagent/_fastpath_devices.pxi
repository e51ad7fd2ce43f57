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
    int* kind_of                      # by class
    int* there                        # how many devices of a class may be taken
    int* free                         # how many of a class are not held, whether or not they may be taken
    int* must                         # how many of them have to be taken
    int* anchor                       # by class: its place
    int* left                         # by kind: how many are still to be taken
    int* taken                        # by class
    int* places                       # by anchor: scratch
    int* tie_taken                    # TIES x classes
    int64_t* far                      # classes x classes: what a pair costs
    int64_t* link                     # classes x classes: what cutting a pair costs
    int64_t* adds                     # by class: what one more device of it costs now
    int64_t best, steps
    int64_t[TIES] tie_cut
    int ties
    bint dropped                      # there were more ties than are kept


cdef void _pick(Pick* p, int cls, int64_t cost) noexcept nogil:
    """Decide how many of class `cls` are taken, most first, then go on with the next class."""
    cdef int kind, count, most, rest
    cdef int64_t here
    p.steps += 1
    if p.steps > PICK_BUDGET or cost + _bound(p, cls) > p.best:
        return
    if cls == p.classes:
        _keep_pick(p, cost)
        return
    kind = p.kind_of[cls]
    rest = _behind(p, cls)
    most = min(p.there[cls], p.left[kind])
    for count in range(most, p.must[cls] - 1, -1):
        if count + rest < p.left[kind]:
            return
        here = cost + count * p.adds[cls] + <int64_t>count * (count - 1) // 2 * p.far[cls * p.classes + cls]
        _move(p, cls, count)
        _pick(p, cls + 1, here)
        _move(p, cls, -count)


cdef void _move(Pick* p, int cls, int count) noexcept nogil:
    """Take `count` more devices of a class; update what each class costs in addition to them."""
    cdef int other
    p.taken[cls] += count
    p.left[p.kind_of[cls]] -= count
    for other in range(p.classes):
        p.adds[other] += count * p.far[cls * p.classes + other]


cdef int _behind(const Pick* p, int cls) noexcept nogil:
    """Return how many devices of the kind of `cls` the classes after it have."""
    cdef int other, total = 0
    for other in range(cls + 1, p.classes):
        if p.kind_of[other] == p.kind_of[cls]:
            total += p.there[other]
    return total


cdef int64_t _bound(const Pick* p, int cls) noexcept nogil:
    """Return the least that the devices still missing must add, each at its own price in addition to those taken."""
    cdef int kind, other, need, best, last
    cdef int64_t total = 0, floor, price
    for kind in range(p.kinds):
        need = p.left[kind]
        floor = -1
        last = -1
        while need > 0:
            best = -1
            for other in range(cls, p.classes):
                price = p.adds[other]
                if p.kind_of[other] != kind or price < floor or (price == floor and other <= last):
                    continue
                if best < 0 or price < p.adds[best]:
                    best = other
            if best < 0:
                return p.best + 1
            total += min(need, p.there[best]) * p.adds[best]
            need -= p.there[best]
            floor = p.adds[best]
            last = best
    return total


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
    if far.shape[0] != n * n or link.shape[0] != n * n:
        raise ValueError(f"cannot choose devices: {far.shape[0]} costs for {n} classes")
    memset(&p, 0, sizeof(p))
    for kind, there, must, anchor, alone, unheld in classes:
        if not (0 <= kind < kinds and 0 <= must <= there and 0 <= anchor < IDS and alone >= 0 and unheld >= there):
            raise ValueError(f"cannot choose devices: class {(kind, there, must, anchor, alone, unheld)} is out of range")
        anchors = max(anchors, anchor + 1)
    cdef Py_ssize_t wide = (2 * <Py_ssize_t>n * n + n) * sizeof(int64_t)
    cdef bytearray memory = bytearray(wide + (6 * n + kinds + anchors + TIES * n) * sizeof(int) + 64)
    p.far = <int64_t*><char*>memory
    p.link = p.far + n * n
    p.adds = p.link + n * n
    p.kind_of = <int*>(p.adds + n)
    p.there, p.must, p.anchor = p.kind_of + n, p.kind_of + 2 * n, p.kind_of + 3 * n
    p.taken = p.kind_of + 4 * n
    p.free = p.kind_of + 5 * n
    p.left = p.kind_of + 6 * n
    p.places = p.left + kinds
    p.tie_taken = p.places + anchors
    p.classes, p.kinds, p.anchors = n, kinds, anchors
    p.best = <int64_t>1 << 60
    for i in range(kinds):
        p.left[i] = need[i]
    for i in range(n):
        p.kind_of[i], p.there[i], p.must[i], p.anchor[i], p.adds[i], p.free[i] = classes[i]
    if n:
        memcpy(p.far, &far[0], n * n * sizeof(int64_t))
        memcpy(p.link, &link[0], n * n * sizeof(int64_t))
    with nogil:
        _pick(&p, 0, 0)
    if p.ties == 0:
        return None
    ties = [(p.tie_cut[i], [p.tie_taken[i * n + j] for j in range(n)]) for i in range(p.ties)]
    return p.best, ties, p.steps <= PICK_BUDGET and not p.dropped

# A joint decision on one set of nodes, and on all sets that a NUMA policy allows. Included by _fastpath.pyx.

cdef enum:
    MOST_UNIVERSES = 128              # sets of nodes, as allowed by a policy, that are searched one by one


cdef bint _decide(Task* t, const Units* units, int most, Found* best) noexcept nogil:
    """Find the cheapest placement; return whether anything fits. units: what a policy counts, NULL: no policy; most: how
    many of them may be used, 0: as many as an empty machine would need."""
    cdef Found* loose = _new_found(t)
    if loose == NULL or not _place_within(t, NULL, loose):
        return False
    if units != NULL:
        if most == 0:
            most = _least_units(t, units)
        if not _lies_in(t, loose, units, most):
            return _under_policy(t, units, most, best)
    best[0] = loose[0]
    return True


cdef Found* _new_found(Task* t) noexcept nogil:
    cdef Found* found = <Found*>_grab(&t.arena, sizeof(Found))
    if found == NULL:
        return NULL
    found.cpus = <uint64_t*>_grab(&t.arena, t.site.words * sizeof(uint64_t))
    found.taken = <int64_t*>_grab(&t.arena, t.sizes * t.site.nodes * sizeof(int64_t))
    found.order = <int*>_grab(&t.arena, t.site.nodes * sizeof(int))
    return NULL if t.arena.failed else found


cdef void _keep_better(Found* best, Found* trial) noexcept nogil:
    """Exchange two placements if the second is there and better; of equals the first stays."""
    cdef Found spare
    if trial.there and (not best.there or _compare_keys(trial.key, best.key) < 0):
        spare = best[0]
        best[0] = trial[0]
        trial[0] = spare
    trial.there = False


# ------------------------------------------------------------------ one set of nodes

cdef bint _place_within(Task* t, const uint8_t* inside, Found* best) noexcept nogil:
    """Find the best placement on some nodes (NULL: on all), over all equally good sets of devices; return whether there
    is one."""
    cdef Corner c
    cdef Picked* pick
    cdef Found* trial = _new_found(t)
    best.there = False
    if trial == NULL or not _open_nodes(t, &c, inside):
        return False
    if _count_bits(c.usable, t.site.words) < t.rules.want or not _can_give(t, c.there, NULL):
        return False
    pick = _find_picks(t, inside, t.open, t.unheld)
    if t.rules.want:
        _place_nearest(t, &c, pick, best, trial)
    else:
        while pick != NULL:
            if _span_pages(t, &c, pick, trial):
                _keep_better(best, trial)
            pick = pick.next
    return best.there and not t.arena.failed and t.trouble == NOTHING_FITS


cdef bint _open_nodes(Task* t, Corner* c, const uint8_t* inside) noexcept nogil:
    """Set what some nodes have. False: out of memory."""
    cdef const Site* site = t.site
    cdef int i, node, size
    memset(c, 0, sizeof(c[0]))
    c.usable = <uint64_t*>_grab(&t.arena, site.words * sizeof(uint64_t))
    c.cpus = <uint64_t*>_grab(&t.arena, site.words * sizeof(uint64_t))
    c.there = <int64_t*>_grab(&t.arena, t.sizes * site.nodes * sizeof(int64_t))
    if t.arena.failed:
        return False
    for node in range(site.nodes):
        if inside == NULL or inside[node]:
            for i in range(site.words):
                c.usable[i] |= site.cpus[node * site.words + i]
            for size in range(t.sizes):
                c.there[size * site.nodes + node] = t.there[size * site.nodes + node]
    for i in range(site.words):
        c.usable[i] = (c.usable[i] & t.free[i]) | t.rules.must[i]
        c.cpus[i] = (c.usable[i] & t.allowed[i]) | t.rules.must[i]
    return True


cdef void _place_nearest(Task* t, Corner* c, const Picked* first, Found* best, Found* trial) noexcept nogil:
    """Try the sets of devices whose CPUs can be nearest, until none of the others can be better."""
    cdef int count, at
    cdef Nearest* nearest = _find_nearest(t, c.cpus, first, &count)
    for at in range(count):
        if best.there and _compare_keys(best.key, nearest[at].key) <= 0:
            break
        _span(t, c, nearest + at, trial)
        _keep_better(best, trial)


# ------------------------------------------------------------------ NUMA policies

cdef bint _under_policy(Task* t, const Units* units, int most, Found* best) noexcept nogil:
    """Find the best placement on `most` units; return whether there is one."""
    cdef Cover cover
    cdef Chunk* top
    cdef Py_ssize_t used
    cdef uint8_t* inside = <uint8_t*>_grab(&t.arena, t.site.nodes)
    cdef Found* here
    cdef int tried = 0
    best.there = False
    if not _own_devices(t, best) or not _measure(t, units, &cover, False) \
            or not _start_sets(&t.arena, &cover, most, 0):
        return False
    while _next_set(&cover):
        if tried == MOST_UNIVERSES:
            t.steps.cut = True
            break
        tried += 1
        _nodes_of_set(t, units, &cover, inside)
        top, used = t.arena.top, t.arena.top.used
        here = _new_found(t)
        if here != NULL and _place_within(t, inside, here):
            _keep_found(t, best, here)
        _release(&t.arena, top, used)
    return best.there


cdef void _keep_found(const Task* t, Found* best, const Found* here) noexcept nogil:
    """Copy a placement that is better. Its devices are copied too: the memory they lie in is used again."""
    cdef Picked* pick = <Picked*>best.pick
    cdef uint64_t* cpus = best.cpus
    cdef int64_t* taken = best.taken
    cdef int* order = best.order
    if best.there and _compare_keys(here.key, best.key) >= 0:
        return
    best[0] = here[0]
    best.cpus, best.taken, best.order, best.pick = cpus, taken, order, pick
    memcpy(cpus, here.cpus, t.site.words * sizeof(uint64_t))
    memcpy(taken, here.taken, t.sizes * t.site.nodes * sizeof(int64_t))
    memcpy(order, here.order, t.site.nodes * sizeof(int))
    if t.pool != NULL:
        memcpy(<int*>pick.taken, here.pick.taken, t.pool.classes * sizeof(int))
        memcpy(<uint8_t*>pick.usable, here.pick.usable, t.pool.devices)


cdef bint _own_devices(Task* t, Found* found) noexcept nogil:
    """Give a placement memory of its own for its devices. False: out of memory."""
    cdef Picked* pick = <Picked*>_grab(&t.arena, sizeof(Picked))
    if pick == NULL:
        return False
    if t.pool != NULL:
        pick.taken = <int*>_grab(&t.arena, t.pool.classes * sizeof(int))
        pick.usable = <uint8_t*>_grab(&t.arena, t.pool.devices)
    found.pick = pick
    return not t.arena.failed


cdef void _nodes_of_set(const Task* t, const Units* units, const Cover* cover, uint8_t* inside) noexcept nogil:
    """Set the nodes of the current set of units."""
    cdef int at, unit, i
    memset(inside, 0, t.site.nodes)
    for at in range(cover.count):
        unit = _member(cover, at)
        for i in range(units.start[unit], units.start[unit + 1]):
            inside[units.nodes[i]] = 1


cdef bint _measure(Task* t, const Units* units, Cover* cover, bint empty) noexcept nogil:
    """Set up the cover of a whole request: CPUs, pages and memory, devices of each kind. Devices whose node is not known
    are there wherever the rest goes. empty: as if nothing were held. False: out of memory."""
    cdef int kinds = t.pool.kinds if t.pool != NULL else 0, unit, i, kind, size
    cdef uint8_t* nodes = <uint8_t*>_grab(&t.arena, t.site.nodes)
    cdef const int64_t* there = t.total if empty else t.there
    cdef int64_t* gives
    if not _open_cover(&t.arena, cover, units.count, 1 + t.sizes + kinds, 0, &t.steps):
        return False
    cover.want[0] = t.rules.want
    memcpy(cover.want + 1, t.want, t.sizes * sizeof(int64_t))
    for kind in range(kinds):
        cover.want[1 + t.sizes + kind] = t.need[kind] - _together(t, kind, NULL, empty)
    for unit in range(units.count):
        memset(nodes, 0, t.site.nodes)
        gives = cover.gives + unit * cover.parts
        for i in range(units.start[unit], units.start[unit + 1]):
            nodes[units.nodes[i]] = 1
            gives[0] += _permitted_on(t, units.nodes[i], empty)
            for size in range(t.sizes):
                gives[1 + size] += there[size * t.site.nodes + units.nodes[i]]
        for kind in range(kinds):
            gives[1 + t.sizes + kind] = _together(t, kind, nodes, empty)
    return not t.arena.failed


cdef int _permitted_on(const Task* t, int node, bint empty) noexcept nogil:
    """Return how many free CPUs of a node the options permit; those that must be taken are among them."""
    cdef int i, count = 0
    cdef uint64_t word
    for i in range(t.site.words):
        word = t.unreserved[i] & t.allowed[i] if empty else (t.free[i] & t.allowed[i]) | t.rules.must[i]
        count += na_popcount(word & t.site.cpus[node * t.site.words + i])
    return count


cdef int _together(Task* t, int kind, const uint8_t* nodes, bint empty) noexcept nogil:
    """Return how many devices of a kind on some nodes (NULL: on no known one) can be given away together: parts before
    their wholes."""
    cdef const Devices* d = t.pool
    cdef uint8_t* chosen
    cdef int position, device, node, count = 0
    cdef bint here
    chosen = <uint8_t*>_grab(&t.arena, d.devices)
    if chosen == NULL:
        return 0
    for position in range(d.devices):
        device = d.by_things[position]
        node = d.node_of[d.class_of[device]]
        if d.kind_of[d.class_of[device]] != kind or (t.held[device] != 0 and not empty):
            continue
        if nodes == NULL:
            here = node == ANYWHERE
        else:
            here = node >= 0 and nodes[node] != 0
        if here and not _is_excluded(d, chosen, device):
            chosen[device] = 1
            count += 1
    return count


cdef int _least_units(Task* t, const Units* units) noexcept nogil:
    """Return how many units an empty machine needs for the request."""
    cdef Cover cover
    cdef Steps own = Steps(COVER_STEPS, False)
    cdef int count
    if not _measure(t, units, &cover, True) or not _look_ahead(&t.arena, &cover):
        return units.count
    cover.steps = &own
    for count in range(max(1, _least_size(&cover)), units.count + 1):
        if _holds(t, units, &cover, count):
            return count
    return units.count


cdef bint _holds(Task* t, const Units* units, Cover* cover, int count) noexcept nogil:
    """Return whether some units hold the request on an empty machine, with devices that may exclude each other."""
    cdef uint8_t* inside = <uint8_t*>_grab(&t.arena, t.site.nodes)
    cdef int tried = 0
    if inside == NULL or not _start_sets(&t.arena, cover, count, 0):
        return False
    while tried < MOST_UNIVERSES and _next_set(cover):
        if t.pool == NULL or not t.pool.conflicts:
            return True
        tried += 1
        _nodes_of_set(t, units, cover, inside)
        if _find_picks(t, inside, t.open_empty, t.unheld_empty) != NULL:
            return True
    return False


cdef bint _lies_in(Task* t, const Found* found, const Units* units, int most) noexcept nogil:
    """Return whether all parts of a placement are in at most `most` units."""
    cdef uint8_t* used = <uint8_t*>_grab(&t.arena, 2 * t.site.nodes)
    cdef uint8_t* inside = used + t.site.nodes
    cdef int unit, i, node, touched = 0
    cdef bint touches
    if used == NULL or not _nodes_used(t, found, used):
        return False
    for unit in range(units.count):
        touches = False
        for i in range(units.start[unit], units.start[unit + 1]):
            touches = touches or used[units.nodes[i]] != 0
        touched += touches
        for i in range(units.start[unit], units.start[unit + 1] if touches else units.start[unit]):
            inside[units.nodes[i]] = 1
    for node in range(t.site.nodes):
        if used[node] != 0 and inside[node] == 0:
            return False
    return touched <= most


cdef bint _nodes_used(const Task* t, const Found* found, uint8_t* used) noexcept nogil:
    """Set the nodes of all parts of a placement; False if a device is on a node that the machine does not have."""
    cdef int node, size, cls
    _nodes_of(t.site, found.cpus, used)
    for node in range(t.site.nodes):
        for size in range(t.sizes):
            used[node] |= found.taken[size * t.site.nodes + node] > 0
    for cls in range(t.pool.classes if t.pool != NULL else 0):
        if found.pick.taken[cls]:
            if t.pool.node_of[cls] == NO_SUCH_NODE:
                return False
            if t.pool.node_of[cls] != ANYWHERE:
                used[t.pool.node_of[cls]] = 1
    return True

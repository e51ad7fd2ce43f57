# The joint decision: devices, CPUs, pages and memory of one request. Included by _fastpath.pyx.
#
# First the devices with the best links are chosen (every best set, one for each set of places where they are), then the
# CPUs nearest to them, then as few packages and NUMA nodes as possible for CPUs, pages and memory together.

cdef enum:
    KEY_PARTS = 18
    COST_PARTS = 13


cdef struct Units:
    # What a NUMA policy counts: each node by itself, or the nodes of each package.
    int count
    int* start                        # by unit, and once more: where its row of `nodes` starts
    int* nodes


cdef struct Site:
    # NUMA nodes in order of id, also those without CPUs; CPUs without a node count as one more, the first.
    int nodes, words, package_words
    uint64_t* cpus                    # nodes x words: masks of CPU ids
    uint64_t* packages                # nodes x package_words
    int* distance                     # nodes x nodes
    Units each, of_packages


cdef struct Picked:
    # One best set of devices.
    Picked* next
    int64_t links, cut
    bint exact
    const int* taken                  # by class
    const uint8_t* usable             # by device: what it was taken from


cdef struct Found:
    # A placement and its sort key: its cost as the options rank it, and how far its CPUs alone are spread.
    bint there, exact
    int64_t[KEY_PARTS] key
    int64_t[COST_PARTS] cost
    uint64_t* cpus
    int64_t* taken                    # sizes x nodes
    int* order                        # nodes of pages and memory, in the order in which they give
    int givers
    const Picked* pick


cdef struct Task:
    # One request on one machine, with everything that is the same wherever it is tried.
    const Site* site
    const Shape* shape
    const Devices* pool               # NULL: no devices are requested
    Rules rules
    Arena arena
    Steps steps
    Outcome trouble                   # what ended the search early
    int bits
    Py_ssize_t ids                    # more than the id of every CPU
    uint64_t* free                    # CPUs that can be granted
    uint64_t* allowed                 # CPUs that the options permit
    uint64_t* unreserved              # CPUs of an empty machine
    uint64_t* near_fixed              # by CPU id: distance to what the whole request should be near; NULL: none
    int64_t* node_fixed               # by node: the same of its memory
    # Pages by size, and memory: how much is wanted, and what each node can give, and could if it were empty.
    int sizes
    int64_t* want
    int64_t* there                    # sizes x nodes
    int64_t* total
    # Devices.
    int* need                         # by kind
    uint8_t* must                     # by device
    uint8_t* open                     # by device: whether it may be taken, and could be if nothing were held
    uint8_t* open_empty
    uint8_t* held
    int* unheld                       # by class: devices that are not held
    int* unheld_empty
    int64_t* alone                    # by class: what one costs by itself
    # Scratch.
    char* marks                       # tables of an open search, and of a copy of it
    char* work
    uint64_t* near


cdef struct Corner:
    # A task on some nodes.
    uint64_t* usable                  # CPUs that can be granted there
    uint64_t* cpus                    # those of them that the options permit
    int64_t* there                    # sizes x nodes
    Levels levels
    bint opened                       # whether the levels are
    int* unit_node                    # nodes of the levels' units


# ------------------------------------------------------------------ devices

cdef Picked* _find_picks(Task* t, const uint8_t* inside, const uint8_t* open, const int* unheld) noexcept nogil:
    """Return every best set of devices on some nodes (NULL: on all), one for each set of places. No two devices of a set
    exclude each other."""
    cdef const Devices* d = t.pool
    cdef Draws draws
    cdef Picked* first = NULL
    cdef Picked** end = &first
    cdef uint8_t* usable
    cdef int draw
    if d == NULL:
        return _no_devices(t)
    usable = _usable_devices(t, inside, open)
    if usable == NULL or not _are_enough(t, usable):
        return NULL
    draws.count, draws.complete, draws.usable[0] = 1, True, usable
    if d.conflicts and not _find_draws(&t.arena, d, usable, t.must, t.need, &draws):
        return NULL
    for draw in range(draws.count):
        end = _picks_among(t, draws.usable[draw], unheld, draws.complete, end)
        if end == NULL:
            return NULL
    return _best_linked(first)


cdef Picked* _no_devices(Task* t) noexcept nogil:
    cdef Picked* none = <Picked*>_grab(&t.arena, sizeof(Picked))
    if none != NULL:
        none.exact = True
    return none


cdef uint8_t* _usable_devices(Task* t, const uint8_t* inside, const uint8_t* open) noexcept nogil:
    """Return which devices may be taken on some nodes; what must be taken may be anywhere. NULL: out of memory."""
    cdef const Devices* d = t.pool
    cdef uint8_t* usable = <uint8_t*>_grab(&t.arena, d.devices)
    cdef int device, node
    if usable == NULL:
        return NULL
    for device in range(d.devices):
        node = d.node_of[d.class_of[device]]
        usable[device] = t.must[device] != 0 or (open[device] != 0 and _is_inside(node, inside))
    return usable


cdef inline bint _is_inside(int node, const uint8_t* inside) noexcept nogil:
    """Return whether a device on a node may be used with some nodes; one whose node is not known may be with any."""
    return inside == NULL or node == ANYWHERE or (node >= 0 and inside[node] != 0)


cdef bint _are_enough(Task* t, const uint8_t* usable) noexcept nogil:
    """Return whether there are as many devices of each kind as are requested, whatever they exclude."""
    cdef const Devices* d = t.pool
    cdef int kind, device, count
    for kind in range(d.kinds):
        count = 0
        for device in range(d.devices):
            count += usable[device] != 0 and d.kind_of[d.class_of[device]] == kind
        if count < t.need[kind]:
            return False
    return True


cdef Picked** _picks_among(Task* t, const uint8_t* usable, const int* unheld, bint complete,
                           Picked** end) noexcept nogil:
    """Append the best sets of some devices, none of which excludes another; return the new end, NULL: out of memory."""
    cdef const Devices* d = t.pool
    cdef Pick p
    cdef int cls, device, tie
    if not _open_pick(&t.arena, &p, d.classes, d.kinds, d.places):
        return NULL
    p.kind_of, p.anchor, p.far, p.link = d.kind_of, d.place_of, d.far, d.link
    memcpy(p.left, t.need, d.kinds * sizeof(int))
    memcpy(p.adds, t.alone, d.classes * sizeof(int64_t))
    for device in range(d.devices):
        p.there[d.class_of[device]] += usable[device]
        p.must[d.class_of[device]] += usable[device] & t.must[device]
    for cls in range(d.classes):
        p.free[cls] = max(p.there[cls], unheld[cls])
    _pick_all(&p)
    for tie in range(p.ties):
        end[0] = <Picked*>_grab(&t.arena, sizeof(Picked))
        if end[0] == NULL:
            return NULL
        end[0].links, end[0].cut = p.best, p.tie_cut[tie]
        end[0].exact = complete and p.steps <= PICK_BUDGET and not p.dropped
        end[0].taken, end[0].usable = p.tie_taken + tie * d.classes, usable
        end = &end[0].next
    return end


cdef Picked* _best_linked(Picked* first) noexcept nogil:
    """Return the sets with the best links of all, in the same order."""
    cdef Picked* pick = first
    cdef Picked* best = NULL
    cdef Picked** end = &best
    cdef int64_t least = INT64_MAX
    while pick != NULL:
        least = min(least, pick.links)
        pick = pick.next
    pick = first
    while pick != NULL:
        if pick.links == least:
            end[0] = pick
            end = &pick.next
        pick = pick.next
    end[0] = NULL
    return best


# ------------------------------------------------------------------ CPUs

cdef bint _search_in(Task* t, const uint64_t* cpus, const uint64_t* near, int most_nodes, uint64_t* out,
                     Chosen* chosen) noexcept nogil:
    """Search for the best of some CPUs on up to a number of nodes (0: as the request says); return whether there is a
    choice."""
    cdef Rules rules = t.rules
    cdef Marked marked
    if most_nodes:
        rules.most_nodes = most_nodes
    memset(t.marks, 0, _work_bytes(t.shape))
    _open_search(t.shape, &rules, cpus, t.marks, &marked)
    return _search_near(t, &marked, near, NULL, out, chosen)


cdef bint _search_near(Task* t, const Marked* marked, const uint64_t* near, const uint64_t* enough, uint64_t* out,
                       Chosen* chosen) noexcept nogil:
    """Search for the best of the CPUs that are marked; return whether there is a choice."""
    cdef Outcome outcome
    if t.rules.want > t.shape.cpus:
        return False
    memset(out, 0, t.site.words * sizeof(uint64_t))
    outcome = _search_again(t.shape, &t.rules, marked, near, enough, t.work, out, chosen)
    if outcome == TOO_WIDE or outcome == NO_MEMORY:
        t.trouble, t.bits = outcome, chosen.bits
    return outcome == FITS


cdef const uint64_t* _near_of(Task* t, const Picked* pick) noexcept nogil:
    """Return by CPU id the distances to a set of devices and to all else that the request should be near; NULL: no CPU is
    far from anything."""
    cdef const Devices* d = t.pool
    cdef const uint32_t* weight
    cdef int cls, id
    cdef uint64_t any = 0, count
    if t.near_fixed != NULL:
        memcpy(t.near, t.near_fixed, t.ids * sizeof(uint64_t))
    else:
        memset(t.near, 0, t.ids * sizeof(uint64_t))
    for cls in range(d.classes if d != NULL else 0):
        if pick.taken[cls]:
            count, weight = pick.taken[cls], d.cpu_weight + <Py_ssize_t>d.place_of[cls] * d.cpu_ids
            _add_weights(t.near, weight, count, d.cpu_ids)
    for id in range(t.ids):
        any |= t.near[id]
    return t.near if any else NULL


cdef void _add_weights(uint64_t* sums, const uint32_t* weight, uint64_t count, int ids) noexcept nogil:
    """Add `count` times some weights."""
    cdef int id
    if count == 1:
        for id in range(ids):
            sums[id] += weight[id]
    else:
        for id in range(ids):
            sums[id] += count * weight[id]


cdef bint _same_lead(const Chosen* x, const Chosen* y) noexcept nogil:
    return _compare_leads(x, y) == 0


cdef int _compare_leads(const Chosen* x, const Chosen* y) noexcept nogil:
    """Compare the parts of the cost of CPUs before packages: whether it is uneven, near, preference."""
    if (x.uneven > 0) != (y.uneven > 0):
        return 1 if x.uneven > 0 else -1
    if x.near != y.near:
        return 1 if x.near > y.near else -1
    if x.taste != y.taste:
        return 1 if x.taste > y.taste else -1
    return 0


cdef struct Nearest:
    # A set of devices, and the CPUs nearest to it.
    const Picked* pick
    Chosen chosen
    uint64_t* cpus
    int64_t[KEY_PARTS] key            # of a placement with them if pages and memory fit on their nodes; else it is larger
    int order


cdef Nearest* _find_nearest(Task* t, const uint64_t* cpus, const Picked* first, int* count) noexcept nogil:
    """Return the sets of devices whose CPUs can be nearest, best first, each with the nearest CPUs; NULL: there is none."""
    cdef const Picked* pick = first
    cdef Nearest* found
    cdef Nearest* one
    cdef Marked marked
    cdef uint64_t[2] enough
    cdef int most = 0, order = 0
    count[0] = 0
    while pick != NULL:
        most += 1
        pick = pick.next
    found = <Nearest*>_grab(&t.arena, (most + 1) * sizeof(Nearest))
    if found == NULL:
        return NULL
    memset(t.marks, 0, _work_bytes(t.shape))
    _open_search(t.shape, &t.rules, cpus, t.marks, &marked)
    pick = first
    while pick != NULL:
        one = found + count[0]
        one.pick, one.order = pick, order
        if one.cpus == NULL:
            one.cpus = <uint64_t*>_grab(&t.arena, t.site.words * sizeof(uint64_t))
        if one.cpus == NULL:
            return NULL
        if count[0]:
            enough[0], enough[1] = found.chosen.near, found.chosen.taste
        if _search_near(t, &marked, _near_of(t, pick), enough if count[0] and not found.chosen.uneven else NULL, one.cpus,
                        &one.chosen):
            _keep_nearest(t, found, count)
        pick, order = pick.next, order + 1
    qsort(found, count[0], sizeof(Nearest), _by_key)
    return found


cdef void _keep_nearest(Task* t, Nearest* found, int* count) noexcept nogil:
    """Keep the set behind the first `count` alongside those as near, or alone if it is nearer, or not at all."""
    cdef Nearest* one = found + count[0]
    cdef Nearest spare
    cdef int nearer = _compare_leads(&one.chosen, &found.chosen) if count[0] else 0
    _set_key(t, one.key, one.pick, &one.chosen, &one.chosen, one.chosen.near)
    if nearer < 0:
        spare = found[0]
        found[0] = one[0]
        one[0] = spare
        count[0] = 1
    elif nearer == 0:
        count[0] += 1


cdef int _by_key(const void* x, const void* y) noexcept nogil:
    cdef const Nearest* a = <const Nearest*>x
    cdef const Nearest* b = <const Nearest*>y
    cdef int way = _compare_keys(a.key, b.key)
    return way if way else a.order - b.order


cdef int _compare_keys(const int64_t* x, const int64_t* y) noexcept nogil:
    cdef int part
    for part in range(KEY_PARTS):
        if x[part] != y[part]:
            return 1 if x[part] > y[part] else -1
    return 0


cdef void _set_key(const Task* t, int64_t* key, const Picked* pick, const Chosen* own, const Chosen* whole,
                   int64_t near) noexcept nogil:
    """Write the parts of a cost as the options rank them. own: the CPUs alone; whole: packages, nodes and distance of the
    whole placement."""
    key[0], key[1], key[2], key[3] = pick.links, own.uneven > 0, near, own.taste
    key[4], key[5], key[6], key[7] = whole.packages, whole.nodes, own.uneven, whole.distance
    key[8], key[9], key[10] = own.packages, own.nodes, own.distance
    _rank_cores(t, key + 11, own)
    key[13], key[14], key[15] = own.nodes_broken, own.groups_broken, own.cores_broken
    key[16], key[17] = pick.cut, own.ids


cdef void _rank_cores(const Task* t, int64_t* key, const Chosen* own) noexcept nogil:
    """Write the number of L3 groups and of split cores in the order in which the options rank them."""
    key[0], key[1] = own.groups, own.split
    if t.rules.spread_cores:
        key[0], key[1] = own.split, own.groups

# Pages and memory of a joint decision, and what it costs altogether. Included by _fastpath.pyx.

# ------------------------------------------------------------------ what nodes can give

cdef bint _can_give(const Task* t, const int64_t* there, const uint8_t* nodes) noexcept nogil:
    """Return whether some nodes (NULL: all) have enough pages and memory."""
    cdef int size, node
    cdef int64_t sum
    for size in range(t.sizes):
        sum = 0
        for node in range(t.site.nodes):
            if nodes == NULL or nodes[node]:
                sum += there[size * t.site.nodes + node]
        if sum < t.want[size]:
            return False
    return True


cdef bint _has_any(const Task* t, const int64_t* there, int node) noexcept nogil:
    """Return whether a node has any of what is wanted."""
    cdef int size
    for size in range(t.sizes):
        if there[size * t.site.nodes + node]:
            return True
    return False


cdef void _nodes_of(const Site* site, const uint64_t* cpus, uint8_t* nodes) noexcept nogil:
    """Set which nodes some CPUs are on."""
    cdef int node, i
    cdef uint64_t any
    for node in range(site.nodes):
        any = 0
        for i in range(site.words):
            any |= cpus[i] & site.cpus[node * site.words + i]
        nodes[node] = any != 0


cdef int _cpus_on(const Site* site, const uint64_t* cpus, int node) noexcept nogil:
    cdef int i, count = 0
    for i in range(site.words):
        count += na_popcount(cpus[i] & site.cpus[node * site.words + i])
    return count


cdef int64_t _distance_of(const Site* site, const uint8_t* nodes) noexcept nogil:
    """Return the sum of the distances between some nodes, in both directions."""
    cdef int x, y
    cdef int64_t total = 0
    for x in range(site.nodes):
        if nodes[x]:
            for y in range(site.nodes):
                if y != x and nodes[y]:
                    total += site.distance[x * site.nodes + y]
    return total


cdef int _packages_of(const Site* site, const uint8_t* nodes) noexcept nogil:
    """Return how many packages have CPUs on some nodes."""
    cdef int node, i, total = 0
    cdef uint64_t any
    for i in range(site.package_words):
        any = 0
        for node in range(site.nodes):
            if nodes[node]:
                any |= site.packages[node * site.package_words + i]
        total += na_popcount(any)
    return total


# ------------------------------------------------------------------ sets of nodes

cdef Level* _next_sets(Task* t, Corner* c, Level* last, int cpus) noexcept nogil:
    """Return the smallest sets of nodes with enough of everything that are larger than those of `last` (NULL: the
    smallest of all); NULL if there are none."""
    if not c.opened and not _open_corner(t, c, cpus):
        return NULL
    c.opened = True
    return _next_level(&t.arena, &c.levels, last)


cdef bint _open_corner(Task* t, Corner* c, int cpus) noexcept nogil:
    """Set up the cover of the nodes that have free CPUs (if any are wanted), pages or memory. False: out of memory."""
    cdef const Site* site = t.site
    cdef Cover* cover = &c.levels.cover
    cdef int node, unit = 0, size
    cdef int* on = <int*>_grab(&t.arena, site.nodes * sizeof(int))
    cdef uint8_t* needed = <uint8_t*>_grab(&t.arena, site.nodes)
    c.unit_node = <int*>_grab(&t.arena, site.nodes * sizeof(int))
    if t.arena.failed:
        return False
    for node in range(site.nodes):
        on[node] = _cpus_on(site, c.usable, node) if cpus else 0
        if on[node] or _has_any(t, c.there, node):
            c.unit_node[unit] = node
            needed[unit] = cpus > 0 and _cpus_on(site, t.rules.must, node) > 0
            unit += 1
    if not _open_cover(&t.arena, cover, unit, 1 + t.sizes, site.package_words, &t.steps):
        return False
    c.levels.needed, c.levels.any_unit = needed, cpus == 0
    cover.want[0] = cpus
    memcpy(cover.want + 1, t.want, t.sizes * sizeof(int64_t))
    for unit in range(cover.units):
        node = c.unit_node[unit]
        cover.gives[unit * cover.parts] = on[node]
        for size in range(t.sizes):
            cover.gives[unit * cover.parts + 1 + size] = c.there[size * site.nodes + node]
        memcpy(cover.packages + unit * cover.words, site.packages + node * cover.words, cover.words * sizeof(uint64_t))
    return _open_levels(&t.arena, &c.levels)


cdef void _members_of(const Task* t, const Corner* c, const NodeSet* some, int size, uint8_t* nodes) noexcept nogil:
    """Set which nodes are in a set."""
    cdef int at
    memset(nodes, 0, t.site.nodes)
    for at in range(size):
        nodes[c.unit_node[some.members[at]]] = 1


cdef NodeSet** _by_compactness(Task* t, const Corner* c, const Level* level, uint8_t* nodes) noexcept nogil:
    """Return the sets of a level, the most compact first, of equals the lowest; NULL: out of memory."""
    cdef NodeSet** sets = <NodeSet**>_grab(&t.arena, level.count * sizeof(NodeSet*))
    cdef NodeSet* some = level.first
    cdef int count = 0
    if sets == NULL:
        return NULL
    while some != NULL:
        if level.size > 1:
            _members_of(t, c, some, level.size, nodes)
            some.distance = _distance_of(t.site, nodes)
        sets[count] = some
        count += 1
        some = some.next
    qsort(sets, count, sizeof(NodeSet*), _by_distance)
    return sets


cdef int _by_distance(const void* x, const void* y) noexcept nogil:
    cdef const NodeSet* a = (<NodeSet**>x)[0]
    cdef const NodeSet* b = (<NodeSet**>y)[0]
    if a.distance != b.distance:
        return 1 if a.distance > b.distance else -1
    return a.order - b.order


# ------------------------------------------------------------------ pages with CPUs

cdef void _span(Task* t, Corner* c, const Nearest* one, Found* out) noexcept nogil:
    """Place pages and memory together with CPUs that are as near as those of `one`, all on as few nodes as possible."""
    cdef uint8_t* nodes = <uint8_t*>_grab(&t.arena, t.site.nodes)
    cdef uint64_t* cpus = <uint64_t*>_grab(&t.arena, t.site.words * sizeof(uint64_t))
    cdef Chosen chosen
    cdef Level* level = NULL
    cdef int node
    if t.arena.failed:
        return
    _nodes_of(t.site, one.cpus, nodes)
    if t.sizes == 0 or _can_give(t, c.there, nodes):
        # The nodes of the overall best CPUs have enough of everything else: nothing can be better.
        _complete(t, c.there, one.cpus, &one.chosen, nodes, NULL, one.pick, 0, out)
        return
    while True:
        level = _next_sets(t, c, level, t.rules.want)
        if level == NULL:
            break
        if _best_set(t, c, one, level, nodes, cpus, &chosen):
            _complete(t, c.there, cpus, &chosen, nodes, NULL, one.pick, 0, out)
            return
    # Too many sets to examine: keep the CPUs, and take pages from their nodes first, then from any.
    t.steps.cut = True
    for node in range(t.site.nodes):
        nodes[node] = _has_any(t, c.there, node)
    _complete(t, c.there, one.cpus, &one.chosen, nodes, NULL, one.pick, 0, out)


cdef bint _best_set(Task* t, Corner* c, const Nearest* one, const Level* level, uint8_t* nodes, uint64_t* cpus,
                    Chosen* chosen) noexcept nogil:
    """Find the best of equally small sets of nodes: the most compact one whose CPUs can be as near, and match the
    preferences as well, as anywhere; among equals, the one with the best CPUs. Return whether there is one."""
    cdef const uint64_t* near = _near_of(t, one.pick)
    cdef uint64_t* within
    cdef NodeSet* some = level.first
    if level.size > 1:
        return _closest_set(t, c, one, level, near, nodes, cpus, chosen)
    # One search for all single nodes: the search for CPUs compares them itself.
    within = <uint64_t*>_grab(&t.arena, t.site.words * sizeof(uint64_t))
    if within == NULL:
        return False
    memset(nodes, 0, t.site.nodes)
    while some != NULL:
        nodes[c.unit_node[some.members[0]]] = 1
        some = some.next
    _narrow(t, c.usable, nodes, within)
    if not _search_in(t, within, near, 1, cpus, chosen) or not _same_lead(chosen, &one.chosen):
        return False
    _nodes_of(t.site, cpus, nodes)
    return True


cdef bint _closest_set(Task* t, Corner* c, const Nearest* one, const Level* level, const uint64_t* near,
                       uint8_t* nodes, uint64_t* cpus, Chosen* chosen) noexcept nogil:
    """Find the same among sets of several nodes, skipping every set that is less compact than one that will do."""
    cdef NodeSet** sets = _by_compactness(t, c, level, nodes)
    cdef uint64_t* within = <uint64_t*>_grab(&t.arena, 2 * t.site.words * sizeof(uint64_t))
    cdef uint64_t* trial = within + t.site.words
    cdef Chosen here
    cdef int64_t[11] rank, least
    cdef int at
    cdef NodeSet* best = NULL
    if t.arena.failed:
        return False
    for at in range(level.count):
        if best != NULL and least[0] == 0 and sets[at].distance > least[1]:
            break
        _members_of(t, c, sets[at], level.size, nodes)
        _narrow(t, c.usable, nodes, within)
        if not _search_in(t, within, near, 0, trial, &here) or not _same_lead(&here, &one.chosen):
            continue
        _rank_set(t, rank, &here, sets[at].distance)
        if best == NULL or _is_less(rank, least, 11):
            best, chosen[0] = sets[at], here
            memcpy(least, rank, sizeof(rank))
            memcpy(cpus, trial, t.site.words * sizeof(uint64_t))
    if best != NULL:
        _members_of(t, c, best, level.size, nodes)
    return best != NULL


cdef void _rank_set(const Task* t, int64_t* rank, const Chosen* here, int64_t distance) noexcept nogil:
    """Write what decides between sets of nodes that are equally small."""
    rank[0], rank[1] = here.uneven, distance
    rank[2], rank[3], rank[4] = here.packages, here.nodes, here.distance
    _rank_cores(t, rank + 5, here)
    rank[7], rank[8], rank[9], rank[10] = here.nodes_broken, here.groups_broken, here.cores_broken, here.ids


cdef bint _is_less(const int64_t* x, const int64_t* y, int parts) noexcept nogil:
    cdef int part
    for part in range(parts):
        if x[part] != y[part]:
            return x[part] < y[part]
    return False


cdef void _narrow(const Task* t, const uint64_t* usable, const uint8_t* nodes, uint64_t* out) noexcept nogil:
    """Set the CPUs on some nodes that the options permit, and those that must be taken."""
    cdef int node, i
    for i in range(t.site.words):
        out[i] = 0
        for node in range(t.site.nodes):
            if nodes[node]:
                out[i] |= t.site.cpus[node * t.site.words + i]
        out[i] = (usable[i] & out[i] & t.allowed[i]) | t.rules.must[i]


# ------------------------------------------------------------------ pages without CPUs

cdef bint _span_pages(Task* t, const Corner* c, const Picked* pick, Found* out) noexcept nogil:
    """Place pages and memory without CPUs: on the nodes nearest to the devices, then on as few as possible. Return
    whether they fit."""
    cdef int64_t* weight = <int64_t*>_grab(&t.arena, t.site.nodes * sizeof(int64_t))
    cdef uint8_t* nodes = <uint8_t*>_grab(&t.arena, t.site.nodes)
    cdef uint64_t* cpus = <uint64_t*>_grab(&t.arena, t.site.words * sizeof(uint64_t))
    cdef Corner near
    cdef Chosen none
    cdef int64_t bound = INT64_MIN
    if t.arena.failed:
        return False
    memset(&none, 0, sizeof(none))
    none.exact = True
    if t.sizes == 0:
        _complete(t, c.there, cpus, &none, nodes, NULL, pick, 0, out)
        return True
    _weigh_nodes(t, pick, weight)
    memset(&near, 0, sizeof(near))
    near.usable = c.usable
    near.there = <int64_t*>_grab(&t.arena, t.sizes * t.site.nodes * sizeof(int64_t))
    while not t.arena.failed and _next_bound(t, c.there, weight, &bound):
        _keep_near(t, c.there, weight, bound, near.there)
        if _can_give(t, near.there, NULL):
            _closest_pages(t, &near, nodes)
            _complete(t, near.there, cpus, &none, nodes, weight, pick, bound, out)
            return True
    return False


cdef void _weigh_nodes(const Task* t, const Picked* pick, int64_t* weight) noexcept nogil:
    """Set the distance of each node to a set of devices and to all else that the request should be near."""
    cdef const Devices* d = t.pool
    cdef int node, cls
    for node in range(t.site.nodes):
        weight[node] = t.node_fixed[node] if t.node_fixed != NULL else 0
        for cls in range(d.classes if d != NULL else 0):
            if pick.taken[cls]:
                weight[node] += pick.taken[cls] * d.node_weight[<Py_ssize_t>d.place_of[cls] * t.site.nodes + node]


cdef bint _next_bound(const Task* t, const int64_t* there, const int64_t* weight, int64_t* bound) noexcept nogil:
    """Go on to the next larger distance of a node that has anything; return whether there is one."""
    cdef int node
    cdef int64_t next = INT64_MAX
    cdef bint found = False
    for node in range(t.site.nodes):
        if weight[node] > bound[0] and _has_any(t, there, node):
            next = min(next, weight[node])
            found = True
    bound[0] = next
    return found


cdef void _keep_near(const Task* t, const int64_t* there, const int64_t* weight, int64_t bound, int64_t* out) noexcept nogil:
    """Copy what the nodes within a distance have."""
    cdef int size, node
    for size in range(t.sizes):
        for node in range(t.site.nodes):
            out[size * t.site.nodes + node] = there[size * t.site.nodes + node] if weight[node] <= bound else 0


cdef void _closest_pages(Task* t, Corner* near, uint8_t* nodes) noexcept nogil:
    """Set the smallest, most compact set of nodes with enough, or all nodes if there are too many sets."""
    cdef Level* level = NULL
    cdef NodeSet** sets
    cdef int node
    near.opened = False
    level = _next_sets(t, near, NULL, 0)
    if level != NULL:
        sets = _by_compactness(t, near, level, nodes)
        if sets != NULL:
            _members_of(t, near, sets[0], level.size, nodes)
        return
    t.steps.cut = True
    for node in range(t.site.nodes):
        nodes[node] = _has_any(t, near.there, node)


# ------------------------------------------------------------------ the result

cdef void _complete(Task* t, const int64_t* there, const uint64_t* cpus, const Chosen* chosen, const uint8_t* nodes,
                    const int64_t* weight, const Picked* pick, int64_t pages_near, Found* out) noexcept nogil:
    """Write the placement with pages and memory taken from some nodes: those of the CPUs first, then those with the
    least weight (NULL: all alike), then the lowest."""
    cdef uint8_t* used = <uint8_t*>_grab(&t.arena, t.site.nodes)
    if used == NULL:
        return
    memcpy(out.cpus, cpus, t.site.words * sizeof(uint64_t))
    _nodes_of(t.site, cpus, used)
    _order_givers(t, nodes, used, weight, out)
    _take_amounts(t, there, used, out)
    _price_all(t, used, chosen, pick, pages_near, out)
    out.there, out.pick = True, pick
    out.exact = chosen.exact and pick.exact


cdef void _order_givers(const Task* t, const uint8_t* nodes, const uint8_t* home, const int64_t* weight,
                        Found* out) noexcept nogil:
    cdef int node, at
    out.givers = 0
    for node in range(t.site.nodes):
        if not nodes[node]:
            continue
        at = out.givers
        while at > 0 and _gives_sooner(home, weight, node, out.order[at - 1]):
            out.order[at] = out.order[at - 1]
            at -= 1
        out.order[at] = node
        out.givers += 1


cdef bint _gives_sooner(const uint8_t* home, const int64_t* weight, int x, int y) noexcept nogil:
    if home[x] != home[y]:
        return home[x] > home[y]
    return weight != NULL and weight[x] < weight[y]


cdef void _take_amounts(const Task* t, const int64_t* there, uint8_t* used, Found* out) noexcept nogil:
    """Take as much as possible from the first node, then from the next; mark the nodes that give."""
    cdef int size, at, node
    cdef int64_t left, part
    memset(out.taken, 0, t.sizes * t.site.nodes * sizeof(int64_t))
    for size in range(t.sizes):
        left = t.want[size]
        for at in range(out.givers):
            node = out.order[at]
            part = min(left, there[size * t.site.nodes + node])
            out.taken[size * t.site.nodes + node] = part
            left -= part
            used[node] |= part > 0


cdef void _price_all(const Task* t, const uint8_t* used, const Chosen* own, const Picked* pick, int64_t pages_near,
                     Found* out) noexcept nogil:
    """Write cost and key; packages, nodes and distance include the nodes of pages and memory."""
    cdef Chosen whole = own[0]
    cdef int node, count = 0
    cdef int64_t near = own.near if own.near else pages_near
    for node in range(t.site.nodes):
        count += used[node] != 0
    if count > own.nodes:
        whole.nodes, whole.distance = count, _distance_of(t.site, used)
        whole.packages = max(own.packages, _packages_of(t.site, used))
    _set_key(t, out.key, pick, own, &whole, near)
    out.cost[0], out.cost[1], out.cost[2] = pick.links, near, own.taste
    out.cost[3], out.cost[4], out.cost[5] = whole.packages, whole.nodes, whole.distance
    out.cost[6], out.cost[7], out.cost[8] = own.groups, own.split, own.nodes_broken
    out.cost[9], out.cost[10], out.cost[11], out.cost[12] = own.groups_broken, own.cores_broken, pick.cut, own.ids

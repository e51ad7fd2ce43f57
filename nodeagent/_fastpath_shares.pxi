# Shares of nodes for requests that are spread over nodes: even ones, else those that differ least. Included by
# _fastpath.pyx.
#
# The prices of _fastpath_tables.pxi add up; how much the largest and the smallest share differ does not. So the search
# is run with bounds on the shares: even ones first, then the narrowest that leave a choice.

cdef Share ANY_SHARE = Share(0, 0)


cdef void _set_share(const Shape* s, Ask* a, Share share) noexcept nogil:
    """Set what a node may give."""
    if share.low != a.share.low or share.high != a.share.high:
        a.share = share
        _drop_classes(s, a)


cdef void _set_narrow(const Shape* s, Ask* a, bint narrow) noexcept nogil:
    """Set whether only the nearest choices count."""
    if narrow != a.narrow:
        a.narrow = narrow
        _drop_classes(s, a)


cdef void _drop_classes(const Shape* s, Ask* a) noexcept nogil:
    """Drop the tables that depend on shares."""
    cdef int cls
    for cls in range(s.classes):
        free(a.class_table[cls])
        a.class_table[cls] = NULL
    _reaches(s, a)


cdef void _reaches(const Shape* s, Ask* a) noexcept nogil:
    """Determine how many CPUs cells and classes can give within their shares."""
    cdef int cell, cls, most, i
    for cell in range(s.cells):
        most = a.cell_most[cell] if a.narrow else a.cell_cap[cell]
        if a.share.high:
            if most < a.share.low and s.node_cells[s.cell_node[cell]] == 1:
                most = 0
            most = min(most, a.share.high)
        a.cell_reach[cell] = most
    a.suffix[s.classes] = 0
    for cls in range(s.classes - 1, -1, -1):
        a.suffix[cls] = a.suffix[cls + 1] + _top(s, a, cls, s.class_start[cls + 1] - s.class_start[cls])
        a.class_least[cls] = 0
        for i in range(s.class_start[cls], s.class_start[cls + 1]):
            a.class_least[cls] += a.narrow and a.cell_least[s.class_cells[i]] > 0


# ------------------------------------------------------------------ even shares

cdef bint _search_even(const Shape* s, Ask* a, cost_t* scratch) noexcept nogil:
    """Search for a choice of even shares; without one, leave the steps for a search without bounds."""
    cdef bint found
    _steps(s, a)
    a.even = True
    found = _search(s, a, scratch)
    a.even = False
    if not found:
        a.cut = a.steps > STEP_BUDGET
        a.steps = 0
    return found


cdef void _steps(const Shape* s, Ask* a) noexcept nogil:
    """Determine by how much even shares may differ, and the steps in which nodes can give CPUs."""
    cdef int core, least = SMT_MAX, most = 1
    a.slack = a.stride = 1
    if a.whole_cores:
        for core in range(s.cores):
            least = min(least, s.core_cpus[core + 1] - s.core_cpus[core])
            most = max(most, s.core_cpus[core + 1] - s.core_cpus[core])
        a.slack = most
        a.stride = most if least == most else 1


cdef void _even_shares(const Shape* s, Ask* a, int packages, int nodes, cost_t* scratch) noexcept nogil:
    """Try all even shares of `nodes` nodes. With cores of one size there is one range of them."""
    cdef int low = a.want // nodes // a.stride * a.stride
    while low > 0 and <int64_t>(low + a.slack) * nodes > a.want:
        _set_share(s, a, Share(low, low + a.slack))
        _vectors(s, a, 0, packages, nodes, packages, nodes, 0, scratch)
        low -= a.stride


# ------------------------------------------------------------------ the least difference

cdef bint _search_uneven(const Shape* s, Ask* a, cost_t* scratch) noexcept nogil:
    """Search for the best choice among those whose shares differ least, given that none is even."""
    if not a.cut and _by_capacity(s, a, scratch):
        return True
    _set_narrow(s, a, False)
    a.found = False
    a.steps = 0
    a.difference = a.want
    if not _search(s, a, scratch):
        return False
    if a.best_nodes > 1:
        a.packages, a.nodes = a.best_packages, a.best_nodes
        _set_narrow(s, a, _can_narrow(s, a) and a.best_high == a.floor_high)
        _by_price(s, a, scratch)
    return True


cdef bint _by_capacity(const Shape* s, Ask* a, cost_t* scratch) noexcept nogil:
    """Search at the first packages and nodes that can have enough free CPUs among the nearest, with the narrowest shares
    that can; return whether this gives a choice that nothing can beat. Most often it does."""
    cdef int low, high
    if _can_narrow(s, a):
        _bound_nearest(s, a)
        _set_narrow(s, a, True)
    for a.packages in range(1, a.most_packages + 1):
        for a.nodes in range(2, a.most_nodes + 1):
            if _any(s, a, ANY_SHARE, BY_CAPACITY, scratch):
                low, high = _most_low(s, a, BY_CAPACITY, scratch), _least_high(s, a, BY_CAPACITY, scratch)
                _differ(s, a, low, high - low, scratch)
                return a.found and a.best_high == a.floor_high
    return False


cdef void _by_price(const Shape* s, Ask* a, cost_t* scratch) noexcept nogil:
    """Search with ever wider shares for a choice that is as near as the best one found without bounds, on as many
    packages and nodes."""
    cdef int low = _most_low(s, a, BY_PRICE, scratch), high = _least_high(s, a, BY_PRICE, scratch), lower
    cdef int difference = high - low
    while a.best_difference > difference and a.steps <= STEP_BUDGET and not a.out_of_memory:
        lower = low
        while lower > 0 and lower + difference >= high:
            _differ(s, a, lower, difference, scratch)
            lower -= a.stride
        difference += a.stride


cdef void _differ(const Shape* s, Ask* a, int low, int difference, cost_t* scratch) noexcept nogil:
    """Keep the best choice with shares from `low` on that differ by no more than `difference`."""
    a.difference = difference
    _set_share(s, a, Share(low, low + difference))
    if _possible(s, a):
        _vectors(s, a, 0, a.packages, a.nodes, a.packages, a.nodes, 0, scratch)


cdef int _most_low(const Shape* s, Ask* a, Probe probe, cost_t* scratch) noexcept nogil:
    """Return the largest number of CPUs that the smallest share can have."""
    cdef int least = 1, most = a.want // a.nodes // a.stride, middle
    while least < most:
        middle = (least + most + 1) // 2
        if _any(s, a, Share(middle * a.stride, a.want), probe, scratch):
            least = middle
        else:
            most = middle - 1
    return least * a.stride


cdef int _least_high(const Shape* s, Ask* a, Probe probe, cost_t* scratch) noexcept nogil:
    """Return the smallest number of CPUs that the largest share can have."""
    cdef int least = (a.want - 1) // (a.nodes * a.stride) + 1, most = (a.want - 1) // a.stride + 1, middle
    while least < most:
        middle = (least + most) // 2
        if _any(s, a, Share(a.stride, middle * a.stride), probe, scratch):
            most = middle
        else:
            least = middle + 1
    return least * a.stride


cdef bint _any(const Shape* s, Ask* a, Share share, Probe probe, cost_t* scratch) noexcept nogil:
    """Return whether these shares leave anything on as many packages and nodes, as far as the probe looks."""
    cdef bint fits
    _set_share(s, a, share)
    a.probe = probe
    if _possible(s, a):
        _vectors(s, a, 0, a.packages, a.nodes, a.packages, a.nodes, 0, scratch)
    fits = a.fits
    a.probe = WEIGH
    a.fits = False
    return fits


# ------------------------------------------------------------------ what the nearest choices have in common

cdef bint _can_narrow(const Shape* s, const Ask* a) noexcept nogil:
    """Return whether `floor_high` is the price of the nearest CPUs, so that `last_price` separates them from others."""
    return a.near != NULL and not s.priced_chips


cdef void _bound_nearest(const Shape* s, Ask* a) noexcept nogil:
    """Bound what a choice as near as the cheapest CPUs of all takes of each cell: all CPUs below the price of the last of
    them, and none above it."""
    cdef int cell, slot, below, above
    cdef uint64_t price
    for cell in range(s.cells):
        below = above = 0
        for slot in range(s.core_cpus[_first_core(s, cell)], s.core_cpus[_first_core(s, cell + 1)]):
            price = _price(a, slot)
            if a.free[slot] and (a.must[slot] or price < a.last_price):
                below += 1
            elif not a.free[slot] or price > a.last_price:
                above += 1
        a.cell_least[cell] = below
        a.cell_most[cell] = min(a.cell_cap[cell], _cell_cpus(s, cell) - above)


cdef bint _possible(const Shape* s, const Ask* a) noexcept nogil:
    """Return whether the CPUs that the nearest choices cannot do without leave room for shares like these."""
    cdef int node, cell, least, most, nodes = a.nodes
    cdef int64_t total = 0
    if not a.narrow:
        return True
    for node in range(s.nodes):
        least = most = 0
        for cell in range(s.cells):
            if s.cell_node[cell] == node:
                least += a.cell_least[cell]
                most += a.cell_most[cell]
        if least and a.share.high and (least > a.share.high or most < a.share.low):
            return False
        if least:
            total += max(least, a.share.low)
            nodes -= 1
    return nodes >= 0 and total + <int64_t>nodes * a.share.low <= a.want

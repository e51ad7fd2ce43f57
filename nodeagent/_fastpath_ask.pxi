# One search for CPUs: a request applied to a shape, and what was chosen. Included by _fastpath.pyx.

cdef enum:
    MOST_BITS = 125                   # of a packed cost
    FEW_PRICES = 64                   # distinct prices of single CPUs that are counted instead of sorted


cdef enum Outcome:
    NOTHING_FITS = 0
    FITS = 1
    NO_MEMORY = 2
    TOO_WIDE = 3                      # the cost needs more than MOST_BITS bits


cdef struct Rules:
    # How CPUs may be chosen; the same for all searches of a request.
    int want
    bint whole_cores, spread_cores, spread_nodes, groups_first
    int most_packages, most_nodes, most_groups     # 0: no limit
    const uint64_t* must              # a mask of CPU ids
    const uint64_t* taste             # by CPU id; NULL: no differences


cdef struct Chosen:
    # What was chosen, besides the CPUs; the parts of the cost as docs/placement.md names them.
    uint64_t near, taste, ids
    int packages, nodes, groups, split, nodes_broken, groups_broken, cores_broken
    int uneven                        # by how many CPUs the shares of nodes differ, if that is not even
    int64_t distance
    bint exact
    int bits                          # how many bits the cost needs


cdef struct Prices:
    # How many CPUs there are of each price.
    int kinds
    uint64_t[FEW_PRICES] price
    int[FEW_PRICES] count


cdef struct Marked:
    # A search as it is before anything is near: what is free is marked in its tables.
    Ask ask
    char* memory                      # _work_bytes(s): its tables, with the weights behind them
    Py_ssize_t marked                 # how much of that is in front of the weights


cdef void _open_search(const Shape* s, const Rules* r, const uint64_t* free, char* memory, Marked* m) noexcept nogil:
    """Mark the CPUs of the mask `free`. memory: zeroed, of _work_bytes(s)."""
    cdef Ask* a = &m.ask
    memset(m, 0, sizeof(m[0]))
    m.memory = memory
    a.want, a.whole_cores, a.spread_cores, a.groups_first = r.want, r.whole_cores, r.spread_cores, r.groups_first
    a.most_packages = min(r.most_packages, s.packages) if r.most_packages > 0 else s.packages
    a.most_nodes = min(r.most_nodes, s.nodes) if r.most_nodes > 0 else s.nodes
    m.marked = _lay_out(s, a, memory)
    _mark(s, free, r.must, a)


cdef Outcome _search_again(const Shape* s, const Rules* r, const Marked* m, const uint64_t* near,
                           const uint64_t* enough, char* memory, uint64_t* out, Chosen* found) noexcept nogil:
    """Search with a copy of an open search, whose tables `memory` has room for."""
    cdef Marked copy
    memcpy(memory, m.memory, m.marked)
    memset(&copy, 0, sizeof(copy))
    copy.ask = m.ask
    _lay_out(s, &copy.ask, memory)
    return _find_cpus(s, r, &copy, near, enough, out, found)


cdef Outcome _find_cpus(const Shape* s, const Rules* r, Marked* m, const uint64_t* near, const uint64_t* enough,
                        uint64_t* out, Chosen* found) noexcept nogil:
    """Search for the cheapest of the CPUs that are marked as free, and set their bits in `out`, which is clear.

    near: a weight for each CPU id, or NULL. enough: near and taste of a choice that is known, or NULL; nothing worse is
    looked for.
    """
    cdef Ask* a = &m.ask
    cdef uint64_t near_most = 0, taste_most = 0
    if near == NULL and r.taste == NULL:
        a.near = a.taste = NULL
    else:
        near_most = _by_slot(s, near, a.near)
        taste_most = _by_slot(s, r.taste, a.taste)
    found.bits = _widths(s, a, near_most, taste_most)
    if found.bits > MOST_BITS:
        return TOO_WIDE
    if a.near != NULL and not s.priced_chips:
        if not _floor(s, a):
            return NO_MEMORY
        if enough != NULL and _is_farther(a, enough[0], enough[1]):
            return NOTHING_FITS
    if not _choose(s, a, r.spread_nodes, out):
        return NO_MEMORY if a.out_of_memory else NOTHING_FITS
    if a.out_of_memory:
        return NO_MEMORY
    _read(s, a, out, r.spread_nodes, found)
    return NOTHING_FITS if r.most_groups and found.groups > r.most_groups else FITS


cdef uint64_t _by_slot(const Shape* s, const uint64_t* by_id, uint64_t* weights) noexcept nogil:
    """Copy weights by CPU id (NULL: none) to those by slot; return the largest."""
    cdef uint64_t most = 0
    cdef int slot
    if by_id == NULL:
        memset(weights, 0, s.cpus * sizeof(uint64_t))
        return 0
    for slot in range(s.cpus):
        weights[slot] = by_id[s.cpu_id[slot]]
        most = max(most, weights[slot])
    return most


cdef bint _is_farther(const Ask* a, uint64_t near, uint64_t taste) noexcept nogil:
    """Return whether even the cheapest CPUs are farther than a known choice, or equally far and match tastes less."""
    cdef cost_t known = (<cost_t>near << (a.at_near - a.at_low)) + (<cost_t>taste << (a.at_taste - a.at_low))
    return a.floor_high > known


cdef void _read(const Shape* s, Ask* a, const uint64_t* out, bint spread_nodes, Chosen* found) noexcept nogil:
    """Take the best price of a search apart."""
    cdef cost_t high = a.best_high, low = a.best_low
    cdef cost_t price = (high << a.at_low) + low
    found.near = _field(price, a.at_near, a.at_groups if a.groups_first else 127)
    found.taste = _field(price, a.at_taste, a.at_near)
    found.packages = <int>_field(price, a.at_packages, a.at_taste) if s.priced_chips else a.best_packages
    found.nodes, found.distance = a.best_nodes, a.best_distance
    found.groups = <int>_field(price, a.at_groups, a.at_groups + a.wide_groups)
    found.split = <int>_field(price, a.at_split, a.at_split + a.wide_split)
    found.nodes_broken = <int>_field(price, a.at_nodes_broken, min(a.at_split, a.at_groups))
    found.groups_broken = <int>_field(price, a.at_groups_broken, a.at_nodes_broken)
    found.cores_broken = <int>_field(price, a.at_cores_broken, a.at_groups_broken)
    found.ids = _field(price, 0, a.at_cores_broken)
    found.exact = a.steps <= STEP_BUDGET and not a.cut
    found.uneven = _uneven(s, a, out) if spread_nodes else 0


cdef uint64_t _field(cost_t price, int start, int end) noexcept nogil:
    cdef cost_t part = price >> start
    part -= (part >> (end - start)) << (end - start)
    return <uint64_t>part


cdef int _uneven(const Shape* s, Ask* a, const uint64_t* out) noexcept nogil:
    """Return by how many CPUs the shares of nodes differ; 0 if that is within the slack of an even spread."""
    cdef int cell, node, slot, least = a.want, most = 0
    memset(a.node_uses, 0, s.nodes * sizeof(int))
    for cell in range(s.cells):
        for slot in range(s.core_cpus[_first_core(s, cell)], s.core_cpus[_first_core(s, cell + 1)]):
            a.node_uses[s.cell_node[cell]] += out[s.cpu_id[slot] >> 6] >> (s.cpu_id[slot] & 63) & 1
    for node in range(s.nodes):
        if a.node_uses[node]:
            least = min(least, a.node_uses[node])
            most = max(most, a.node_uses[node])
    return most - least if most - least > a.slack else 0


# ------------------------------------------------------------------ working memory

cdef Py_ssize_t _work_bytes(const Shape* s) noexcept nogil:
    return (s.cells * 4 + s.nodes * 2 + s.packages + s.classes * 5) * sizeof(int) \
        + (s.chips + s.cells + s.classes) * sizeof(void*) + (s.classes + s.cells + 2) * sizeof(int64_t) \
        + (2 * s.cpus + s.cells) * sizeof(uint64_t) + 2 * s.cpus + 128


cdef Py_ssize_t _lay_out(const Shape* s, Ask* a, char* memory) noexcept nogil:
    """Cut the working memory into tables, the widest first; return how much of it is in front of the weights."""
    cdef char* at = memory
    a.chip_table = <cost_t**>at
    a.cell_table = a.chip_table + s.chips
    a.class_table = a.cell_table + s.cells
    a.suffix = <int64_t*>(a.class_table + s.classes)
    a.most_of = a.suffix + s.classes + 1
    a.cell_floor = <uint64_t*>(a.most_of + s.cells + 1)
    at = <char*>(a.cell_floor + s.cells)
    a.cell_cap = <int*>at
    a.cell_reach = a.cell_cap + s.cells
    a.cell_least = a.cell_reach + s.cells
    a.cell_most = a.cell_least + s.cells
    a.node_whole = a.cell_most + s.cells
    a.node_uses = a.node_whole + s.nodes
    a.package_uses = a.node_uses + s.nodes
    a.class_rows = a.package_uses + s.packages
    a.class_used = a.class_rows + s.classes
    a.class_least = a.class_used + s.classes
    a.counts = a.class_least + s.classes
    a.best_counts = a.counts + s.classes
    a.free = <uint8_t*>(a.best_counts + s.classes)
    a.must = a.free + s.cpus
    a.near = <uint64_t*>(memory + ((<char*>(a.must + s.cpus) - memory + 63) & ~<Py_ssize_t>63))
    a.taste = a.near + s.cpus
    return <char*>a.near - memory


cdef inline int _first_core(const Shape* s, int cell) noexcept nogil:
    """Return the first core of a cell; for the index after the last cell, the number of cores."""
    return s.group_cores[s.chip_groups[s.cell_chips[cell]]]


cdef void _mark(const Shape* s, const uint64_t* words, const uint64_t* must, Ask* a) noexcept nogil:
    """Determine which slots are free, what each cell can give, and which nodes are wholly free."""
    cdef int cell, core, slot, node, free
    for node in range(s.nodes):
        a.node_whole[node] = 1
    for cell in range(s.cells):
        for core in range(_first_core(s, cell), _first_core(s, cell + 1)):
            free = 0
            for slot in range(s.core_cpus[core], s.core_cpus[core + 1]):
                a.free[slot] = words[s.cpu_id[slot] >> 6] >> (s.cpu_id[slot] & 63) & 1
                a.must[slot] = must[s.cpu_id[slot] >> 6] >> (s.cpu_id[slot] & 63) & 1
                a.any_must |= a.must[slot]
                free += a.free[slot]
            if free < s.core_cpus[core + 1] - s.core_cpus[core]:
                a.node_whole[s.cell_node[cell]] = 0
                if a.whole_cores:
                    free = 0
            a.cell_cap[cell] += free
        _put_in_order(a.most_of + 1, cell, a.cell_cap[cell])
    for cell in range(s.cells):
        a.most_of[cell + 1] += a.most_of[cell]


cdef int _widths(const Shape* s, Ask* a, uint64_t near_most, uint64_t taste_most) noexcept nogil:
    """Pack the parts of the cost, each as wide as its largest value; return the bits needed."""
    cdef int at = _bits(<uint64_t>a.want * s.ids)
    a.at_cores_broken = at
    a.at_groups_broken = a.at_cores_broken + _bits(min(a.want, s.cores))
    a.at_nodes_broken = a.at_groups_broken + _bits(min(a.want, s.groups))
    a.wide_groups, a.wide_split = _bits(min(a.want, s.groups)), _bits(a.want)
    at = a.at_nodes_broken + _bits(s.nodes)
    if a.spread_cores and not a.groups_first:
        a.at_groups = at
        at += a.wide_groups
    a.at_split = at
    at += a.wide_split
    if not a.spread_cores and not a.groups_first:
        a.at_groups = at
        at += a.wide_groups
    a.at_low = at
    a.at_packages = at
    a.at_taste = at + (_bits(min(a.want, s.chips)) if s.priced_chips else 0)
    a.at_near = a.at_taste + _bits(a.want * taste_most)
    at = a.at_near + _bits(a.want * near_most)
    if a.groups_first:
        a.at_groups = at
        at += a.wide_groups
    a.narrow_prices = at <= NARROW_BITS
    return at


cdef inline int _bits(uint64_t most) noexcept nogil:
    cdef int bits = 0
    while most:
        bits += 1
        most >>= 1
    return bits


# ------------------------------------------------------------------ bounds from the prices of single CPUs

cdef bint _floor(const Shape* s, Ask* a) noexcept nogil:
    """Set the floors: no choice, and none inside one cell, has a smaller high part than the cheapest single CPUs. False:
    out of memory."""
    cdef Prices every, here
    cdef int cell, left = a.want
    cdef bint counted = True
    every.kinds = 0
    for cell in range(s.cells):
        here.kinds = 0
        if _tally_cell(s, a, cell, &here, &left):
            counted = counted and _add_up(&every, &here)
        else:
            counted = False
    if not counted:
        return _floor_by_sorting(s, a, left)
    a.floor_high += _cheapest(&every, left, &a.last_price)
    return True


cdef bint _tally_cell(const Shape* s, Ask* a, int cell, Prices* here, int* left) noexcept nogil:
    """Count the free CPUs of a cell by price and set its floor. CPUs that must be taken go into the floor of all and are
    taken off `left`. False: there are too many prices."""
    cdef int slot, must = 0, run = 0
    cdef uint64_t price, total = 0, last = 0
    cdef bint counted = True
    for slot in range(s.core_cpus[_first_core(s, cell)], s.core_cpus[_first_core(s, cell + 1)]):
        if not a.free[slot]:
            continue
        price = _price(a, slot)
        if a.must[slot]:
            total += price
            must += 1
        elif price == last:
            run += 1
        else:
            counted = counted and (run == 0 or _tally(here, last, run))
            last, run = price, 1
    counted = counted and (run == 0 or _tally(here, last, run))
    a.floor_high += total
    left[0] -= must
    if counted and a.cell_cap[cell] >= a.want:
        a.cell_floor[cell] = total + _cheapest(here, a.want - must, &last)
    return counted


cdef bint _tally(Prices* prices, uint64_t price, int count) noexcept nogil:
    """Count CPUs of a price, in order of price. False: there are too many prices."""
    cdef int at = prices.kinds, other
    while at > 0 and prices.price[at - 1] > price:
        at -= 1
    if at > 0 and prices.price[at - 1] == price:
        prices.count[at - 1] += count
        return True
    if prices.kinds == FEW_PRICES:
        return False
    for other in range(prices.kinds, at, -1):
        prices.price[other] = prices.price[other - 1]
        prices.count[other] = prices.count[other - 1]
    prices.price[at] = price
    prices.count[at] = count
    prices.kinds += 1
    return True


cdef bint _add_up(Prices* every, const Prices* here) noexcept nogil:
    cdef int kind
    for kind in range(here.kinds):
        if not _tally(every, here.price[kind], here.count[kind]):
            return False
    return True


cdef uint64_t _cheapest(const Prices* prices, int count, uint64_t* last) noexcept nogil:
    """Return the sum of the lowest prices of `count` CPUs, or of all there are; `last`: the highest of them."""
    cdef uint64_t total = 0
    cdef int kind = 0, some
    while count > 0 and kind < prices.kinds:
        some = min(count, prices.count[kind])
        total += some * prices.price[kind]
        last[0] = prices.price[kind]
        count -= some
        kind += 1
    return total


cdef bint _floor_by_sorting(const Shape* s, Ask* a, int left) noexcept nogil:
    """Add the lowest prices of `left` CPUs to the floor. False: out of memory."""
    cdef int slot, count = 0
    cdef uint64_t* prices = <uint64_t*>malloc(s.cpus * sizeof(uint64_t))
    if prices == NULL:
        return False
    for slot in range(s.cpus):
        if a.free[slot] and not a.must[slot]:
            prices[count] = _price(a, slot)
            count += 1
    qsort(prices, count, sizeof(uint64_t), _by_size)
    for slot in range(min(left, count)):
        a.floor_high += prices[slot]
        a.last_price = prices[slot]
    free(prices)
    return True


cdef inline uint64_t _price(const Ask* a, int slot) noexcept nogil:
    """Return the high part of the price of a CPU."""
    return (a.near[slot] << (a.at_near - a.at_low)) + (a.taste[slot] << (a.at_taste - a.at_low))


cdef int _by_size(const void* x, const void* y) noexcept nogil:
    cdef uint64_t a = (<const uint64_t*>x)[0], b = (<const uint64_t*>y)[0]
    return (a > b) - (a < b)

# The search over vectors of cell counts, and reading the best one back into CPUs. Included by _fastpath.pyx.

# ------------------------------------------------------------------ the search over vectors

cdef int64_t _distance(const Shape* s, const Ask* a) noexcept nogil:
    """Return the sum of the distances between the nodes in use, in both directions."""
    cdef int x, y
    cdef int64_t total = 0
    for x in range(s.nodes):
        if a.node_uses[x]:
            for y in range(s.nodes):
                if y != x and a.node_uses[y]:
                    total += s.distance[x * s.nodes + y]
    return total


cdef void _weigh(const Shape* s, Ask* a, int packages, int nodes, cost_t* scratch) noexcept nogil:
    """Price the vector in a.counts and keep it if it is the best so far."""
    cdef int64_t distance = _distance(s, a)
    cdef int node, cls, rows, used = 0
    cdef cost_t price, high, low
    if not a.probe and a.found and a.best_high == a.floor_high and a.best_packages == packages \
            and a.best_nodes == nodes and a.difference >= a.best_difference and distance > a.best_distance:
        return
    for cls in range(s.classes):
        used += a.counts[cls]
    for cls in range(s.classes):
        rows = min(s.class_start[cls + 1] - s.class_start[cls], max(packages, nodes)) + 1
        if not _class_table(s, a, cls, rows, used):
            a.out_of_memory = True
            return
    _vector_tables(s, a, a.counts, scratch)
    price = scratch[<Py_ssize_t>s.classes * (a.want + 1) + a.want]
    if price >= INFINITE:
        return
    if a.probe:
        a.fits = price >> a.at_low == a.best_high
        return
    for node in range(s.nodes):
        if a.node_uses[node] and s.node_cells[node] > 1 and a.node_whole[node]:
            price += <cost_t>1 << a.at_nodes_broken
    if _keep(a, price, packages, nodes, distance):
        a.best_cell = -1
        for cls in range(s.classes):
            a.best_counts[cls] = a.counts[cls]


cdef bint _keep(Ask* a, cost_t price, int packages, int nodes, int64_t distance) noexcept nogil:
    """Record a price if it is the best so far."""
    cdef cost_t high = price >> a.at_low
    cdef cost_t low = price - (high << a.at_low)
    if a.found and not _better(a, high, packages, nodes, distance, low):
        return False
    a.found = True
    a.best_high = high
    a.best_low = low
    a.best_packages = packages
    a.best_nodes = nodes
    a.best_distance = distance
    a.best_difference = a.difference
    a.best_share = a.share
    return True


cdef bint _better(const Ask* a, cost_t high, int packages, int nodes, int64_t distance, cost_t low) noexcept nogil:
    if high != a.best_high:
        return high < a.best_high
    if packages != a.best_packages:
        return packages < a.best_packages
    if nodes != a.best_nodes:
        return nodes < a.best_nodes
    if a.difference != a.best_difference:
        return a.difference < a.best_difference
    if distance != a.best_distance:
        return distance < a.best_distance
    return low < a.best_low


cdef void _vectors(const Shape* s, Ask* a, int cls, int packages, int nodes, int left_packages, int left_nodes,
                   int64_t reach, cost_t* scratch) noexcept nogil:
    """Try every count of class `cls` and the classes after it that uses exactly the remaining packages and nodes."""
    cdef int cells, count, first, cell, new_packages, new_nodes, undo
    a.steps += 1
    if a.steps > STEP_BUDGET or a.out_of_memory or a.fits or reach + a.suffix[cls] < a.want:
        return
    if cls == s.classes:
        if left_packages or left_nodes:
            return
        if a.probe == BY_CAPACITY:
            a.fits = True
        else:
            _weigh(s, a, packages, nodes, scratch)
        return
    first = s.class_start[cls]
    cells = s.class_start[cls + 1] - first
    new_packages = new_nodes = count = 0
    while True:
        a.counts[cls] = count
        if count >= a.class_least[cls]:
            _vectors(s, a, cls + 1, packages, nodes, left_packages - new_packages, left_nodes - new_nodes,
                     reach + _top(s, a, cls, count), scratch)
        if count == cells:
            break
        cell = s.class_cells[first + count]
        new_packages += a.package_uses[s.cell_package[cell]] == 0
        new_nodes += a.node_uses[s.cell_node[cell]] == 0
        a.package_uses[s.cell_package[cell]] += 1
        a.node_uses[s.cell_node[cell]] += 1
        count += 1
        if new_packages > left_packages or new_nodes > left_nodes:
            break
    for undo in range(count):
        cell = s.class_cells[first + undo]
        a.package_uses[s.cell_package[cell]] -= 1
        a.node_uses[s.cell_node[cell]] -= 1
    a.counts[cls] = 0


cdef int64_t _top(const Shape* s, const Ask* a, int cls, int count) noexcept nogil:
    """Return the most CPUs that `count` cells of a class can give within their shares."""
    cdef int cells = s.class_start[cls + 1] - s.class_start[cls], i, j, above
    cdef int64_t total = 0
    cdef int here
    if count == 0:
        return 0
    for i in range(cells):
        here = a.cell_reach[s.class_cells[s.class_start[cls] + i]]
        above = 0
        for j in range(cells):
            if a.cell_reach[s.class_cells[s.class_start[cls] + j]] > here or \
                    (a.cell_reach[s.class_cells[s.class_start[cls] + j]] == here and j < i):
                above += 1
        if above < count:
            total += here
    return total


cdef void _single_cells(const Shape* s, Ask* a) noexcept nogil:
    """Try the choices inside a single cell, the cells with the lowest floor first."""
    cdef int cell = _next_cell(s, a, -1)
    while cell >= 0 and not a.out_of_memory and not (a.found and a.cell_floor[cell] > a.best_high):
        if _must_inside(s, a, cell):
            _single_cell(s, a, cell)
        cell = _next_cell(s, a, cell)


cdef int _next_cell(const Shape* s, const Ask* a, int last) noexcept nogil:
    """Return the cell with enough free CPUs that comes after `last` by floor and number (-1: the first); -1 if none
    does."""
    cdef int cell, best = -1
    for cell in range(s.cells):
        if a.cell_cap[cell] < a.want or (last >= 0 and not _cell_before(a, last, cell)):
            continue
        if best < 0 or _cell_before(a, cell, best):
            best = cell
    return best


cdef inline bint _cell_before(const Ask* a, int x, int y) noexcept nogil:
    return a.cell_floor[x] < a.cell_floor[y] or (a.cell_floor[x] == a.cell_floor[y] and x < y)


cdef void _single_cell(const Shape* s, Ask* a, int cell) noexcept nogil:
    """Keep the best choice inside a cell if it is the best so far; of equal ones the first cell's."""
    cdef cost_t price
    if not _cell_table(s, a, cell):
        a.out_of_memory = True
        return
    price = _cell(s, a, cell)[a.want]
    if price >= INFINITE:
        return
    price += _cell_use(s, a, cell)
    if s.node_cells[s.cell_node[cell]] > 1 and a.node_whole[s.cell_node[cell]]:
        price += <cost_t>1 << a.at_nodes_broken
    if _keep(a, price, 1, 1, 0) or (cell < a.best_cell and price == (a.best_high << a.at_low) + a.best_low):
        a.best_cell = cell


cdef bint _must_inside(const Shape* s, const Ask* a, int cell) noexcept nogil:
    """Return whether all CPUs that must be taken are in one cell."""
    cdef int first = s.core_cpus[s.group_cores[s.chip_groups[s.cell_chips[cell]]]], end = first + _cell_cpus(s, cell)
    cdef int slot
    for slot in range(s.cpus):
        if a.must[slot] and not first <= slot < end:
            return False
    return True


cdef bint _search(const Shape* s, Ask* a, cost_t* scratch) noexcept nogil:
    """Try vectors in order of packages, then nodes; stop at the first pair that cannot be beaten."""
    cdef int packages, nodes
    for packages in range(1, a.most_packages + 1):
        for nodes in range(1, a.most_nodes + 1):
            if packages == 1 and nodes == 1:
                _single_cells(s, a)
            if packages > 1 or nodes > 1 or s.cells > s.nodes:
                if a.even and nodes > 1:
                    _even_shares(s, a, packages, nodes, scratch)
                else:
                    _set_share(s, a, ANY_SHARE)
                    _vectors(s, a, 0, packages, nodes, packages, nodes, 0, scratch)
            if a.steps > STEP_BUDGET or a.out_of_memory:
                return a.found
            if a.found and a.best_high == a.floor_high:
                return True
    return a.found


cdef bint _anyhow(const Shape* s, Ask* a, cost_t* scratch) noexcept nogil:
    """Fall back if the search ran out of steps without a result: fewest cells by plain knapsack, ignoring distances."""
    cdef int cls, cells
    cdef int64_t reach = 0
    cdef int nodes = 0, packages = 0, cell, i
    for cls in range(s.classes):
        cells = s.class_start[cls + 1] - s.class_start[cls]
        a.counts[cls] = 0
        for i in range(cells):
            cell = s.class_cells[s.class_start[cls] + i]
            if a.cell_cap[cell] == 0:
                continue
            a.counts[cls] += 1
            packages += a.package_uses[s.cell_package[cell]] == 0
            nodes += a.node_uses[s.cell_node[cell]] == 0
            a.package_uses[s.cell_package[cell]] += 1
            a.node_uses[s.cell_node[cell]] += 1
            reach += a.cell_cap[cell]
        if reach >= a.want:
            _weigh(s, a, packages, nodes, scratch)
            if a.found:
                return True
    return False


# ------------------------------------------------------------------ from prices back to CPUs

cdef bint _take_best(const Shape* s, Ask* a, cost_t* scratch, uint64_t* out) noexcept nogil:
    """Set a bit for each CPU of the best choice found. False: out of memory."""
    cdef int cls = s.classes, k = a.want, share, before
    cdef Py_ssize_t row = a.want + 1
    cdef cost_t* inner = scratch + (s.classes + 1) * row
    if a.best_cell >= 0:
        _take_cell(s, a, a.best_cell, k, out)
        return True
    _set_share(s, a, a.best_share)
    share = 0
    for before in range(s.classes):
        share += a.best_counts[before]
    for before in range(s.classes):
        if not _class_table(s, a, before, a.best_counts[before] + 1, share):
            return False
    _vector_tables(s, a, a.best_counts, scratch)
    while cls > 0:
        if not a.share.high or _shared_node(s, cls - 1) < 0:
            cls -= 1
            k = _take_from_class(s, a, cls, scratch + cls * row, scratch + (cls + 1) * row, k, out)
            continue
        before = cls - 1
        while before > 0 and _shared_node(s, before - 1) == _shared_node(s, before):
            before -= 1
        share = _share_taken(a, scratch + before * row, inner + cls * row, scratch[cls * row + k], k)
        k -= share
        while cls > before:
            cls -= 1
            share = _take_from_class(s, a, cls, scratch if cls == before else inner + cls * row, inner + (cls + 1) * row,
                                     share, out)
    return True


cdef int _take_from_class(const Shape* s, Ask* a, int cls, const cost_t* left, const cost_t* here, int k,
                          uint64_t* out) noexcept nogil:
    """Take what the step from row `left` to row `here` took of a class; return how many CPUs are left to take."""
    cdef const cost_t* right = _class(s, a, cls, a.best_counts[cls])
    cdef int x = 1
    if a.best_counts[cls] == 0:
        return k
    while left[k - x] + right[x] != here[k]:
        x += 1
    _take_class(s, a, cls, a.best_counts[cls], x, out)
    return k - x


cdef int _share_taken(const Ask* a, const cost_t* left, const cost_t* node, cost_t price, int k) noexcept nogil:
    """Return the share of a node that gave this price; 0 if it gave nothing."""
    cdef int x
    for x in range(a.share.low, min(k, a.share.high) + 1):
        if left[k - x] + node[x] == price:
            return x
    return 0


cdef void _take_class(const Shape* s, Ask* a, int cls, int count, int k, uint64_t* out) noexcept nogil:
    cdef int first = s.class_start[cls], i, x, cell
    cdef Py_ssize_t row = a.want + 1, plane = a.class_rows[cls] * row
    cdef const cost_t* here
    cdef const cost_t* before
    cdef const cost_t* price
    for i in range(s.class_start[cls + 1] - first - 1, -1, -1):
        cell = s.class_cells[first + i]
        price = _cell(s, a, cell)
        before = a.class_table[cls] + i * plane + count * row
        here = before + plane
        if here[k] == before[k] + price[0]:
            continue
        x = 1
        while (before - row)[k - x] + price[x] + _cell_use(s, a, cell) != here[k] or not _allowed(s, a, cell, x):
            x += 1
        _take_cell(s, a, cell, x, out)
        k -= x
        count -= 1


cdef inline bint _allowed(const Shape* s, const Ask* a, int cell, int x) noexcept nogil:
    """Return whether a cell may give x CPUs; where it is one of several on a node, only the node's sum is limited."""
    return a.share.high == 0 or s.node_cells[s.cell_node[cell]] > 1 or a.share.low <= x <= a.share.high


cdef void _take_cell(const Shape* s, const Ask* a, int cell, int k, uint64_t* out) noexcept nogil:
    """Walk a cell's table from its last chip to its first."""
    cdef int first = s.cell_chips[cell], i, x
    cdef Py_ssize_t row = a.want + 1
    cdef const cost_t* before
    for i in range(s.cell_chips[cell + 1] - first - 1, -1, -1):
        before = a.cell_table[cell] + i * row
        x = _step(before, _chip(s, a, first + i), k, min(k, _chip_cpus(s, first + i)), before[row + k])
        _take_chip(s, a, first + i, x, out)
        k -= x


cdef int _step(const cost_t* before, const cost_t* price, int k, int most, cost_t total) noexcept nogil:
    """Return how many CPUs the step from row `before` to the price `total` of k CPUs took."""
    cdef int x
    for x in range(most + 1):
        if before[k - x] < INFINITE and price[x] < INFINITE and before[k - x] + price[x] == total:
            return x
    return 0


cdef void _take_chip(const Shape* s, const Ask* a, int chip, int k, uint64_t* out) noexcept nogil:
    """Walk a chip's table from its last group to its first."""
    cdef int first = s.chip_groups[chip], groups = s.chip_groups[chip + 1] - first, i, x
    cdef Py_ssize_t row = a.want + 1
    cdef const cost_t* before
    cdef cost_t total
    if k == 0:
        return
    total = _chip(s, a, chip)[k] - (<cost_t>1 << a.at_packages if s.priced_chips else <cost_t>0)
    for i in range(groups - 1, -1, -1):
        before = a.chip_table[chip] + i * row
        if before[k] == total and not a.any_must:
            continue
        x = _group_row(s, a, first + i, a.inner.table, a.inner.caps, a.inner.last)
        x = _step(before, a.inner.last, k, min(k, x), total)
        if a.narrow_prices:
            _take_group(s, a, first + i, x, <const double*>a.inner.table, a.inner.caps, out)
        else:
            _take_group(s, a, first + i, x, <const cost_t*>a.inner.table, a.inner.caps, out)
        k -= x
        total = before[k]


cdef void _take_group(const Shape* s, const Ask* a, int group, int k, const price_t* table, const int* caps,
                      uint64_t* out) noexcept nogil:
    """Walk a group's table from its last core to its first."""
    cdef int first = s.group_cores[group], i, j, x, slot
    cdef price_t[SMT_MAX + 1] price
    cdef uint8_t[SMT_MAX] order
    cdef Py_ssize_t row = a.want + 1
    for i in range(s.group_cores[group + 1] - first - 1, -1, -1):
        x = _core_prices(s, a, first + i, price, order)
        while x > 0 and (x > k or k - x > caps[i] or table[i * row + k - x] + price[x] != table[(i + 1) * row + k]):
            x -= 1
        for j in range(x):
            slot = s.core_cpus[first + i] + order[j]
            out[s.cpu_id[slot] >> 6] |= <uint64_t>1 << (s.cpu_id[slot] & 63)
        k -= x


# ------------------------------------------------------------------ the whole search

cdef bint _choose(const Shape* s, Ask* a, bint spread_nodes, uint64_t* out) noexcept nogil:
    """Search, read the choice back, and free every table."""
    cdef int cls, cell
    cdef bint found = False
    cdef cost_t* scratch = <cost_t*>malloc(2 * (s.classes + 1) * <Py_ssize_t>(a.want + 1) * sizeof(cost_t))
    if scratch == NULL:
        a.out_of_memory = True
    else:
        _reaches(s, a)
        if s.priced_chips and not _floor_of_all(s, a, scratch):
            a.out_of_memory = True
        elif a.suffix[0] >= a.want and _fits_cores(s, a):
            found = _search_all(s, a, spread_nodes, scratch)
        if found and not a.out_of_memory:
            a.out_of_memory = not _take_best(s, a, scratch, out)
    free(a.inner.table)
    for cell in range(s.cells):
        free(a.cell_table[cell])
    for cls in range(s.classes):
        free(a.class_table[cls])
    free(scratch)
    return found


cdef bint _search_all(const Shape* s, Ask* a, bint spread_nodes, cost_t* scratch) noexcept nogil:
    """Search with even shares of nodes if requested and possible; else with any shares; else for anything."""
    if spread_nodes:
        if _search_even(s, a, scratch) or _search_uneven(s, a, scratch):
            return True
    elif _search(s, a, scratch):
        return True
    if a.steps <= STEP_BUDGET or a.most_packages < s.packages or a.most_nodes < s.nodes:
        return False
    return _anyhow(s, a, scratch)


cdef bint _fits_cores(const Shape* s, const Ask* a) noexcept nogil:
    """Return whether whole free cores can add up to exactly `want` CPUs (a bit set of reachable sums)."""
    cdef uint64_t[WORDS + 1] reach
    cdef int core, slot, size, word, words = a.want // 64 + 1
    cdef bint whole
    if not a.whole_cores:
        return True
    memset(reach, 0, sizeof(reach))
    reach[0] = 1
    for core in range(s.cores):
        size = s.core_cpus[core + 1] - s.core_cpus[core]
        whole = True
        for slot in range(s.core_cpus[core], s.core_cpus[core + 1]):
            whole = whole and a.free[slot]
        if not whole:
            continue
        for word in range(words - 1, -1, -1):
            reach[word] |= reach[word] << size if size < 64 else <uint64_t>0
            if word:
                reach[word] |= reach[word - 1] >> (64 - size)
    return reach[a.want >> 6] >> (a.want & 63) & 1

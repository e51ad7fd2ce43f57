# Exact choice of CPUs. Included by _fastpath.pyx.
#
# A machine is a forest: package and NUMA node cut it into cells, cells hold L3 groups, groups hold cores. Every part of
# the cost but two is additive over that forest, so the cheapest way to take k CPUs of a core, a group and a cell, for
# every k at once, is a tree knapsack: (min,+) convolution with the whole cost packed into one 128-bit number.
#
# How many packages and NUMA nodes are used, and how far apart they are, is not additive. Cells that are interchangeable
# in those three respects (twins) form a class; only how many cells of each class are used matters then, and these
# vectors are enumerated in order of (packages, nodes), bounded by capacity and by the distance of the best one found.
#
# Where every package lies inside one NUMA node (a virtual machine with a socket for each CPU, say), packages add up
# after all: then a cell is a whole node, its chips are its packages, and a package has a price like an L3 group.

cdef extern from *:
    """
    typedef unsigned __int128 na_cost;
    #define NA_INFINITE (((na_cost)1) << 126)
    """
    ctypedef unsigned long long cost_t "na_cost"
    cost_t INFINITE "NA_INFINITE"

cdef enum:
    STEP_BUDGET = 2000000             # vectors examined before the search stops with the best one found
    SMT_MAX = 64


cdef enum Probe:
    WEIGH = 0                         # price every vector and keep the best
    BY_CAPACITY = 1                   # only find out whether any vector has enough free CPUs
    BY_PRICE = 2                      # only find out whether any vector gives a choice with the best high part


cdef struct Share:
    # How many CPUs a node in use may give. high 0: any number.
    int low, high


cdef struct Shape:
    # Sizes, then for each level where its members start: chip c owns groups chip_groups[c] .. chip_groups[c + 1] - 1.
    int cpus, cores, groups, chips, cells, nodes, packages, classes
    bint priced_chips                 # a chip is a package and has a price; else a cell has one chip without a price
    int* cpu_id
    int* core_cpus
    int* group_cores
    int* chip_groups
    int* cell_chips
    int* cell_node
    int* cell_package
    int* node_cells                   # how many cells a node has
    int* class_cells                  # cells in order of class
    int* class_start
    int* distance                     # nodes x nodes


cdef struct Ask:
    # One request, applied to the shape.
    int want
    bint whole_cores, spread_cores, groups_first
    int most_packages, most_nodes
    uint8_t* free                     # by CPU slot
    uint8_t* must
    uint64_t* near                    # by CPU slot; NULL: no differences
    uint64_t* taste
    # Where each part of the cost starts in the packed number.
    int at_cores_broken, at_groups_broken, at_nodes_broken, at_split, at_groups, at_low
    int at_packages, at_taste, at_near
    int wide_groups, wide_split
    # Working tables.
    int* cell_cap
    int* cell_reach                   # the same within the share that a node may give
    int* cell_least                   # if `narrow`: how many CPUs of a cell a choice takes at least and at most
    int* cell_most
    int* class_least                  # how many cells of a class are used at least
    int64_t* suffix                   # by class: what all cells of it and of the classes after it can give
    int* node_whole
    cost_t** chip_table               # by chip: (groups + 1) rows of want + 1
    cost_t** cell_table               # by cell: (chips + 1) rows of want + 1
    cost_t** class_table              # by class: (cells + 1) x (rows) x (want + 1)
    int* class_rows
    # Shares of nodes.
    bint even                         # shares must be equal, give or take `slack`
    int slack, stride                 # largest core (or 1 CPU) and the steps in which nodes can give CPUs
    int packages, nodes               # where a search with bounds on shares looks
    bint narrow                       # only choices as near as `floor_high` count
    Share share, best_share
    int difference, best_difference   # most that two nodes in use may differ by; 0 for even shares
    # The search.
    int* counts                       # how many cells of each class are used
    int* best_counts
    int* package_uses
    int* node_uses
    cost_t best_high, best_low
    int best_packages, best_nodes
    int best_cell                     # the whole choice lies in this cell; -1: see best_counts
    int64_t best_distance
    cost_t floor_high                 # no choice can have a smaller high part than this
    uint64_t last_price               # price of the last of the CPUs that add up to it
    int64_t steps
    Probe probe
    bint fits                         # what the probe found
    bint cut                          # an earlier search of this request ran out of steps
    bint found, out_of_memory


cdef inline cost_t _least(cost_t a, cost_t b) noexcept nogil:
    return a if a < b else b


# ------------------------------------------------------------------ one core, one group, one cell

cdef int _core_options(const Shape* s, const Ask* a, int core, cost_t* price, uint8_t* order) noexcept nogil:
    """price[j]: the cheapest way to take j CPUs of a core; order: the slots (from its first) in the order they are
    taken. Returns how many can be taken."""
    cdef int first = s.core_cpus[core], total = s.core_cpus[core + 1] - first
    cdef int free = 0, must = 0, i, j, slot
    cdef cost_t ids = 0
    cdef bint whole
    for i in range(total):
        slot = first + i
        if not a.free[slot]:
            continue
        j = free
        while j > 0 and _sooner(s, a, slot, first + order[j - 1]):
            order[j] = order[j - 1]
            j -= 1
        order[j] = <uint8_t>i
        free += 1
        must += a.must[slot]
    whole = free == total
    price[0] = INFINITE if must else <cost_t>0
    for j in range(1, free + 1):
        slot = first + order[j - 1]
        ids += <cost_t>s.cpu_id[slot]
        if a.near != NULL:
            ids += (<cost_t>a.near[slot] << a.at_near) + (<cost_t>a.taste[slot] << a.at_taste)
        price[j] = INFINITE
        if j < must or (a.whole_cores and (j < total or not whole)):
            continue
        price[j] = ids + (<cost_t>whole << a.at_cores_broken)
        if a.spread_cores:
            price[j] += <cost_t>(j - 1) << a.at_split
        elif j < total:
            price[j] += <cost_t>1 << a.at_split
    return free


cdef inline bint _sooner(const Shape* s, const Ask* a, int x, int y) noexcept nogil:
    """Return whether slot x of a core is taken before slot y."""
    if a.must[x] != a.must[y]:
        return a.must[x] > a.must[y]
    if a.near != NULL:
        if a.near[x] != a.near[y]:
            return a.near[x] < a.near[y]
        if a.taste[x] != a.taste[y]:
            return a.taste[x] < a.taste[y]
    return s.cpu_id[x] < s.cpu_id[y]


cdef int _join(const cost_t* left, int left_cap, const cost_t* right, int right_cap, int most, cost_t* out) noexcept nogil:
    """out[k] = min over x of left[k - x] + right[x], for k up to `most`; the highest k reached."""
    cdef int cap = min(left_cap + right_cap, most), k, x, plain = 0
    cdef cost_t best
    if right_cap <= 2:
        plain = _join_core(left, min(left_cap, most), right, right_cap, out)
    for k in range(cap + 1):
        if plain and right_cap <= k < plain:
            continue
        best = INFINITE
        for x in range(max(0, k - left_cap), min(k, right_cap) + 1):
            best = _least(best, left[k - x] + right[x])
        out[k] = best
    return cap


cdef int _join_core(const cost_t* left, int last, const cost_t* right, int right_cap, cost_t* out) noexcept nogil:
    """The same for a core of at most two free CPUs, where out[right_cap..last] need no bounds; returns last + 1."""
    cdef cost_t none = right[0], one, two
    cdef int k
    if right_cap == 0:
        for k in range(last + 1):
            out[k] = _least(left[k] + none, INFINITE)
    elif right_cap == 1:
        one = right[1]
        for k in range(1, last + 1):
            out[k] = _least(_least(left[k] + none, left[k - 1] + one), INFINITE)
    else:
        one, two = right[1], right[2]
        for k in range(2, last + 1):
            out[k] = _least(_least(_least(left[k] + none, left[k - 1] + one), left[k - 2] + two), INFINITE)
    return last + 1


cdef int _group_table(const Shape* s, const Ask* a, int group, cost_t* table, int* caps) noexcept nogil:
    """Rows of want + 1: row i is the cheapest way to take k CPUs of the first i cores of a group. caps[i]: how far row
    i reaches. Returns the number of rows less one."""
    cdef int first = s.group_cores[group], cores = s.group_cores[group + 1] - first, i, free
    cdef cost_t[SMT_MAX + 1] price
    cdef uint8_t[SMT_MAX] order
    cdef Py_ssize_t row = a.want + 1
    table[0] = 0
    caps[0] = 0
    for i in range(cores):
        free = _core_options(s, a, first + i, price, order)
        caps[i + 1] = _join(table + i * row, caps[i], price, free, a.want, table + (i + 1) * row)
    return cores


cdef cost_t _group_price(const Shape* s, const Ask* a, int group) noexcept nogil:
    """Return the base cost of using a group: the group itself, and breaking it if it is wholly free."""
    cdef int slot
    cdef cost_t price = <cost_t>1 << a.at_groups
    for slot in range(s.core_cpus[s.group_cores[group]], s.core_cpus[s.group_cores[group + 1]]):
        if not a.free[slot]:
            return price
    return price + (<cost_t>1 << a.at_groups_broken)


cdef bint _chip_table(const Shape* s, Ask* a, int chip) noexcept nogil:
    """Fill a.chip_table[chip]: row i is the cheapest way to take k CPUs of the first i groups of a chip. False: out of
    memory."""
    cdef int first = s.chip_groups[chip], groups = s.chip_groups[chip + 1] - first, i, k, cap, rows, cores = 0
    cdef Py_ssize_t row = a.want + 1
    cdef cost_t price
    for i in range(groups):
        cores = max(cores, s.group_cores[first + i + 1] - s.group_cores[first + i])
    cdef cost_t* table = _rows(a, groups + 1)
    cdef cost_t* inner = <cost_t*>malloc((cores + 1) * row * sizeof(cost_t))
    cdef int* caps = <int*>malloc((cores + 1) * sizeof(int))
    a.chip_table[chip] = table
    if table == NULL or inner == NULL or caps == NULL:
        free(inner)
        free(caps)
        return False
    cap = 0
    for i in range(groups):
        rows = _group_table(s, a, first + i, inner, caps)
        price = _group_price(s, a, first + i)
        for k in range(1, caps[rows] + 1):
            inner[rows * row + k] += price
        cap = _join(table + i * row, cap, inner + rows * row, caps[rows], a.want, table + (i + 1) * row)
        for k in range(cap + 1, a.want + 1):
            table[(i + 1) * row + k] = INFINITE
    if s.priced_chips:
        for k in range(1, cap + 1):
            table[groups * row + k] += <cost_t>1 << a.at_packages
    free(inner)
    free(caps)
    return True


cdef cost_t* _rows(const Ask* a, int rows) noexcept nogil:
    """A table of want + 1 columns whose first row takes nothing; NULL: out of memory."""
    cdef cost_t* table = <cost_t*>malloc(rows * <Py_ssize_t>(a.want + 1) * sizeof(cost_t))
    cdef int k
    if table != NULL:
        table[0] = 0
        for k in range(1, a.want + 1):
            table[k] = INFINITE
    return table


cdef inline const cost_t* _chip(const Shape* s, const Ask* a, int chip) noexcept nogil:
    """Return the last row of a chip's table: prices by number of CPUs."""
    return a.chip_table[chip] + <Py_ssize_t>(s.chip_groups[chip + 1] - s.chip_groups[chip]) * (a.want + 1)


cdef bint _cell_table(const Shape* s, Ask* a, int cell) noexcept nogil:
    """Fill a.cell_table[cell]: row i is the cheapest way to take k CPUs of the first i chips of a cell. False: out of
    memory."""
    cdef int first = s.cell_chips[cell], chips = s.cell_chips[cell + 1] - first, i, k, cap = 0
    cdef Py_ssize_t row = a.want + 1
    if a.cell_table[cell] != NULL:
        return True
    cdef cost_t* table = _rows(a, chips + 1)
    if table == NULL:
        return False
    a.cell_table[cell] = table
    for i in range(chips):
        if not _chip_table(s, a, first + i):
            return False
        cap = _join(table + i * row, cap, _chip(s, a, first + i), min(a.want, _chip_cpus(s, first + i)), a.want,
                    table + (i + 1) * row)
        for k in range(cap + 1, a.want + 1):
            table[(i + 1) * row + k] = INFINITE
    return True


cdef inline int _chip_cpus(const Shape* s, int chip) noexcept nogil:
    return s.core_cpus[s.group_cores[s.chip_groups[chip + 1]]] - s.core_cpus[s.group_cores[s.chip_groups[chip]]]


cdef inline const cost_t* _cell(const Shape* s, const Ask* a, int cell) noexcept nogil:
    """Return the last row of a cell's table: prices by number of CPUs."""
    return a.cell_table[cell] + <Py_ssize_t>(s.cell_chips[cell + 1] - s.cell_chips[cell]) * (a.want + 1)


cdef bint _floor_of_all(const Shape* s, Ask* a, cost_t* scratch) noexcept nogil:
    """Compute the least high part of all choices, ignoring nodes. False: out of memory."""
    cdef int cell, cap = 0, k
    cdef Py_ssize_t row = a.want + 1
    cdef cost_t* here = scratch
    cdef cost_t* other = scratch + row
    for k in range(a.want + 1):
        here[k] = INFINITE
    here[0] = 0
    for cell in range(s.cells):
        if not _cell_table(s, a, cell):
            return False
        cap = _join(here, cap, _cell(s, a, cell), min(a.want, _cell_cpus(s, cell)), a.want, other)
        here, other = other, here
    a.floor_high = (here[a.want] if cap == a.want else INFINITE) >> a.at_low
    return True


cdef inline int _cell_cpus(const Shape* s, int cell) noexcept nogil:
    cdef int first = s.chip_groups[s.cell_chips[cell]], end = s.chip_groups[s.cell_chips[cell + 1]]
    return s.core_cpus[s.group_cores[end]] - s.core_cpus[s.group_cores[first]]


cdef inline cost_t _cell_use(const Shape* s, const Ask* a, int cell) noexcept nogil:
    """Return the base cost of using a cell: breaking its node, if that is wholly free and has no other cell."""
    cdef int node = s.cell_node[cell]
    if a.node_whole[node] and s.node_cells[node] == 1:
        return <cost_t>1 << a.at_nodes_broken
    return 0


# ------------------------------------------------------------------ classes of twin cells

cdef bint _class_table(const Shape* s, Ask* a, int cls, int rows) noexcept nogil:
    """Fill a.class_table[cls]: [i][m][k] is the cheapest way to take k CPUs with exactly m of the first i cells of a
    class, m < rows. False: out of memory."""
    cdef int first = s.class_start[cls], cells = s.class_start[cls + 1] - first, i, m, k, cell, widest = 0
    cdef Py_ssize_t row = a.want + 1, plane = rows * row
    if a.class_table[cls] != NULL and a.class_rows[cls] >= rows:
        return True
    free(a.class_table[cls])
    a.class_table[cls] = <cost_t*>malloc((cells + 1) * plane * sizeof(cost_t))
    a.class_rows[cls] = rows
    cdef cost_t* table = a.class_table[cls]
    if table == NULL:
        return False
    for k in range(rows * <int>row):
        table[k] = INFINITE
    table[0] = 0
    for i in range(cells):
        cell = s.class_cells[first + i]
        if not _cell_table(s, a, cell):
            return False
        for m in range(rows):
            _one_more_cell(s, a, cell, table + i * plane + m * row, m > 0, (m - 1) * widest,
                           table + (i + 1) * plane + m * row)
        widest = max(widest, a.cell_cap[cell])
    return True


cdef void _one_more_cell(const Shape* s, const Ask* a, int cell, const cost_t* same, bint use, int reach,
                         cost_t* out) noexcept nogil:
    """out[k]: a cell left out (the row `same`) or, if it may be used, used for x CPUs (the row before `same`, which
    reaches no further than `reach`)."""
    cdef const cost_t* price = _cell(s, a, cell)
    cdef const cost_t* fewer = same - (a.want + 1)
    cdef int k, x, cap = a.cell_cap[cell]
    cdef cost_t best, extra = _cell_use(s, a, cell)
    for k in range(a.want + 1):
        best = INFINITE
        if use and a.share.high and s.node_cells[s.cell_node[cell]] == 1:
            for x in range(max(a.share.low, k - reach), min(k, a.cell_reach[cell]) + 1):
                best = _least(best, fewer[k - x] + price[x])
        elif use:
            for x in range(max(1, k - reach), min(k, cap) + 1):
                best = _least(best, fewer[k - x] + price[x])
        best = _least(best + extra, same[k] + price[0])
        out[k] = best if best < INFINITE else INFINITE


cdef inline const cost_t* _class(const Shape* s, const Ask* a, int cls, int count) noexcept nogil:
    """Return the prices by number of CPUs when exactly `count` cells of a class are used."""
    cdef int cells = s.class_start[cls + 1] - s.class_start[cls]
    return a.class_table[cls] + (<Py_ssize_t>cells * a.class_rows[cls] + count) * (a.want + 1)


cdef inline int _shared_node(const Shape* s, int cls) noexcept nogil:
    """Return the node that contains all cells of a class, if it is split into several cells; else -1."""
    cdef int node = s.cell_node[s.class_cells[s.class_start[cls]]]
    return node if s.node_cells[node] > 1 else -1


cdef void _vector_tables(const Shape* s, const Ask* a, const int* counts, cost_t* table) noexcept nogil:
    """Row c of the first classes + 1 rows: the cheapest way to take k CPUs of the first c classes, counts[c] cells of
    each used. A share is per node: where several classes lie on one node, the rows behind those hold the node's own
    sums, and only the row after its last class counts."""
    cdef int cls, start = 0, k, node
    cdef Py_ssize_t row = a.want + 1
    cdef cost_t* inner = table + (s.classes + 1) * row
    for k in range(a.want + 1):
        table[k] = INFINITE
    table[0] = 0
    for cls in range(s.classes):
        node = _shared_node(s, cls)
        if not a.share.high or node < 0:
            _add_class(s, a, cls, counts[cls], table + cls * row, table + (cls + 1) * row)
            continue
        if cls == 0 or _shared_node(s, cls - 1) != node:
            start = cls
        # Row 0 of the table, nothing taken, is where a node's own sums start too.
        _add_class(s, a, cls, counts[cls], table if cls == start else inner + cls * row, inner + (cls + 1) * row)
        if cls + 1 == s.classes or _shared_node(s, cls + 1) != node:
            _add_share(a, table + start * row, inner + (cls + 1) * row, table + (cls + 1) * row)


cdef void _add_class(const Shape* s, const Ask* a, int cls, int count, const cost_t* left, cost_t* out) noexcept nogil:
    """out[k]: x CPUs from `count` cells of a class, the others as in `left`."""
    cdef const cost_t* right = _class(s, a, cls, count)
    cdef int k, x, top = <int>min(<int64_t>a.want, _top(s, a, cls, count))
    cdef cost_t best
    for k in range(a.want + 1):
        best = INFINITE if count else left[k] + right[0]
        for x in range(1, min(k, top) + 1):
            best = _least(best, left[k - x] + right[x])
        out[k] = _least(best, INFINITE)


cdef void _add_share(const Ask* a, const cost_t* left, const cost_t* node, cost_t* out) noexcept nogil:
    """out[k]: a node gives nothing or a share that is allowed, the others as in `left`."""
    cdef int k, x
    for k in range(a.want + 1):
        out[k] = _least(left[k] + node[0], INFINITE)
        for x in range(a.share.low, min(k, a.share.high) + 1):
            out[k] = _least(out[k], left[k - x] + node[x])

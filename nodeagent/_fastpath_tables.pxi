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
    NARROW_BITS = 52


ctypedef fused price_t:
    # A price inside a group. The whole numbers up to NARROW_BITS bits are exact as `double`, which is twice as fast.
    double
    cost_t


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
    int ids                           # more than the id of every CPU
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


cdef struct Inner:
    # Working memory for one group, in one block that starts with `table`.
    void* table                       # of doubles if prices are narrow
    cost_t* last                      # its last row, with the base cost of the group
    int* caps


cdef struct Ask:
    # One request, applied to the shape.
    int want
    bint whole_cores, spread_cores, groups_first
    int most_packages, most_nodes
    uint8_t* free                     # by CPU slot
    uint8_t* must
    bint any_must                     # whether any CPU must be taken
    uint64_t* near                    # by CPU slot; NULL: no differences
    uint64_t* taste
    # Where each part of the cost starts in the packed number.
    int at_cores_broken, at_groups_broken, at_nodes_broken, at_split, at_groups, at_low
    int at_packages, at_taste, at_near
    int wide_groups, wide_split
    bint narrow_prices                # the whole cost fits into NARROW_BITS bits
    # Working tables.
    int* cell_cap
    int64_t* most_of                  # by number of cells: the most CPUs that so many can give
    int* cell_reach                   # the same within the share that a node may give
    int* cell_least                   # if `narrow`: how many CPUs of a cell a choice takes at least and at most
    int* cell_most
    int* class_least                  # how many cells of a class are used at least
    int64_t* suffix                   # by class: what all cells of it and of the classes after it can give
    int* node_whole
    uint64_t* cell_floor              # by cell: no choice inside it has a smaller high part
    Inner inner                       # of the largest group; NULL until it is needed
    cost_t** chip_table               # by chip: (groups + 1) rows of want + 1
    cost_t** cell_table               # by cell: (chips + 1) rows of want + 1
    cost_t** class_table              # by class: (cells + 1) x (rows) x (want + 1)
    int* class_rows
    int* class_used                   # how many cells, of all classes, a choice from the table has at most
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


cdef inline price_t _infinite(const price_t* any) noexcept nogil:
    if price_t is double:
        return 1e300
    else:
        return INFINITE


cdef int _join(const price_t* left, int left_cap, const price_t* right, int right_cap, int most,
               price_t* out) noexcept nogil:
    """out[k] = min over x of left[k - x] + right[x], for k up to `most`; the highest k reached."""
    cdef int cap = min(left_cap + right_cap, most), k
    if right_cap > 2 or left_cap < right_cap:
        for k in range(cap + 1):
            out[k] = _join_at(left, left_cap, right, right_cap, k)
        return cap
    for k in range(right_cap):
        out[k] = _join_at(left, left_cap, right, right_cap, k)
    for k in range(_join_core(left, min(left_cap, most), right, right_cap, out), cap + 1):
        out[k] = _join_at(left, left_cap, right, right_cap, k)
    return cap


cdef inline price_t _join_at(const price_t* left, int left_cap, const price_t* right, int right_cap, int k) noexcept nogil:
    """Return one of the prices of _join."""
    cdef price_t best = _infinite(left), sum
    cdef int x
    for x in range(max(0, k - left_cap), min(k, right_cap) + 1):
        sum = left[k - x] + right[x]
        best = sum if sum < best else best
    return best


cdef int _join_core(const price_t* left, int last, const price_t* right, int right_cap, price_t* out) noexcept nogil:
    """The same for a core of at most two free CPUs, where out[right_cap..last] need no bounds; returns last + 1."""
    cdef price_t none = right[0], one, two, best, sum, infinite = _infinite(left)
    cdef int k
    one = right[1] if right_cap > 0 else infinite
    two = right[2] if right_cap > 1 else infinite
    for k in range(right_cap, last + 1):
        best = left[k] + none
        best = infinite if infinite < best else best
        if right_cap > 0:
            sum = left[k - 1] + one
            best = sum if sum < best else best
        if right_cap > 1:
            sum = left[k - 2] + two
            best = sum if sum < best else best
        out[k] = best
    return last + 1


cdef int _group_table(const Shape* s, const Ask* a, int group, price_t* table, int* caps) noexcept nogil:
    """Rows of want + 1: row i is the cheapest way to take k CPUs of the first i cores of a group. caps[i]: how far row
    i reaches. Returns the number of rows less one."""
    cdef int first = s.group_cores[group], cores = s.group_cores[group + 1] - first, i, free
    cdef price_t[SMT_MAX + 1] price
    cdef uint8_t[SMT_MAX] order
    cdef Py_ssize_t row = a.want + 1
    table[0] = 0
    caps[0] = 0
    for i in range(cores):
        free = _core_prices(s, a, first + i, price, order)
        caps[i + 1] = _join(table + i * row, caps[i], price, free, a.want, table + (i + 1) * row)
    return cores


cdef int _core_prices(const Shape* s, const Ask* a, int core, price_t* price, uint8_t* order) noexcept nogil:
    """Return _core_options with prices as they are inside a group."""
    cdef cost_t[SMT_MAX + 1] whole
    cdef int free, j
    if price_t is double:
        free = _core_options(s, a, core, whole, order)
        for j in range(free + 1):
            price[j] = <double><int64_t>whole[j] if whole[j] < INFINITE else 1e300
    else:
        free = _core_options(s, a, core, price, order)
    return free


cdef int _group_row(const Shape* s, const Ask* a, int group, void* table, int* caps, cost_t* last) noexcept nogil:
    """Fill the table of a group; last[k]: the cheapest way to take k CPUs of it, with its base cost. Returns how far
    that reaches."""
    cdef int rows, k
    cdef Py_ssize_t row = a.want + 1
    cdef cost_t base = _group_price(s, a, group)
    cdef double narrow
    if a.narrow_prices:
        rows = _group_table(s, a, group, <double*>table, caps)
        for k in range(caps[rows] + 1):
            narrow = (<double*>table)[rows * row + k]
            last[k] = <cost_t><int64_t>narrow if narrow < 1e300 else INFINITE
    else:
        rows = _group_table(s, a, group, <cost_t*>table, caps)
        memcpy(last, <cost_t*>table + rows * row, (caps[rows] + 1) * sizeof(cost_t))
    for k in range(1, caps[rows] + 1):
        last[k] += base
    return caps[rows]


cdef cost_t _group_price(const Shape* s, const Ask* a, int group) noexcept nogil:
    """Return the base cost of using a group: the group itself, and breaking it if it is wholly free."""
    cdef int slot
    cdef cost_t price = <cost_t>1 << a.at_groups
    for slot in range(s.core_cpus[s.group_cores[group]], s.core_cpus[s.group_cores[group + 1]]):
        if not a.free[slot]:
            return price
    return price + (<cost_t>1 << a.at_groups_broken)


cdef void _chip_table(const Shape* s, Ask* a, int chip) noexcept nogil:
    """Fill a.chip_table[chip]: row i is the cheapest way to take k CPUs of the first i groups of a chip."""
    cdef int first = s.chip_groups[chip], groups = s.chip_groups[chip + 1] - first, i, k, cap = 0
    cdef Py_ssize_t row = a.want + 1
    cdef cost_t* table = a.chip_table[chip]
    _clear_row(a, table)
    for i in range(groups):
        k = _group_row(s, a, first + i, a.inner.table, a.inner.caps, a.inner.last)
        cap = _join(table + i * row, cap, a.inner.last, k, a.want, table + (i + 1) * row)
        for k in range(cap + 1, a.want + 1):
            table[(i + 1) * row + k] = INFINITE
    if s.priced_chips:
        for k in range(1, cap + 1):
            table[groups * row + k] += <cost_t>1 << a.at_packages


cdef bint _open_inner(const Shape* s, Ask* a) noexcept nogil:
    """Make room for the table of a group. False: out of memory."""
    cdef int group, cores = 0
    cdef Py_ssize_t row = a.want + 1
    for group in range(s.groups):
        cores = max(cores, s.group_cores[group + 1] - s.group_cores[group])
    a.inner.table = malloc((cores + 2) * row * sizeof(cost_t) + (cores + 1) * sizeof(int))
    a.inner.last = <cost_t*>a.inner.table + (cores + 1) * row
    a.inner.caps = <int*>(a.inner.last + row)
    return a.inner.table != NULL


cdef void _clear_row(const Ask* a, cost_t* row) noexcept nogil:
    """Write the first row of a table: nothing can be taken yet."""
    cdef int k
    row[0] = 0
    for k in range(1, a.want + 1):
        row[k] = INFINITE


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
    cdef cost_t* table = _tables_of_cell(s, a, cell)
    if table == NULL:
        return False
    for i in range(chips):
        _chip_table(s, a, first + i)
        cap = _join(table + i * row, cap, _chip(s, a, first + i), min(a.want, _chip_cpus(s, first + i)), a.want,
                    table + (i + 1) * row)
        for k in range(cap + 1, a.want + 1):
            table[(i + 1) * row + k] = INFINITE
    return True


cdef cost_t* _tables_of_cell(const Shape* s, Ask* a, int cell) noexcept nogil:
    """Return a new table of a cell; those of its chips lie behind it. NULL: out of memory."""
    cdef int first = s.cell_chips[cell], end = s.cell_chips[cell + 1], chip
    cdef Py_ssize_t row = a.want + 1, rows = 2 * (end - first) + 1 + s.chip_groups[end] - s.chip_groups[first]
    cdef cost_t* at = <cost_t*>malloc(rows * row * sizeof(cost_t))
    a.cell_table[cell] = at
    if at == NULL or (a.inner.table == NULL and not _open_inner(s, a)):
        return NULL
    _clear_row(a, at)
    at += (end - first + 1) * row
    for chip in range(first, end):
        a.chip_table[chip] = at
        at += (s.chip_groups[chip + 1] - s.chip_groups[chip] + 1) * row
    return a.cell_table[cell]


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

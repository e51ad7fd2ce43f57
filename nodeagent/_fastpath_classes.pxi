# Prices of classes of twin cells, and of a vector of counts. Included by _fastpath.pyx.

cdef bint _class_table(const Shape* s, Ask* a, int cls, int rows, int used) noexcept nogil:
    """Fill a.class_table[cls]: [i][m][k] is the cheapest way to take k CPUs with exactly m of the first i cells of a
    class, m < rows. used: how many cells a choice has at most; what leaves more to take than the others of them have is
    not worked out. False: out of memory."""
    cdef int first = s.class_start[cls], cells = s.class_start[cls + 1] - first, i, m, k, cell, widest = 0
    cdef Py_ssize_t row = a.want + 1, plane = rows * row
    if a.class_table[cls] != NULL and a.class_rows[cls] >= rows and a.class_used[cls] >= used:
        return True
    a.class_used[cls] = used
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
                           a.want - a.most_of[max(0, used - m)], table + (i + 1) * plane + m * row)
        widest = max(widest, a.cell_cap[cell])
    return True


cdef void _one_more_cell(const Shape* s, const Ask* a, int cell, const cost_t* same, bint use, int reach,
                         int64_t least, cost_t* out) noexcept nogil:
    """out[k], from k = least on: a cell left out (the row `same`) or, if it may be used, used for x CPUs (the row before
    `same`, which reaches no further than `reach`)."""
    cdef const cost_t* price = _cell(s, a, cell)
    cdef const cost_t* fewer = same - (a.want + 1)
    cdef int k, x, cap = a.cell_cap[cell]
    cdef cost_t best, extra = _cell_use(s, a, cell)
    for k in range(<int>min(least, a.want)):
        out[k] = INFINITE
    for k in range(<int>max(least, 0), a.want + 1):
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
    cdef int64_t reach = 0, here = 0
    cdef Py_ssize_t row = a.want + 1
    cdef cost_t* inner = table + (s.classes + 1) * row
    for k in range(a.want + 1):
        table[k] = INFINITE
    table[0] = 0
    for cls in range(s.classes):
        node = _shared_node(s, cls)
        if not a.share.high or node < 0:
            reach = _add_class(s, a, cls, counts[cls], table + cls * row, reach, table + (cls + 1) * row)
            continue
        if cls == 0 or _shared_node(s, cls - 1) != node:
            start, here = cls, 0
        # Row 0 of the table, nothing taken, is where a node's own sums start too.
        here = _add_class(s, a, cls, counts[cls], table if cls == start else inner + cls * row, here,
                          inner + (cls + 1) * row)
        if cls + 1 == s.classes or _shared_node(s, cls + 1) != node:
            _add_share(a, table + start * row, inner + (cls + 1) * row, table + (cls + 1) * row)
            reach += here


cdef int64_t _add_class(const Shape* s, const Ask* a, int cls, int count, const cost_t* left, int64_t reach,
                        cost_t* out) noexcept nogil:
    """out[k]: x CPUs from `count` cells of a class, the others as in `left`, which reaches no further than `reach`.
    Returns how far `out` reaches."""
    cdef const cost_t* right = _class(s, a, cls, count)
    cdef int k, x, top = <int>min(<int64_t>a.want, _top(s, a, cls, count))
    cdef cost_t best
    for k in range(a.want + 1):
        best = INFINITE if count else left[k] + right[0]
        for x in range(<int>max(1, k - reach), min(k, top) + 1):
            best = _least(best, left[k - x] + right[x])
        out[k] = _least(best, INFINITE)
    return reach + top


cdef void _add_share(const Ask* a, const cost_t* left, const cost_t* node, cost_t* out) noexcept nogil:
    """out[k]: a node gives nothing or a share that is allowed, the others as in `left`."""
    cdef int k, x
    for k in range(a.want + 1):
        out[k] = _least(left[k] + node[0], INFINITE)
        for x in range(a.share.low, min(k, a.share.high) + 1):
            out[k] = _least(out[k], left[k - x] + node[x])

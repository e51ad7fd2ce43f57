# The checked entry point: a machine laid out for the kernels, and a request applied to it. Included by _fastpath.pyx.

@cython.final
cdef class Layout:
    """A machine as the kernels see it. Built once for each inventory; holds no request.

    rows: one tuple (cpu, package, node, l3, core) for each online CPU, node counted from 0 without gaps; equal numbers
    mean the same package, node, L3 group or core. distances: nodes x nodes numbers, row by row.
    """

    cdef Shape shape
    cdef Shape priced                 # the same with priced packages; without CPUs if that is not possible
    cdef list blocks

    def __cinit__(self, list rows not None, int nodes, list distances not None):
        cdef Shape* s = &self.shape
        if nodes < 1 or len(distances) != nodes * nodes:
            raise ValueError(f"cannot lay out a machine: {len(distances)} distances for {nodes} nodes")
        if len({row[0] for row in rows}) != len(rows):
            raise ValueError("cannot lay out a machine: a CPU is given twice")
        for row in rows:
            if not (0 <= row[0] < IDS and 0 <= row[2] < nodes):
                raise ValueError(f"cannot lay out a machine: CPU {row[0]} on node {row[2]} is out of range")
        self.blocks = []
        packages = {package: i for i, package in enumerate(sorted({row[1] for row in rows}))}
        placed = [(packages[package], node, l3, core, cpu) for cpu, package, node, l3, core in rows]
        self._draw(s, [((package, node), (package, node), *rest) for package, node, *rest in placed], nodes, distances)
        cells = {(package, node) for package, node, *_ in placed}
        if len(cells) == len(packages) > len({node for _, node in cells}):
            self.priced.priced_chips = True
            self._draw(&self.priced, [((0, node), (package, node), *r) for package, node, *r in placed], nodes, distances)

    cdef int _draw(self, Shape* s, list placed, int nodes, list distances) except -1:
        """Lay out CPUs given as (cell, chip, l3, core, cpu), cell and chip as (package, node)."""
        cpu_id, core_cpus, group_cores, chip_groups, cell_chips, cell_package, cell_node = [], [], [], [], [], [], []
        before = (None,) * 5
        for row in sorted(placed):
            if before[:1] != row[:1]:
                cell_chips.append(len(chip_groups))
                cell_package.append(row[0][0])
                cell_node.append(row[0][1])
            if before[:2] != row[:2]:
                chip_groups.append(len(group_cores))
            if before[:3] != row[:3]:
                group_cores.append(len(core_cpus))
            if before[:4] != row[:4]:
                core_cpus.append(len(cpu_id))
            cpu_id.append(row[4])
            before = row
        s.cpus, s.cores, s.groups, s.chips = len(cpu_id), len(core_cpus), len(group_cores), len(chip_groups)
        s.cells, s.nodes, s.packages = len(cell_chips), nodes, len(set(cell_package))
        core_cpus.append(s.cpus)
        if any(core_cpus[i + 1] - core_cpus[i] > SMT_MAX for i in range(s.cores)):
            raise ValueError(f"cannot lay out a machine: a core has more than {SMT_MAX} CPUs")
        group_cores.append(s.cores)
        chip_groups.append(s.groups)
        cell_chips.append(s.chips)
        s.cpu_id, s.core_cpus, s.group_cores = self._ints(cpu_id), self._ints(core_cpus), self._ints(group_cores)
        s.chip_groups, s.cell_chips = self._ints(chip_groups), self._ints(cell_chips)
        s.cell_node, s.cell_package = self._ints(cell_node), self._ints(cell_package)
        s.node_cells = self._ints([cell_node.count(node) for node in range(nodes)])
        s.distance = self._ints(distances)
        self._classes(s)
        return 0

    cdef int* _ints(self, list values) except NULL:
        cdef bytearray block = bytearray(max(1, len(values)) * sizeof(int))
        cdef int* out = <int*><char*>block
        cdef int i
        for i in range(len(values)):
            out[i] = values[i]
        self.blocks.append(block)
        return out

    cdef int _classes(self, Shape* s) except -1:
        """Group twin cells into classes, in order of their first cell."""
        cdef int cell, first
        classes = []
        for cell in range(s.cells):
            for members in classes:
                first = members[0]
                if _twins(s, first, cell):
                    members.append(cell)
                    break
            else:
                classes.append([cell])
        # Classes that share a node are adjacent.
        classes.sort(key=lambda members: s.cell_node[members[0]] if s.node_cells[s.cell_node[members[0]]] > 1 else -1)
        starts = [0]
        for members in classes:
            starts.append(starts[-1] + len(members))
        s.classes = len(classes)
        s.class_cells = self._ints([cell for members in classes for cell in members])
        s.class_start = self._ints(starts)
        return 0

    def choose(self, object free_mask, int want, *, object must=0, bint whole_cores=False, bint spread_cores=False,
               bint spread_nodes=False, bint groups_first=False, int most_packages=0, int most_nodes=0,
               near=(), taste=()):
        """Return the cheapest `want` CPUs of free_mask, or None if no choice is possible.

        must: a mask of CPUs that have to be among them. most_packages, most_nodes: 0 means no limit. near, taste: pairs
        (mask, weight); each CPU of the mask costs that much more; near counts first, then taste.
        Returns (mask, near, taste, packages, nodes, distance, groups, split, nodes_broken, groups_broken,
        cores_broken, ids, exact, uneven); exact is False when the search ran out of steps. uneven is how many CPUs more
        one node gives than another; 0 where that is no more than an even spread may leave, and without spread_nodes.
        """
        # With a limit, packages have to be counted instead of priced.
        cdef Shape* s = &self.priced if self.priced.cpus and most_packages <= 0 else &self.shape
        cdef uint64_t[WORDS] words, must_words, out
        cdef Ask a
        if want < 1:
            raise ValueError(f"cannot choose {want} CPUs: expected 1 or more")
        if want > s.cpus:
            return None
        if must & ~free_mask:
            raise ValueError("cannot choose CPUs: not all of `must` are free")
        memset(words, 0, sizeof(words))
        memset(must_words, 0, sizeof(must_words))
        memset(out, 0, sizeof(out))
        _words_of(free_mask, words)
        _words_of(must, must_words)
        memset(&a, 0, sizeof(a))
        a.want, a.whole_cores, a.spread_cores, a.groups_first = want, whole_cores, spread_cores, groups_first
        a.most_packages = min(most_packages, s.packages) if most_packages > 0 else s.packages
        a.most_nodes = min(most_nodes, s.nodes) if most_nodes > 0 else s.nodes
        cdef bytearray memory = bytearray(_work_bytes(s, bool(near or taste)))
        _lay_out(s, &a, <char*>memory, bool(near or taste))
        _mark(s, words, must_words, &a)
        cdef uint64_t near_most = _weights(s, near, a.near), taste_most = _weights(s, taste, a.taste)
        cdef int bits = _widths(s, &a, near_most, taste_most)
        if bits > 125:
            raise ValueError(f"cannot choose {want} CPUs: the cost needs {bits} bits, 125 are there")
        if a.near != NULL and not s.priced_chips and not _floor(s, &a):
            raise MemoryError
        cdef bint found
        with nogil:
            found = _choose(s, &a, spread_nodes, out)
        if a.out_of_memory:
            raise MemoryError
        if not found:
            return None
        return _answer(s, &a, out, spread_nodes)


cdef uint64_t _weights(const Shape* s, object pairs, uint64_t* weights) except? 0xFFFF:
    """Add each pair's weight to the slots of its mask; return the largest sum."""
    cdef uint64_t[WORDS] words
    cdef uint64_t weight, most = 0
    cdef int slot
    for mask, weight in pairs:
        memset(words, 0, sizeof(words))
        _words_of(mask, words)
        for slot in range(s.cpus):
            if words[s.cpu_id[slot] >> 6] >> (s.cpu_id[slot] & 63) & 1:
                weights[slot] += weight
                most = max(most, weights[slot])
    return most


cdef object _answer(const Shape* s, Ask* a, const uint64_t* out, bint spread_nodes):
    cdef cost_t high = a.best_high, low = a.best_low
    cdef cost_t price = (high << a.at_low) + low
    cdef int near_end = a.at_groups if a.groups_first else 127
    return (
        _mask_of(out, WORDS),
        _field(price, a.at_near, near_end), _field(price, a.at_taste, a.at_near),
        _field(price, a.at_packages, a.at_taste) if s.priced_chips else a.best_packages,
        a.best_nodes, a.best_distance, _field(price, a.at_groups, a.at_groups + a.wide_groups),
        _field(price, a.at_split, a.at_split + a.wide_split),
        _field(price, a.at_nodes_broken, min(a.at_split, a.at_groups)),
        _field(price, a.at_groups_broken, a.at_nodes_broken),
        _field(price, a.at_cores_broken, a.at_groups_broken), _field(price, 0, a.at_cores_broken),
        a.steps <= STEP_BUDGET and not a.cut, _uneven(s, a, out) if spread_nodes else 0,
    )


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


cdef object _field(cost_t price, int start, int end):
    cdef cost_t part = price >> start
    part -= (part >> (end - start)) << (end - start)
    return <uint64_t>part


cdef bint _floor(const Shape* s, Ask* a) noexcept nogil:
    """Set the floor: no choice has a smaller high part than the cheapest single CPUs. False: out of memory."""
    cdef int slot, count = 0, left = a.want
    cdef uint64_t price
    cdef uint64_t* prices = <uint64_t*>malloc(s.cpus * sizeof(uint64_t))
    if prices == NULL:
        return False
    for slot in range(s.cpus):
        if a.free[slot]:
            price = _price(a, slot)
            if a.must[slot]:
                a.floor_high += price
                left -= 1
            else:
                prices[count] = price
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


cdef bint _twins(const Shape* s, int x, int y) noexcept nogil:
    """Return whether exchanging two cells changes neither packages, nor nodes, nor distances."""
    cdef int a = s.cell_node[x], b = s.cell_node[y], z, n = s.nodes
    if a == b:
        return _cells_of_package(s, s.cell_package[x]) == 1 and _cells_of_package(s, s.cell_package[y]) == 1
    if s.cell_package[x] != s.cell_package[y] or s.node_cells[a] != 1 or s.node_cells[b] != 1 \
            or s.distance[a * n + b] != s.distance[b * n + a]:
        return False
    for z in range(n):
        if z != a and z != b and (s.distance[a * n + z] != s.distance[b * n + z]
                                  or s.distance[z * n + a] != s.distance[z * n + b]):
            return False
    return True


cdef int _cells_of_package(const Shape* s, int package) noexcept nogil:
    cdef int cell, count = 0
    for cell in range(s.cells):
        count += s.cell_package[cell] == package
    return count


cdef Py_ssize_t _work_bytes(const Shape* s, bint weights) noexcept nogil:
    return (s.cells * 4 + s.nodes * 2 + s.packages + s.classes * 4) * sizeof(int) \
        + (s.chips + s.cells + s.classes) * sizeof(void*) + (s.classes + 1) * sizeof(int64_t) \
        + (2 * s.cpus * sizeof(uint64_t) if weights else 0) + 2 * s.cpus + 64


cdef void _lay_out(const Shape* s, Ask* a, char* at, bint weights) noexcept nogil:
    """Cut the zeroed working memory into tables, the widest first."""
    a.chip_table = <cost_t**>at
    a.cell_table = a.chip_table + s.chips
    a.class_table = a.cell_table + s.cells
    a.suffix = <int64_t*>(a.class_table + s.classes)
    at = <char*>(a.suffix + s.classes + 1)
    if weights:
        a.near = <uint64_t*>at
        a.taste = a.near + s.cpus
        at = <char*>(a.taste + s.cpus)
    a.cell_cap = <int*>at
    a.cell_reach = a.cell_cap + s.cells
    a.cell_least = a.cell_reach + s.cells
    a.cell_most = a.cell_least + s.cells
    a.node_whole = a.cell_most + s.cells
    a.node_uses = a.node_whole + s.nodes
    a.package_uses = a.node_uses + s.nodes
    a.class_rows = a.package_uses + s.packages
    a.class_least = a.class_rows + s.classes
    a.counts = a.class_least + s.classes
    a.best_counts = a.counts + s.classes
    a.free = <uint8_t*>(a.best_counts + s.classes)
    a.must = a.free + s.cpus


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
                free += a.free[slot]
            if free < s.core_cpus[core + 1] - s.core_cpus[core]:
                a.node_whole[s.cell_node[cell]] = 0
                if a.whole_cores:
                    free = 0
            a.cell_cap[cell] += free


cdef int _widths(const Shape* s, Ask* a, uint64_t near_most, uint64_t taste_most) noexcept nogil:
    """Pack the parts of the cost, each as wide as its largest value; return the bits needed."""
    cdef int at = _bits(<uint64_t>a.want * IDS)
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
    return at


cdef inline int _bits(uint64_t most) noexcept nogil:
    cdef int bits = 0
    while most:
        bits += 1
        most >>= 1
    return bits

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
    cdef Py_ssize_t ids               # larger than every CPU id

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
        self.ids = max((row[0] for row in rows), default=-1) + 1
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
        s.ids = <int>self.ids
        s.cells, s.nodes, s.packages = len(cell_chips), nodes, len(set(cell_package))
        core_cpus.append(s.cpus)
        if any(core_cpus[i + 1] - core_cpus[i] > SMT_MAX for i in range(s.cores)):
            raise ValueError(f"cannot lay out a machine: a core has more than {SMT_MAX} CPUs")
        group_cores.append(s.cores)
        chip_groups.append(s.groups)
        cell_chips.append(s.chips)
        s.cpu_id, s.core_cpus, s.group_cores = _ints(self.blocks, cpu_id), _ints(self.blocks, core_cpus), _ints(self.blocks, group_cores)
        s.chip_groups, s.cell_chips = _ints(self.blocks, chip_groups), _ints(self.blocks, cell_chips)
        s.cell_node, s.cell_package = _ints(self.blocks, cell_node), _ints(self.blocks, cell_package)
        s.node_cells = _ints(self.blocks, [cell_node.count(node) for node in range(nodes)])
        s.distance = _ints(self.blocks, distances)
        self._classes(s)
        return 0

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
        s.class_cells = _ints(self.blocks, [cell for members in classes for cell in members])
        s.class_start = _ints(self.blocks, starts)
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
        cdef Shape* s = self._shape(most_packages)
        cdef uint64_t[WORDS] words, must_words, out
        cdef Rules r
        cdef Chosen found
        cdef Marked marked
        cdef Outcome outcome
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
        memset(&r, 0, sizeof(r))
        r.want, r.whole_cores, r.spread_cores, r.spread_nodes = want, whole_cores, spread_cores, spread_nodes
        r.groups_first, r.most_packages, r.most_nodes, r.must = groups_first, most_packages, most_nodes, must_words
        cdef bytearray tastes = self._weights(taste), distances = self._weights(near)
        cdef const uint64_t* near_of = <const uint64_t*><char*>distances if near else NULL
        if taste:
            r.taste = <const uint64_t*><char*>tastes
        cdef bytearray memory = bytearray(_work_bytes(s))
        cdef char* work = memory
        with nogil:
            _open_search(s, &r, words, work, &marked)
            outcome = _find_cpus(s, &r, &marked, near_of, NULL, out, &found)
        _check_outcome(outcome, want, found.bits)
        return _answer(&found, out) if outcome == FITS else None

    cdef Shape* _shape(self, int most_packages) noexcept nogil:
        """Return the shape to search. With a limit, packages have to be counted instead of priced."""
        return &self.priced if self.priced.cpus and most_packages <= 0 else &self.shape

    cdef bytearray _weights(self, object pairs):
        """Return the sum of the weights of each CPU id, from pairs (mask, weight)."""
        cdef bytearray block = bytearray(self.ids * sizeof(uint64_t) if pairs else 0)
        cdef uint64_t* weights = <uint64_t*><char*>block
        cdef uint64_t[WORDS] words
        cdef uint64_t weight, word
        cdef Py_ssize_t i, count, here
        for mask, weight in pairs:
            count = _words_of(mask, words)
            for i in range(count):
                word = words[i]
                while word:
                    here = i * 64 + na_ctz(word)
                    if here < self.ids:
                        weights[here] += weight
                    word &= word - 1
        return block


cdef int _check_outcome(Outcome outcome, int want, int bits) except -1:
    """Raise what a search could not cope with."""
    if outcome == TOO_WIDE:
        raise ValueError(f"cannot choose {want} CPUs: the cost needs {bits} bits, {MOST_BITS} are there")
    if outcome == NO_MEMORY:
        raise MemoryError
    return 0


cdef object _answer(const Chosen* found, const uint64_t* out):
    return (
        _mask_of(out, WORDS), found.near, found.taste, found.packages, found.nodes, found.distance, found.groups,
        found.split, found.nodes_broken, found.groups_broken, found.cores_broken, found.ids, found.exact, found.uneven,
    )


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

# The checked entry point of joint decisions. Included by _fastpath.pyx.

cdef int64_t MOST_AMOUNT = <int64_t>1 << 62
# More pages or bytes than any machine has.


@cython.final
cdef class Machine:
    """The NUMA nodes of a machine as the kernels see them. Built once for each inventory; holds no request.

    cpus, packages: for each node, in order of id, masks of CPU ids and of packages. distances: nodes x nodes numbers, row
    by row. units, package_units: what a NUMA policy counts, lists of numbers of nodes: each node, the nodes of each
    package.
    """

    cdef Site site
    cdef Layout layout
    cdef list blocks
    cdef object every

    def __cinit__(self, Layout layout not None, list cpus not None, list packages not None, list distances not None,
                  list units not None, list package_units not None):
        cdef Site* s = &self.site
        if len(packages) != len(cpus) or len(distances) != len(cpus) ** 2:
            raise ValueError(f"cannot lay out nodes: {len(distances)} distances for {len(cpus)} nodes")
        self.layout, self.blocks = layout, []
        s.nodes = len(cpus)
        s.words = max(1, (layout.ids + 63) // 64)
        s.package_words = max(1, max(((mask.bit_length() + 63) // 64 for mask in packages), default=0))
        s.cpus, s.packages = self._masks(cpus, s.words), self._masks(packages, s.package_words)
        s.distance = _ints(self.blocks, distances)
        self._count(&s.each, units)
        self._count(&s.of_packages, package_units)
        self.every = (<object>1 << <object>layout.ids) - 1

    cdef uint64_t* _masks(self, list masks, int words) except NULL:
        """Return masks as the kernels read them, one after the other."""
        cdef bytes rows = b"".join(mask.to_bytes(words * 8, "little") for mask in masks)
        cdef bytearray block = bytearray(rows or b"\0")
        self.blocks.append(block)
        return <uint64_t*><char*>block

    cdef int _count(self, Units* units, list rows) except -1:
        starts = [0]
        for row in rows:
            starts.append(starts[-1] + len(row))
        units.count = len(rows)
        units.start = _ints(self.blocks, starts)
        units.nodes = _ints(self.blocks, [one for row in rows for one in row])
        return 0

    def place(self, int want, *, object free=0, object unreserved=0, object allowed=0, object must=0,
              bint whole_cores=False, bint spread_cores=False, bint spread_nodes=False, bint groups_first=False,
              int most_packages=0, int most_nodes=0, int most_groups=0, near=(), taste=(), node_near=(),
              tuple sizes=(), tuple there=(), tuple total=(),
              Pool pool=None, tuple need=(), held=(), closed=(), must_devices=(), alone=(),
              int most_units=-1, bint count_packages=False):
        """Return the cheapest placement of CPUs, pages, memory and devices, or None if nothing fits.

        free, unreserved, allowed: masks of the CPUs that can be granted, that could if nothing were held, and that the
        options permit; the other parameters of CPUs are those of Layout.choose. node_near: for each node, the distance of
        its memory to what the request should be near; empty: nothing. sizes: how much of each size is wanted; there,
        total: for each size, an array of what each node can give, and could if nothing were held (empty: the same). need: how many devices
        of each kind of the pool; held: ids that cannot be granted; closed: further ids that may not be taken; alone: for
        each class of the pool, what a device costs by itself; empty: nothing. most_units: how many nodes a NUMA policy
        allows; 0: as many as an empty machine needs, -1: any number; count_packages: packages instead of nodes.
        Returns (mask, cost, [(size, node, amount) ...], devices, exact); sizes and nodes by number.
        """
        cdef Task t
        cdef Found* best
        cdef bint found = False
        cdef const Units* units = &self.site.of_packages if count_packages else &self.site.each
        memset(&t, 0, sizeof(t))
        t.site, t.steps.left = &self.site, COVER_STEPS
        t.rules.want, t.rules.whole_cores, t.rules.spread_cores = want, whole_cores, spread_cores
        t.rules.spread_nodes, t.rules.groups_first, t.rules.most_packages = spread_nodes, groups_first, most_packages
        t.rules.most_nodes, t.rules.most_groups = most_nodes, most_groups
        try:
            self._take_cpus(&t, free, unreserved, allowed, must, near, taste)
            self._take_stock(&t, sizes, there, total, node_near)
            if pool is not None:
                self._take_devices(&t, pool, need, held, closed, must_devices, alone)
            with nogil:
                best = _new_found(&t)
                if best != NULL:
                    found = _decide(&t, units if most_units >= 0 else NULL, most_units, best)
            if t.arena.failed:
                raise MemoryError
            _check_outcome(t.trouble, want, t.bits)
            return self._placement(&t, best, pool) if found else None
        finally:
            _release(&t.arena, NULL, 0)

    cdef int _take_cpus(self, Task* t, object free, object unreserved, object allowed, object must, object near,
                        object taste) except -1:
        """Write what is known of CPUs into a task."""
        cdef Layout layout = self.layout
        t.rules.must = t.free = t.unreserved = t.allowed = self._words(t, must)
        if t.rules.want == 0:
            return 0
        t.shape = layout._shape(t.rules.most_packages)
        t.ids = layout.ids
        t.free, t.unreserved, t.allowed = self._words(t, free), self._words(t, unreserved), self._words(t, allowed)
        t.marks = <char*>self._memory(t, _work_bytes(t.shape))
        t.work = <char*>self._memory(t, _work_bytes(t.shape))
        t.near = <uint64_t*>self._memory(t, t.ids * sizeof(uint64_t))
        if near:
            t.near_fixed = self._weights(t, near)
        if taste:
            t.rules.taste = self._weights(t, taste)
        return 0

    cdef void* _memory(self, Task* t, Py_ssize_t size) except NULL:
        cdef void* found = _grab(&t.arena, size)
        if found == NULL:
            raise MemoryError
        return found

    cdef uint64_t* _words(self, Task* t, object mask) except NULL:
        """Return a mask as words; CPUs that the machine does not have are left out."""
        cdef uint64_t* words = <uint64_t*>self._memory(t, self.site.words * sizeof(uint64_t))
        if mask:
            _words_of(mask & self.every, words)
        return words

    cdef uint64_t* _weights(self, Task* t, object pairs) except NULL:
        cdef bytearray sums = self.layout._weights(pairs)
        cdef uint64_t* weights = <uint64_t*>self._memory(t, len(sums))
        memcpy(weights, <char*>sums, len(sums))
        return weights

    cdef int _take_stock(self, Task* t, tuple sizes, tuple there, tuple total, object node_near) except -1:
        """Write what is wanted of pages and memory, and what each node has, into a task."""
        cdef int size, node, nodes = self.site.nodes
        t.sizes = len(sizes)
        if len(there) != t.sizes or len(total or there) != t.sizes:
            raise ValueError(f"cannot place {t.sizes} sizes: {len(there)} rows of what there is")
        t.want = <int64_t*>self._memory(t, t.sizes * sizeof(int64_t))
        t.there = <int64_t*>self._memory(t, t.sizes * nodes * sizeof(int64_t))
        t.total = <int64_t*>self._memory(t, t.sizes * nodes * sizeof(int64_t))
        for size in range(t.sizes):
            t.want[size] = min(sizes[size], MOST_AMOUNT)
            self._row(there[size], t.there + size * nodes)
            self._row((total or there)[size], t.total + size * nodes)
        if node_near:
            t.node_fixed = <int64_t*>self._memory(t, nodes * sizeof(int64_t))
            for node in range(nodes):
                t.node_fixed[node] = node_near[node]
        return 0

    cdef int _row(self, array.array row, int64_t* out) except -1:
        if row.ob_descr.typecode != c"q" or len(row) != self.site.nodes:
            raise ValueError(f"cannot place: a row of {len(row)} amounts for {self.site.nodes} nodes")
        memcpy(out, row.data.as_longlongs, self.site.nodes * sizeof(int64_t))
        return 0

    cdef int _take_devices(self, Task* t, Pool pool, tuple need, object held, object closed, object must,
                           object alone) except -1:
        """Write what is known of devices into a task."""
        cdef const Devices* d = &pool.d
        cdef int kind, cls, device
        if len(need) != d.kinds or (alone and len(alone) != d.classes):
            raise ValueError(f"cannot place {len(need)} kinds of devices: the pool has {d.kinds}")
        t.pool = d
        t.need = <int*>self._memory(t, d.kinds * sizeof(int))
        t.alone = <int64_t*>self._memory(t, d.classes * sizeof(int64_t))
        t.unheld = <int*>self._memory(t, 2 * d.classes * sizeof(int))
        t.unheld_empty = t.unheld + d.classes
        t.must = <uint8_t*>self._memory(t, 4 * d.devices)
        t.open, t.open_empty, t.held = t.must + d.devices, t.must + 2 * d.devices, t.must + 3 * d.devices
        for kind in range(d.kinds):
            t.need[kind] = min(need[kind], d.devices + 1)
        for cls in range(d.classes if alone else 0):
            t.alone[cls] = alone[cls]
        pool._flag(must, t.must, 1)
        memset(t.open_empty, 1, d.devices)
        pool._flag(closed, t.open_empty, 0)
        pool._flag(held, t.held, 1)
        for device in range(d.devices):
            t.open[device] = t.open_empty[device] and not t.held[device]
            t.unheld[d.class_of[device]] += not t.held[device]
            t.unheld_empty[d.class_of[device]] += 1
        return 0

    cdef object _placement(self, Task* t, const Found* found, Pool pool):
        cdef int size, at, node
        amounts = []
        for size in range(t.sizes):
            for at in range(found.givers):
                node = found.order[at]
                if found.taken[size * self.site.nodes + node]:
                    amounts.append((size, node, found.taken[size * self.site.nodes + node]))
        devices = () if pool is None else self._chosen(t, found.pick, pool)
        return (
            _mask_of(found.cpus, self.site.words), tuple([found.cost[at] for at in range(COST_PARTS)]), amounts, devices,
            found.exact and not t.steps.cut,
        )

    cdef tuple _chosen(self, Task* t, const Picked* pick, Pool pool):
        """Return the ids of a set of devices: of each class what must be taken first, then the lowest."""
        cdef const Devices* d = &pool.d
        cdef int cls, device, left, must
        names = []
        for cls in range(d.classes):
            left = pick.taken[cls]
            for must in range(1, -1, -1):
                for device in range(d.class_start[cls], d.class_start[cls + 1]):
                    if left and pick.usable[device] and t.must[device] == must:
                        names.append(pool.names[device])
                        left -= 1
        return tuple(sorted(names))

# Devices of some kinds as the kernels see them. Included by _fastpath.pyx.

cdef enum:
    ANYWHERE = -1                     # the node of a device is not known
    NO_SUCH_NODE = -2                 # it is one that the machine does not have


cdef struct Devices:
    # Devices in order of class, then id. Those of a class are interchangeable, but for what they exclude.
    int devices, classes, kinds, places
    int* class_start                  # by class, and once more: its first device
    int* class_of                     # by device
    int* kind_of                      # by class, as place_of and node_of
    int* place_of
    int* node_of                      # ANYWHERE, NO_SUCH_NODE, or the number of the node
    int64_t* far                      # classes x classes: what a pair costs, and what cutting one costs
    int64_t* link
    int cpu_ids                       # more than the id of every CPU that has a weight
    uint32_t* cpu_weight              # places x cpu_ids: how far a CPU is
    int64_t* node_weight              # places x nodes: how far the memory of a node is
    # What cannot be given away together.
    bint conflicts
    int* rank                         # by device: its position in order of id
    int* by_rank
    int* excluded_start               # by device, and once more: where its row of `excluded` starts
    int* excluded                     # devices that exclude it
    int* excluded_count               # how many devices of the whole machine do
    int* things                       # how much it hands over
    int* by_things                    # devices, those first that hand over least, then by id


@cython.final
cdef class Pool:
    """All devices of some kinds. Built once for each inventory and choice of kinds; holds no request.

    names: the ids, in order of class, then id. classes: one tuple (kind, devices, place, node) for each class of interchangeable
    devices, numbers all but the second, which says how many there are; node -1: not known, -2: not on the machine. far,
    link: classes x classes numbers, row by row (choose_devices). cpu_weights: for each place, pairs (mask of CPUs,
    distance). node_weights: for each place, the distance of each node. exclusions: for each device, a tuple (numbers of
    those that exclude it, how many do on the whole machine, how much it hands over); empty if none excludes another.
    """

    cdef Devices d
    cdef list blocks
    cdef list names
    cdef dict number

    def __cinit__(self, list names not None, int kinds, list classes not None, far not None, link not None,
                  list cpu_weights not None, list node_weights not None, list exclusions not None):
        cdef Devices* d = &self.d
        self.blocks = []
        self.names = names
        self.number = {one: number for number, one in enumerate(names)}
        d.devices, d.classes, d.places = len(names), len(classes), len(cpu_weights)
        d.kinds = kinds
        starts = [0]
        for row in classes:
            starts.append(starts[-1] + row[1])
        if starts[-1] != len(names) or len(far) != len(classes) ** 2 or len(link) != len(far):
            raise ValueError(f"cannot lay out devices: {len(names)} ids and {len(far)} costs for {len(classes)} classes")
        d.class_start = _ints(self.blocks, starts)
        d.class_of = _ints(self.blocks, [number for number, row in enumerate(classes) for _ in range(row[1])])
        d.kind_of = _ints(self.blocks, [row[0] for row in classes])
        d.place_of = _ints(self.blocks, [row[2] for row in classes])
        d.node_of = _ints(self.blocks, [row[3] for row in classes])
        d.far, d.link = _longs(self.blocks, far), _longs(self.blocks, link)
        d.node_weight = _longs(self.blocks, [weight for row in node_weights for weight in row])
        self._weigh(cpu_weights)
        order = sorted(range(len(names)), key=names.__getitem__)
        d.by_rank = _ints(self.blocks, order)
        d.rank = _ints(self.blocks, _inverse(order))
        self._exclude(exclusions)

    cdef int _weigh(self, list cpu_weights) except -1:
        """Write the distances of CPUs by id."""
        cdef Py_ssize_t most = max((mask.bit_length() for row in cpu_weights for mask, _ in row), default=0), place
        cdef bytearray block = bytearray(max(1, len(cpu_weights) * most) * sizeof(uint32_t))
        cdef uint32_t* weights = <uint32_t*><char*>block
        for place in range(len(cpu_weights)):
            for mask, weight in cpu_weights[place]:
                for one in ids(mask):
                    weights[place * most + <Py_ssize_t>one] = weight
        self.blocks.append(block)
        self.d.cpu_weight = weights
        self.d.cpu_ids = <int>most
        return 0

    cdef int _exclude(self, list exclusions) except -1:
        cdef Devices* d = &self.d
        d.conflicts = bool(exclusions)
        rows = exclusions or [((), 0, 1)] * len(self.names)
        starts = [0]
        for excluded, _, _ in rows:
            starts.append(starts[-1] + len(excluded))
        d.excluded_start = _ints(self.blocks, starts)
        d.excluded = _ints(self.blocks, [one for excluded, _, _ in rows for one in excluded])
        d.excluded_count = _ints(self.blocks, [count for _, count, _ in rows])
        d.things = _ints(self.blocks, [things for _, _, things in rows])
        order = [one for _, _, one in sorted((row[2], name, one) for one, (row, name) in enumerate(zip(rows, self.names)))]
        d.by_things = _ints(self.blocks, order)
        return 0

    cdef int _flag(self, object some, uint8_t* flags, uint8_t value) except -1:
        """Set the flags of the devices among some ids."""
        cdef int number
        if len(some) <= len(self.names):
            for name in some:
                number = self.number.get(name, -1)
                if number >= 0:
                    flags[number] = value
            return 0
        for number in range(len(self.names)):
            if self.names[number] in some:
                flags[number] = value
        return 0


def _inverse(order):
    """Return the position of each number in a permutation."""
    found = [0] * len(order)
    for position, number in enumerate(order):
        found[number] = position
    return found


cdef int* _ints(list blocks, list values) except NULL:
    """Return numbers as the kernels read them; the memory belongs to `blocks`."""
    cdef bytearray block = bytearray(max(1, len(values)) * sizeof(int))
    cdef int* out = <int*><char*>block
    cdef int i
    for i in range(len(values)):
        out[i] = values[i]
    blocks.append(block)
    return out


cdef int64_t* _longs(list blocks, object values) except NULL:
    cdef bytearray block = bytearray(max(1, len(values)) * sizeof(int64_t))
    cdef int64_t* out = <int64_t*><char*>block
    cdef Py_ssize_t i
    for i in range(len(values)):
        out[i] = values[i]
    blocks.append(block)
    return out

# Where devices that exclude each other allow too many combinations: a few that give what is wanted, if any does.
# Included by _fastpath.pyx.
#
# Group by group, all counts of devices by kind that can be reached are kept, no more than is wanted of each.

cdef struct Reached:
    # One reachable combination of counts.
    Reached* before                   # with the groups before
    int option                        # of the last group
    int* counts                       # by kind


cdef struct Layer:
    # The combinations with some of the groups, in the order in which they were reached.
    int count, slots
    Reached** reached
    int* slot                         # a hash table of positions in `reached`, each plus one


cdef bint _draw_few(Arena* arena, const Devices* d, const uint8_t* usable, const Group* first, const int* need,
                    Draws* draws) noexcept nogil:
    """Draw up to FEW_DRAWS sets, each preferring other options. False: out of memory."""
    cdef int turn
    cdef Reached* found
    cdef uint8_t* draw
    for turn in range(FEW_DRAWS):
        found = _reach_need(arena, d, usable, first, need, turn)
        if arena.failed:
            return False
        if found == NULL:
            return True
        draw = _new_draw(arena, d, usable, first, draws)
        if draw == NULL:
            return False
        _draw_reached(first, found, draw)
    return True


cdef Reached* _reach_need(Arena* arena, const Devices* d, const uint8_t* usable, const Group* first, const int* need,
                          int turn) noexcept nogil:
    """Return the first combination that gives what is needed; NULL if there is none, or if out of memory."""
    cdef Layer layer, after
    cdef const Group* group = first
    cdef int number = 1
    if not _start_layer(arena, d, usable, first, need, &layer):
        return NULL
    while group != NULL:
        if not _next_layer(arena, d, group, need, turn * number % group.options, &layer, &after):
            return NULL
        layer = after
        number += 1
        group = group.next
    return _found_in(d, &layer, need)


cdef bint _start_layer(Arena* arena, const Devices* d, const uint8_t* usable, const Group* first, const int* need,
                       Layer* layer) noexcept nogil:
    """Fill the layer of no group: the devices that nothing excludes. False: out of memory."""
    cdef int* counts = <int*>_grab(arena, d.kinds * sizeof(int))
    cdef const Group* group = first
    cdef int device, kind, member
    if counts == NULL or not _open_layer(arena, layer, 1):
        return False
    for device in range(d.devices):
        counts[d.kind_of[d.class_of[device]]] += usable[device] != 0
    while group != NULL:
        for member in range(group.members):
            counts[d.kind_of[d.class_of[group.device[member]]]] -= 1
        group = group.next
    for kind in range(d.kinds):
        counts[kind] = min(counts[kind], need[kind])
    return _reach_counts(arena, d, layer, counts, NULL, 0)


cdef bint _open_layer(Arena* arena, Layer* layer, Py_ssize_t most) noexcept nogil:
    """Make room for up to `most` combinations. False: out of memory."""
    layer.count, layer.slots = 0, 4
    while layer.slots < 2 * most:
        layer.slots *= 2
    layer.reached = <Reached**>_grab(arena, most * sizeof(Reached*))
    layer.slot = <int*>_grab(arena, layer.slots * sizeof(int))
    return not arena.failed


cdef bint _next_layer(Arena* arena, const Devices* d, const Group* group, const int* need, int shift, const Layer* layer,
                      Layer* after) noexcept nogil:
    """Fill the layer with one more group, from its option `shift` on. False: out of memory."""
    cdef int* counts = <int*>_grab(arena, d.kinds * sizeof(int))
    cdef int at, turn, option, kind
    if counts == NULL or not _open_layer(arena, after, <Py_ssize_t>layer.count * group.options):
        return False
    for at in range(layer.count):
        for turn in range(group.options):
            option = (turn + shift) % group.options
            for kind in range(d.kinds):
                counts[kind] = min(need[kind], layer.reached[at].counts[kind] + group.gives[option * d.kinds + kind])
            if not _reach_counts(arena, d, after, counts, layer.reached[at], option):
                return False
    return True


cdef bint _reach_counts(Arena* arena, const Devices* d, Layer* layer, const int* counts, Reached* before,
                        int option) noexcept nogil:
    """Keep a combination unless it was reached before. False: out of memory."""
    cdef int slot = _slot_of(d, layer, counts)
    cdef Reached* new
    if layer.slot[slot]:
        return True
    new = <Reached*>_grab(arena, sizeof(Reached) + d.kinds * sizeof(int))
    if new == NULL:
        return False
    new.before, new.option, new.counts = before, option, <int*>(new + 1)
    memcpy(new.counts, counts, d.kinds * sizeof(int))
    layer.reached[layer.count] = new
    layer.count += 1
    layer.slot[slot] = layer.count
    return True


cdef int _slot_of(const Devices* d, const Layer* layer, const int* counts) noexcept nogil:
    """Return the slot of a combination, or the empty one where it belongs (linear probing)."""
    cdef uint64_t mixed = 0
    cdef int kind, slot
    for kind in range(d.kinds):
        mixed = (mixed * 1000003 + <uint64_t>counts[kind]) & 0x7fffffff
    slot = <int>((mixed ^ mixed >> 16) & <uint64_t>(layer.slots - 1))
    while layer.slot[slot] and memcmp(layer.reached[layer.slot[slot] - 1].counts, counts, d.kinds * sizeof(int)):
        slot = (slot + 1) & (layer.slots - 1)
    return slot


cdef Reached* _found_in(const Devices* d, const Layer* layer, const int* need) noexcept nogil:
    cdef int slot = _slot_of(d, layer, need)
    return layer.reached[layer.slot[slot] - 1] if layer.slot[slot] else NULL


cdef void _draw_reached(const Group* first, const Reached* found, uint8_t* usable) noexcept nogil:
    """Add the options of a combination to a set."""
    cdef const Reached* at
    cdef const Group* group = first
    cdef int left = 0
    while group != NULL:
        left += 1
        group = group.next
    group = first
    while group != NULL:
        left -= 1
        at = _back(found, left)
        _draw_option(group, at.option, usable)
        group = group.next


cdef const Reached* _back(const Reached* at, int steps) noexcept nogil:
    while steps > 0:
        at = at.before
        steps -= 1
    return at

"""Intel's DSA and IAA, divided into work queues for claims."""

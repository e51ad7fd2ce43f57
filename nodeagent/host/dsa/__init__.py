"""Intel's DSA and IAA: their work queues, read and written through sysfs."""

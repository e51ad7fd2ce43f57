"""CPUs, caches and NUMA nodes of the machine."""

"""What other programs of the cluster may know of the machine: labels of the Node, and its NUMA nodes."""

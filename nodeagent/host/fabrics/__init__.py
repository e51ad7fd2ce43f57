"""NVMe over fabrics: connections to targets on the network, made and ended through the kernel."""

"""NVMe over fabrics: targets as devices that all nodes share."""

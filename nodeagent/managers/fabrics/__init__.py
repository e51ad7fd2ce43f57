"""NVMe targets on the network, connected for claims and disconnected afterwards, and the pools that nodes share."""

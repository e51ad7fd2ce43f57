"""The container runtime's plugin interface (NRI) over ttrpc. Converts protobuf to core values
and back; makes no decisions."""

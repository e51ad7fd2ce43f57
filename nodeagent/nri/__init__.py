"""The container runtime's plugin interface (NRI) over ttrpc. Protobuf in, core values through, protobuf out.
No decisions."""

"""Wire adapters: protobuf in, core values through, protobuf out. No decisions."""

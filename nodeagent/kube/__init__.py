"""Wire adapters: protobuf or JSON in, core values, protobuf or JSON out. No decisions."""

"""The pure core: values and decisions. No I/O, clock, logging, gRPC or asyncio."""

"""Generated gRPC code of grpcio, for the peers that tests and benchmarks play."""

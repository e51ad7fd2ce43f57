"""gRPC over HTTP/2 on Unix sockets: as much of it as kubelet's APIs need, on h2."""

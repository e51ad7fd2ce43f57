"""A whole Kubernetes node from real binaries."""

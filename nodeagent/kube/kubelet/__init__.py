"""Kubelet's gRPC APIs: device plugin, DRA, plugin registration, pod-resources."""

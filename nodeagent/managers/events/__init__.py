"""Kubernetes Events: what is reported, and how it reaches the API server."""

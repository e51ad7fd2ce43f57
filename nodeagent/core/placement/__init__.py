"""Placement of requests: this package contains every policy choice."""

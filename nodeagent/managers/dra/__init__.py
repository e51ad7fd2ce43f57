"""Serves resources through Dynamic Resource Allocation."""

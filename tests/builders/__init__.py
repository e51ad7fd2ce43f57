"""Builds machines, inventories and objects for tests."""

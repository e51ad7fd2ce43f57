"""Wires the managers together: start order, stop order, reload."""

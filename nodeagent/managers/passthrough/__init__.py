"""Devices bound to VFIO drivers for claims, and given back to the drivers that they had."""

"""Devices of the machine, one file per kind."""

"""Reads and writes files of the machine."""

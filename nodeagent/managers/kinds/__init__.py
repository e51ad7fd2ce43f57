"""Devices that third-party kinds prepare for claims, and unprepare when they are released."""

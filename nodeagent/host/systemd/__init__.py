"""Notifies systemd of readiness and of the CPUs of slices."""

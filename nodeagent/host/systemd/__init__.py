"""What systemd is told: readiness, and the CPUs of slices."""

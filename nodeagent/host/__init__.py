"""The machine, read and written. Returns core values."""

"""Where a request goes: every policy choice of placement."""

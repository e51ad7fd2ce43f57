"""The agent in a QEMU guest."""

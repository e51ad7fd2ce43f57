"""What the kernel shows of the health of devices: one file per source of evidence."""

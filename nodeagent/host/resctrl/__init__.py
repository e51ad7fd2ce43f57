"""The kernel's resctrl file system, read and written."""

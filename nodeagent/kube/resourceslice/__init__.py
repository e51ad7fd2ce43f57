"""ResourceSlices: rendering, validation, publication."""

"""ResourceSlices: rendered, validated, written, kept."""

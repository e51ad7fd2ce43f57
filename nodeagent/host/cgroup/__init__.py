"""Control groups of pods: named, read, watched, written."""

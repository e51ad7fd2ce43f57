"""Parts of a device that are made when they are granted: their geometry, the order in which they are offered, and what
has to be made or destroyed."""

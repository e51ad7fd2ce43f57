"""Cache ways and memory bandwidth: what resctrl offers, and which group gets what."""

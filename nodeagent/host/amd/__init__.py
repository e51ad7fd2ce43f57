"""GPUs of AMD beyond what a scan reads: their partition modes, and who uses them."""

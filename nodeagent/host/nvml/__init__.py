"""NVML, asked through a helper process that may be killed."""

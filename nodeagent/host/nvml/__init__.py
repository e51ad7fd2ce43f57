"""NVML, queried through a helper process that can be killed."""

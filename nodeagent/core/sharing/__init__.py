"""GPUs that several programs use at the same time: MPS, time slices, and shares with limits."""

"""NVIDIA's Multi-Process Service: its control daemons as processes of this machine."""

"""What is made of network adapters."""

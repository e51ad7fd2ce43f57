"""What exclusive CPUs are set to while they are held."""

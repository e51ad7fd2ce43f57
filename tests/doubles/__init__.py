"""Real servers as strict as what they stand for."""

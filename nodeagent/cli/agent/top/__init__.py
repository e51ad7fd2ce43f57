"""`nodeagent top`: what is used of what is held."""

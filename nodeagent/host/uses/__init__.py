"""What of the machine the node itself uses."""

"""What the agent reports about itself: the log and the metrics."""

"""The page of the agent in a real browser."""

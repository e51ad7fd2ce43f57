"""Small asyncio helpers: waiting for changes, and tasks that run as long as the agent does."""

"""Configuration of other programs, translated into the agent's; only the verbs of `nodeagent import` load it. Pure."""

"""Configuration of NVIDIA's device plugin and of its DRA driver, translated into the agent's. Pure."""

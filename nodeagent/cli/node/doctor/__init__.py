"""`nodeagent doctor`: what on this node keeps the agent from doing its work, or makes its grants worth less."""

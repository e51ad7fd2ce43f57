"""`nodeagent explain`: why a request fits or not, and why pods, claims, CPUs and devices stand as they do."""

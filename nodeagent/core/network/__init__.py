"""Network adapters as the plugins of others know them: variables of containers, files for CNI plugins."""

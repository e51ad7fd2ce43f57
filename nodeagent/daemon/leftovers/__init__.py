"""What an agent leaves on a host, and undoing it: `nodeagent uninstall`."""

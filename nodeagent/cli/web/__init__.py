"""What `nodeagent web` is made of: who may see the page, and where its content comes from."""

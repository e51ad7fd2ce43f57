"""How GPUs belong together: links, and sets of linked ones."""

"""What admins see: the status socket."""

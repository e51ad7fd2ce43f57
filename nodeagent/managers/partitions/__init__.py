"""MIG instances that are made for claims and destroyed afterwards."""

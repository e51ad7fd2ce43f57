"""Work queues of Intel's DSA and IAA that are made for claims, and ended when they are released."""

"""Work queues of Intel's DSA and IAA that are made for claims."""

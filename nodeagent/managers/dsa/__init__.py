"""Work queues of Intel's DSA and IAA, made for claims and taken down afterwards."""

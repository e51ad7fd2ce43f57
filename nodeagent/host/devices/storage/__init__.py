"""Parts of disks as devices of the kind `block`: NVMe namespaces, partitions, LVM volumes."""

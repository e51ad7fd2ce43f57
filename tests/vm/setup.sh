#!/bin/sh
# Installs what building and booting the guest needs, where the distribution's apt-get can. Never fails: the tests say
# what is missing and are skipped.
set -u

complete() {
    for program in qemu-system-x86_64 mmdebstrap mke2fs zstd cpio modprobe; do
        command -v "$program" >/dev/null || { echo "vm: $program is missing" >&2; return 1; }
    done
}

complete && exit 0
if command -v apt-get >/dev/null && [ "$(id -u)" = 0 ]; then
    apt-get update -qq
    DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends \
        qemu-system-x86 mmdebstrap e2fsprogs zstd xz-utils cpio kmod >/dev/null
fi
complete || echo "vm: tests that need the guest will be skipped" >&2
exit 0

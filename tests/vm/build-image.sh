#!/bin/bash
# Builds the guest from Debian packages, as root:
#   build-image.sh OUT WHEELS PACKAGES     (OUT/archives keeps downloaded packages from one build to the next)
# WHEELS is a folder of wheels: all of them are installed into the guest's /opt/nodeagent, a virtual environment.
# Makes OUT/vmlinux (booted through PVH: no decompression in the guest), OUT/initrd.img, OUT/root.img, and OUT/root, the
# tree that the image was made of: a compiler of the guest's own distribution runs in it.
set -euo pipefail
OUT=$1 WHEELS=$2 PACKAGES=$3
SUITE=trixie                                  # its containerd (1.7) has NRI and CDI
TREE=$OUT/root
LEFT_OUT="gpu media infiniband net/wireless isdn staging iio comedi scsi/qla2xxx scsi/lpfc"
MASKED="apt-daily.timer apt-daily-upgrade.timer dpkg-db-backup.timer e2scrub_all.timer e2scrub_reap.service fstrim.timer
    getty.target systemd-timesyncd.service systemd-firstboot.service systemd-hwdb-update.service"

main() {
    rm -rf "$TREE" && mkdir -p "$TREE" "$OUT/archives"
    timed packages
    timed wheels
    timed kernel
    timed settings
    timed initrd
    timed image
}

timed() {
    local from=$SECONDS
    "$1"
    echo "vm: image: $1: $((SECONDS - from)) s"
}

packages() {
    local archive exclude=() folder
    # The archive that this machine's apt uses; none is named here.
    archive=$(apt-get indextargets --format '$(REPO_URI)' 'Created-By: Packages' 'Label: Debian' | head -n 1)
    for folder in $LEFT_OUT; do
        exclude+=(--dpkgopt="path-exclude=/lib/modules/*/kernel/drivers/$folder/*"
                  --dpkgopt="path-exclude=/usr/lib/modules/*/kernel/drivers/$folder/*")
    done
    mmdebstrap --variant=minbase --mode=root --skip=check/empty,cleanup/apt \
        --aptopt='Acquire::Languages "none"' --aptopt='APT::Install-Recommends "false"' \
        --aptopt='APT::Keep-Downloaded-Packages "true"' \
        --dpkgopt='path-exclude=/usr/share/man/*' --dpkgopt='path-exclude=/usr/share/doc/*' \
        --dpkgopt='path-exclude=/usr/share/locale/*' --dpkgopt='path-exclude=/lib/modules/*/kernel/sound/*' \
        --dpkgopt='path-exclude=/usr/lib/modules/*/kernel/sound/*' \
        --dpkgopt=force-unsafe-io --dpkgopt=force-confold "${exclude[@]}" \
        --setup-hook='mkdir -p "$1"/var/cache/apt/archives
            cp -n '"$OUT"'/archives/*.deb "$1"/var/cache/apt/archives/ 2>/dev/null || :' \
        --essential-hook='mkdir -p "$1"/etc/initramfs-tools
            echo update_initramfs=no >"$1"/etc/initramfs-tools/update-initramfs.conf' \
        --customize-hook='cp -n "$1"/var/cache/apt/archives/*.deb '"$OUT"'/archives/ || :
            rm -rf "$1"/var/cache/apt/archives/*.deb "$1"/var/lib/apt/lists/*' \
        --include="$PACKAGES" "$SUITE" "$TREE" \
        "deb $archive $SUITE main" "deb $archive $SUITE-updates main" 2>"$OUT/mmdebstrap.log" ||
        { tail -n 20 "$OUT/mmdebstrap.log" >&2; return 1; }
}

wheels() {
    mkdir "$TREE/wheels"
    cp "$WHEELS"/*.whl "$TREE/wheels/"
    chroot "$TREE" python3 -m venv /opt/nodeagent
    chroot "$TREE" sh -c '/opt/nodeagent/bin/pip install -q --no-index --no-deps /wheels/*.whl'
    ln -s /opt/nodeagent/bin/nodeagent "$TREE/usr/local/bin/nodeagent"
    rm -rf "$TREE/wheels"
}

kernel() {
    VERSION=$(ls "$TREE/lib/modules")
    python3 - "$TREE/boot/vmlinuz-$VERSION" "$OUT/vmlinux" <<'PY'
import pathlib, subprocess, sys
packed, target = (pathlib.Path(one) for one in sys.argv[1:])
whole = packed.read_bytes()
start = whole.find(b"\x28\xb5\x2f\xfd")  # zstd; what follows the frame in a bzImage is no zstd, hence no check of the end
plain = subprocess.run(["zstd", "-dc"], input=whole[start:], capture_output=True).stdout
if start < 0 or plain[:4] != b"\x7fELF":
    raise SystemExit(f"cannot unpack {packed}: no kernel packed with zstd in it")
target.write_bytes(plain)
PY
}

settings() {
    local unit
    install -Dm644 /dev/stdin "$TREE/etc/systemd/system/vm-control.service" <<'UNIT'
[Unit]
Description=Runs what the tests on the host ask for
RequiresMountsFor=/share
After=systemd-udev-trigger.service dbus.service
[Service]
ExecStart=/usr/bin/python3 -u /share/inside/control.py
StandardOutput=journal+console
StandardError=journal+console
[Install]
WantedBy=multi-user.target
UNIT
    mkdir -p "$TREE/share" "$TREE/etc/systemd/system/multi-user.target.wants"
    ln -s ../vm-control.service "$TREE/etc/systemd/system/multi-user.target.wants/"
    ln -sf /lib/systemd/system/multi-user.target "$TREE/etc/systemd/system/default.target"
    cat >"$TREE/etc/fstab" <<'FSTAB'
/dev/vda / ext4 defaults,noatime 0 0
share /share 9p trans=virtio,version=9p2000.L,msize=262144,cache=none 0 0
FSTAB
    echo vm >"$TREE/etc/hostname"
    echo 0123456789abcdef0123456789abcdef >"$TREE/etc/machine-id"
    printf '9pnet_virtio\n9p\n' >"$TREE/etc/modules-load.d/vm.conf"
    for unit in $MASKED; do
        ln -sf /dev/null "$TREE/etc/systemd/system/$unit"
    done
}

initrd() {
    local made=$OUT/initrd module number=10
    rm -rf "$made" && mkdir -p "$made"/{bin,proc,sys,dev,new,mod}
    cp "$TREE/bin/busybox" "$made/bin/"
    chroot "$TREE" sh -c "for one in virtio_pci virtio_blk ext4 crc32c_generic; do
            modprobe -S $VERSION -D -d / \$one 2>/dev/null || :; done" |
        awk '$1 == "insmod" && !seen[$2]++ { print $2 }' >"$OUT/modules"
    while read -r module; do
        cp "$TREE$module" "$made/mod/$number-$(basename "$module")"
        number=$((number + 1))
    done <"$OUT/modules"
    install -m755 /dev/stdin "$made/init" <<'INIT'
#!/bin/busybox sh
b=/bin/busybox
$b mount -t proc proc /proc; $b mount -t sysfs sys /sys; $b mount -t devtmpfs dev /dev
for one in /mod/*; do $b insmod $one; done
n=0; while [ ! -b /dev/vda ] && [ $n -lt 600 ]; do $b usleep 50000; n=$((n + 1)); done
$b mount -t ext4 -o rw,noatime /dev/vda /new || exec $b sh
$b umount /proc /sys; $b mount --move /dev /new/dev
exec $b switch_root /new /sbin/init
INIT
    (cd "$made" && find . | cpio -o -H newc --quiet) >"$OUT/initrd.img"
    rm -rf "$made"
}

image() {
    rm -rf "$TREE"/boot/* "$OUT/root.img"
    truncate -s 3G "$OUT/root.img"
    mke2fs -q -t ext4 -O ^has_journal -E lazy_itable_init=1 -d "$TREE" "$OUT/root.img"
}

main

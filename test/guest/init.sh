#!/bin/busybox sh
# Process 1 of the guest. It loads modules, leaves the initial ramfs (whose root cannot be pivoted
# away from, as containers do), mounts what a machine has, checks the kernel and runs the scripts.
export PATH=/bin

if [ "$1" != second ]; then
	mount -t proc proc /proc
	mount -t devtmpfs dev /dev
	mount -t sysfs sys /sys
	while read -r module; do
		insmod /modules/$module 2>/dev/null || echo "guest: module $module not loaded"
	done </modules/order
	rm -rf /modules
	mount -t tmpfs -o size=90% root /new
	# File by file, so that the memory of what was moved is free again.
	(cd /payload && for f in *; do mv "$f" /new/; done)
	mkdir -p /new/proc /new/sys /new/dev /new/run /new/var/lib /new/root /new/tmp
	cp /init /new/init
	umount /proc /sys /dev
	exec switch_root /new /init second
fi

mount -t proc proc /proc
mount -t sysfs sys /sys
mount -t devtmpfs dev /dev
mkdir -p /dev/pts /dev/shm
mount -t devpts -o newinstance,ptmxmode=0666,mode=620,gid=5 pts /dev/pts
mount -t tmpfs shm /dev/shm
mount -t tmpfs run /run
mount -t cgroup2 cgroup2 /sys/fs/cgroup
mount -t mqueue mqueue /dev/mqueue 2>/dev/null || true
ln -sf /proc/self/fd /dev/fd
exec </dev/null >/dev/console 2>&1
hostname guest
ip link set lo up
mkdir -p /tmp && chmod 1777 /tmp

failed=0
check() { # check WORDS COMMAND...
	words=$1
	shift
	if "$@" >/tmp/check 2>&1; then
		echo "kernel PASS: $words"
	else
		echo "kernel FAIL: $words"
		cat /tmp/check
		failed=1
	fi
}
controllers() { for c in cpu memory pids io cpuset; do grep -qw $c /sys/fs/cgroup/cgroup.controllers || { cat /sys/fs/cgroup/cgroup.controllers; return 1; }; done; }
overlay() { mkdir -p /tmp/l /tmp/u /tmp/w /tmp/m && mount -t overlay -o lowerdir=/tmp/l,upperdir=/tmp/u,workdir=/tmp/w o /tmp/m && touch /tmp/m/x && umount /tmp/m && test -e /tmp/u/x; }
links() { ip link add br9 type bridge && ip link add va type veth peer name vb && ip link set va master br9 && ip link del va && ip link del br9; }
netfilter() { grep -q '^nf_tables ' /proc/modules && grep -q '^nft_masq ' /proc/modules && grep -q '^br_netfilter ' /proc/modules; }
check "cgroup v2 with controllers" controllers
check "overlay file systems" overlay
check "bridges and veth pairs" links
check "nftables with nat" netfilter

code=$failed
if [ -e /e2e/scripts.sh ]; then
	sh /e2e/scripts.sh || code=1
fi
echo "GUEST-EXIT $code"
sync
reboot -f

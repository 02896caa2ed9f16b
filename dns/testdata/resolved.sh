# Runs systemd-resolved on a bus of its own, in mount and PID namespaces of its own, until standard input ends. SERVER is its program, COMMANDS set it up, DIR is
# a directory for its files.
set -e
mount --make-rprivate /
dir=$DIR
cp /etc/passwd $dir/passwd
cp /etc/group $dir/group
grep -q ^systemd-resolve: /etc/passwd || echo 'systemd-resolve:x:65530:65530::/:/usr/sbin/nologin' >>$dir/passwd
grep -q ^systemd-resolve: /etc/group || echo 'systemd-resolve:x:65530:' >>$dir/group
mount --bind $dir/passwd /etc/passwd
mount --bind $dir/group /etc/group
mount -t tmpfs none /run
mkdir -p /run/dbus /run/systemd/resolve
chown systemd-resolve:systemd-resolve /run/systemd/resolve
cat >$dir/bus.conf <<'BUS'
<!DOCTYPE busconfig PUBLIC "-//freedesktop//DTD D-Bus Bus Configuration 1.0//EN" "http://www.freedesktop.org/standards/dbus/1.0/busconfig.dtd">
<busconfig><type>system</type><listen>unix:path=/run/dbus/system_bus_socket</listen><auth>EXTERNAL</auth>
<policy context="default"><allow user="*"/><allow own="*"/><allow send_type="method_call"/><allow send_destination="*"/><allow receive_sender="*"/></policy></busconfig>
BUS
dbus-daemon --config-file=$dir/bus.conf --nofork &
until [ -S /run/dbus/system_bus_socket ]; do read -t 0.1 <>/dev/zero || true; done
"$SERVER" &
until resolvectl dns eth0 10.9.0.2 2>/dev/null; do read -t 0.1 _ || true; done
eval "$COMMANDS"
echo ready
cat >/dev/null

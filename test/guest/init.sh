#!/bin/busybox sh
# The only program of a test's guest. On each of its disks that holds an ext4 file system it keeps a journal, one line after the other, each
# synced before the next is begun; on its console it says which lines are synced, and takes commands from there. It says nothing of time.
#
#   line n     blob into NAME/noise, synced; then "n MD5-OF-THE-BLOB CRC-OF-BOTH" appended to NAME/journal, synced; on the first disk,
#              then on the second, ... So a line on one disk is never there without that line on the disks before it.
#   disks      /disks/NAME, in the order of their names, which are the serial numbers that the virtual machine gives them
#   /shadow    the same once more in memory: what must be read from the disks when the caches are dropped
#   console    VARVE up     VARVE synced 1     VARVE synced 2     ...     VARVE begins 1, output of the first command, VARVE did 1 STATUS
#
# The blob, 32 KiB, is the same on all disks and has its place by the number of the line, so of old lines the newest in each place is there.

/bin/busybox mount -t proc proc /proc
mount -t sysfs sys /sys
mount -t devtmpfs dev /dev
for module in $(cat /modules/order); do insmod /modules/$module; done
stty -echo < /dev/console

PLACES=256
writing=${writing:-yes}
line=0
names=''

# Appends line $2, of which /blob and $text are made, to the journal of disk $1.
append() {
  for root in /shadow/$1 /disks/$1; do
    dd if=/blob of=$root/noise bs=32k seek=$(($2 % PLACES)) conv=notrunc,fsync 2>/dev/null &&
      echo "$text" >> $root/journal && sync $root/journal || return 1
  done
}

# Makes the blob and the text of line $1.
compose() {
  dd if=/dev/urandom of=/blob bs=32k count=1 2>/dev/null
  set -- $1 $(md5sum /blob)
  text="$1 $2"
  text="$text $(echo "$text" | crc32)"
}

# The number of the last line of disk $1.
last() {
  set -- 0 $(tail -n 1 /shadow/$1/journal)
  echo ${2:-0}
}

# Begins to keep journals on the disks that came since.
use() {
  for block in /sys/block/vd*; do
    name=$(cat $block/serial)
    [ -n "$name" ] && [ ! -e /disks/$name ] || continue
    mkdir -p /disks/$name /shadow/$name
    if ! mount -t ext4 -o ${mount:-rw} /dev/${block##*/} /disks/$name 2>/dev/null; then
      rmdir /disks/$name /shadow/$name
      continue
    fi
    [ -e /disks/$name/journal ] && cp /disks/$name/journal /disks/$name/noise /shadow/$name
    : >> /shadow/$name/journal
    names=$(ls /disks)
    from=$(last $name)
    [ $from -gt $line ] && line=$from
  done
  # A disk that a crash or an older backup left behind the others is brought to where they are; a new one begins there.
  for name in $names; do
    from=$(last $name)
    [ $from = 0 ] && continue
    while [ $from -lt $line ]; do
      from=$((from + 1))
      compose $from
      append $name $from || return 1
    done
  done
}

# Ends with disk $1: unmounts it.
leave() {
  umount /disks/$1 && rmdir /disks/$1 && rm -r /shadow/$1
  names=$(ls /disks)
}

# Reads everything from the disks again and compares it with what was written.
check() {
  sync
  echo 3 > /proc/sys/vm/drop_caches
  for name in $names; do
    for file in journal noise; do cmp /shadow/$name/$file /disks/$name/$file || return 1; done
  done
}

# What the kernel had to say of disks and file systems that it should not have.
complaints() {
  dmesg | grep -iE 'i/o error|ext4-fs (error|warning)|blk_update|remounting|blocked for more|call trace'
}

# Unmounts everything and switches the machine off.
finish() {
  for name in $names; do leave $name || return 1; done
  echo VARVE finished
  poweroff -f
}

# A guest agent, as much of one as freezes and thaws: answers lines of JSON on the port that the real one uses.
agent() {
  frozen=thawed
  while :; do
    # Nothing can be read while nobody on the host has the other end.
    read -r asked <&3 || { usleep 20000; continue; }
    answer='{"return": {}}'
    case $asked in
      *guest-sync*) id=${asked##*\"id\":}; id=${id# }; printf '\377' >&3; answer="{\"return\": ${id%%[!0-9]*}}" ;;
      *guest-ping*) ;;
      *guest-fsfreeze-status*) answer="{\"return\": \"$frozen\"}" ;;
      *guest-fsfreeze-freeze*) frozen=frozen; answer="{\"return\": $(each --freeze)}" ;;
      *guest-fsfreeze-thaw*) frozen=thawed; answer="{\"return\": $(each --unfreeze)}" ;;
      *) answer='{"error": {"class": "CommandNotFound", "desc": "not a command of this agent"}}' ;;
    esac
    echo "$answer" >&3
  done
}

# Freezes or thaws all disks; says how many.
each() {
  count=0
  for root in /disks/*; do fsfreeze $1 $root 2>/dev/null && count=$((count + 1)); done
  echo $count
}

mkdir -p /disks /shadow /commands
if [ -n "$system" ]; then
  # This guest's system is on its first disk, and all that it does is there.
  mount -t ext4 /dev/vda /disks && mount --move /dev /disks/dev && exec switch_root /disks /sbin/init
  echo VARVE failed to start the system of /dev/vda
fi
use
for port in /sys/class/virtio-ports/*; do
  [ "$(cat $port/name 2>/dev/null)" = org.qemu.guest_agent.0 ] && agent 3<>/dev/${port##*/} &
done
(
  number=0
  while read -r command; do
    number=$((number + 1))
    echo "$command" > /incoming
    mv /incoming /commands/$number
  done
) < /dev/console &
echo VARVE up
next=1
while :; do
  if [ $writing = yes ] && [ -n "$names" ]; then
    compose $((line + 1))
    for name in $names; do append $name $((line + 1)) || writing=failed; done
    if [ $writing = failed ]; then
      echo VARVE failed at line $((line + 1))
    else
      line=$((line + 1))
      echo VARVE synced $line
    fi
  else
    usleep 20000
  fi
  if [ -e /commands/$next ]; then
    echo VARVE begins $next
    eval "$(cat /commands/$next)"
    echo VARVE did $next $?
    next=$((next + 1))
  fi
done

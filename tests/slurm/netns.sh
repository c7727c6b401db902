#!/usr/bin/env bash
# Several hosts on one Linux machine, joined by a network of their own, for cluster.sh.
#
#   NETNS_STATE=FOLDER netns.sh up NAME...         make the hosts and the switch between them; those that are up are kept
#   NETNS_STATE=FOLDER netns.sh exec NAME CMD...   run CMD on a host
#   NETNS_STATE=FOLDER netns.sh off NAME           power failure: its cable is dead, then all that ran there
#   NETNS_STATE=FOLDER netns.sh down               remove everything; safe to repeat
#
# Each host has its own network, host name, processes, IPC, mounts, /dev/shm and /etc/hosts; files are shared, as on a
# cluster's shared file system. No host's name can be resolved, not even its own: hosts know one another by address. There is no way out: the switch has a namespace of its own, so not even this machine has an
# address on that network. Namespaces are held by one process each, and vanish with it; no other process is ever signalled.
# Needs root, iproute2, util-linux.
set -euo pipefail

STATE=${NETNS_STATE:?the folder for the state}
HOSTS=$STATE/hosts # a folder for each host: addr, pid, holder, ...
SUBNET=10.77.0
SWITCH=switch
FIRST=9 # last number of the first host's address: 9 and 10 are sorted otherwise than their text, as some names are

die() { echo "netns.sh: $*" >&2; exit 1; }
source "$(dirname "${BASH_SOURCE[0]}")/processes.sh"

# Process 1 of a host: sets itself up, then reaps orphans until it is killed.
# shellcheck disable=SC2016 # for that shell to expand
HOST_INIT='
  set -e
  hostname "$1"
  ip link set lo up
  mount -t tmpfs -o mode=1777 tmpfs /dev/shm
  if [ -e "$2/etc-hosts" ]; then mount --bind "$2/etc-hosts" /etc/hosts; fi
  : >"$2/ready"
  trap : TERM INT HUP
  set +e
  while :; do sleep 3600 & wait; done'

new_namespace() { # NAME
  local folder=$HOSTS/$1 holder pid
  rm -f "$folder/ready"
  setsid unshare --net --uts --ipc --mount --pid --fork --mount-proc --kill-child=KILL \
    bash -c "$HOST_INIT" init "$1" "$folder" </dev/null >"$folder/init.log" 2>&1 9>&- &
  holder=$!
  record "$folder/holder" "$holder" # --kill-child: the host dies with it
  within 10 test -e "$folder/ready" || die "$1 did not start: $(cat "$folder/init.log")"
  read -r pid _ <"/proc/$holder/task/$holder/children" || [[ -n $pid ]] # there is no newline
  record "$folder/pid" "$pid"
}

in_net() { nsenter --net="/proc/$(<"$HOSTS/$1/pid")/ns/net" "${@:2}"; } # NAME CMD...

start_host() { # NAME: its namespaces, then its cable
  local folder=$HOSTS/$1
  if alive "$folder/pid"; then return; fi
  in_net $SWITCH ip link del "p-$1" 2>/dev/null || true
  new_namespace "$1"
  in_net $SWITCH ip link add "p-$1" type veth peer name eth0 netns "$(<"$folder/pid")"
  in_net $SWITCH ip link set "p-$1" master br0 up
  in_net "$1" ip addr add "$(<"$folder/addr")/24" dev eth0
  in_net "$1" ip link set eth0 up
}

stop_host() { # NAME: its process 1, and with that all others
  local name=$1 process
  for process in "$HOSTS/$1"/{pid,holder}; do
    stop "$process" KILL 10 || die "$name would not die"
  done
  rm -f "$HOSTS/$name"/{pid,holder}{,.start} "$HOSTS/$name/ready"
}

up() {
  local name number=$FIRST
  mkdir -p "$HOSTS/$SWITCH"
  if ! alive "$HOSTS/$SWITCH/pid"; then
    new_namespace $SWITCH
    in_net $SWITCH ip link add br0 type bridge forward_delay 0
    in_net $SWITCH ip link set br0 up
  fi
  for name in "$@"; do
    mkdir -p "$HOSTS/$name"
    echo "$SUBNET.$((number++))" >"$HOSTS/$name/addr"
    echo 127.0.0.1 localhost >"$HOSTS/$name/etc-hosts"
    start_host "$name"
  done
}

down() {
  local folder
  for folder in "$HOSTS"/*/; do [[ ! -d $folder ]] || stop_host "$(basename "$folder")"; done
  rm -rf "$HOSTS"
}

run_on() { # NAME CMD...
  local pid
  alive "$HOSTS/$1/pid" || die "there is no host $1, or it is off"
  pid=$(<"$HOSTS/$1/pid")
  exec nsenter --target "$pid" --net --uts --ipc --mount --pid --wd="$PWD" -- "${@:2}"
}

command=${1:-}
shift || true
case $command in
  up) up "$@" ;;
  exec) run_on "$@" ;;
  off)
    in_net $SWITCH ip link set "p-$1" nomaster 2>/dev/null || true
    stop_host "$1"
    ;;
  down) down ;;
  *) die "up, exec, off or down, not '$command'" ;;
esac

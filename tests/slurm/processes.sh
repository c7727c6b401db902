# shellcheck shell=bash
# Read by cluster.sh and netns.sh: processes known by pid and start time, so that a pid that was given out again is never hit.

# The start time of a process that is neither dead nor a zombie.
start_time() { # PID
  local stat fields
  stat=$(cat "/proc/$1/stat" 2>/dev/null) || return 1
  read -ra fields <<<"${stat##*) }"
  [[ ${fields[0]} != [ZX] ]] && echo "${fields[19]}"
}
record() { start_time "$2" >"$1.start"; echo "$2" >"$1"; } # FILE PID
alive() { # FILE
  [[ -s $1 && -s $1.start ]] && [[ $(start_time "$(<"$1")" || true) == "$(<"$1.start")" ]]
}
within() { # SECONDS CMD...: try until it succeeds
  local tries
  for ((tries = $1 * 20; tries > 0; tries--)); do
    if "${@:2}"; then return 0; fi
    sleep 0.05
  done
  return 1
}
gone() { ! alive "$1"; } # FILE
stop() { # FILE SIGNAL SECONDS
  if gone "$1"; then return; fi
  kill "-$2" "$(<"$1")" 2>/dev/null || true
  within "$3" gone "$1"
}

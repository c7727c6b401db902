# shellcheck shell=bash
# Read by the launch files and slurm/train.sh: settings that cannot be meant, in a sentence and with exit code 2.

# A variable that is set must be a whole number from LEAST to MOST.
check_number() { # NAME LEAST MOST WHAT-IT-IS
  local value=${!1-}
  if [[ -z $value || ($value =~ ^(0|[1-9][0-9]{0,8})$ && $value -ge $2 && $value -le $3) ]]; then return; fi
  echo "$1 is '$value', but must be a whole number from $2 to $3: $4" >&2
  exit 2
}
check_ranks() {
  check_number NPROC 1 1024 "ranks on each machine; leave it unset for one on each GPU"
  check_number MAX_RESTARTS 0 999999999 "times that torchrun restarts crashed ranks"
  check_number SHUTDOWN_TIMEOUT 1 999999999 "seconds that ranks may take to save after a signal"
}

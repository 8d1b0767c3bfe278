# shellcheck shell=bash
# What the job scripts beside this file share: bash functions, to be sourced. Needs bash 4 and Slurm's
# own commands; nothing of the package is imported here.
#
# Settings (environment variables; the block "settings" of a script has them):
#   KNL_ENV            folder of the Python environment, shared by all nodes; else that of `knl` on PATH
#   KNL_BUNDLE         archive made by `knl bundle`: the nodes copy it to KNL_LOCAL and run from there
#   KNL_LOCAL          node-local folder (/tmp)
#   KNL_LAUNCHER       ibrun, srun, or auto: ibrun where there is one
#   KNL_RANKS_PER_NODE ranks on a node (1)
#   KNL_REQUEUE        yes: the job puts itself back into the queue; no: it submits its continuation
#   KNL_MAX_RESTARTS   restarts after which a job gives up (100)

knl_job_sh=$(readlink -f "${BASH_SOURCE[0]}")
knl_phases=""
knl_launched=0
knl_warning=USR1 # what tells what was launched that its time is nearly over
knl_cancelled=no
trap : USR1 # while nothing is launched that could heed it

knl_say() { printf 'knl: %s\n' "$*" >&2; }

knl_die() {
  knl_say "$*"
  exit 2
}

# Ends a phase of the start: `knl_phase NAME SECONDS_WHEN_IT_BEGAN`.
knl_phase() { knl_phases="${knl_phases:+$knl_phases, }$1 $((SECONDS - $2)) s"; }

# Puts the environment to use into knl_python: KNL_ENV, or where `knl` is.
knl_find_python() {
  local found
  if [[ -n ${KNL_ENV:-} ]]; then
    knl_python=$KNL_ENV/bin/python
    [[ -x $knl_python ]] || knl_die "KNL_ENV=$KNL_ENV: has no bin/python; give the folder of an environment with knl"
  elif found=$(command -v knl); then
    knl_python=$(dirname "$(readlink -f "$found")")/python
    [[ -x $knl_python ]] || knl_die "$found: no python beside it; set KNL_ENV to the environment's folder"
  else
    knl_die "no knl on PATH: module load knl, activate its environment, or set KNL_ENV, before sbatch"
  fi
}

knl_nodes() { echo "${SLURM_JOB_NUM_NODES:?not in a Slurm job: start this script with sbatch}"; }
knl_ranks_per_node() { echo "${KNL_RANKS_PER_NODE:-1}"; }
knl_ranks() { echo $(($(knl_nodes) * $(knl_ranks_per_node))); }

knl_launcher() {
  case ${KNL_LAUNCHER:-auto} in
    auto) if command -v ibrun >/dev/null; then echo ibrun; else echo srun; fi ;;
    ibrun | srun) echo "$KNL_LAUNCHER" ;;
    *) knl_die "KNL_LAUNCHER=$KNL_LAUNCHER: must be auto, ibrun or srun" ;;
  esac
}

# Runs a command as the job's ranks, in the background: its process is knl_launched.
# Ranks bind themselves, so nobody else may. From Slurm 22.05 srun no longer inherits
# --cpus-per-task. SLURM_CPUS_ON_NODE is that of the first node; nodes of a job are alike.
knl_launch() {
  local launcher per_node
  launcher=$(knl_launcher) || exit 2
  KNL_LAUNCHED_AT=$(date +%s.%N)
  export KNL_LAUNCHED_AT
  per_node=$(knl_ranks_per_node)
  if [[ $launcher == ibrun ]]; then
    knl_warning=0
    ibrun "$@" &
  else
    export SRUN_CPUS_PER_TASK=$((SLURM_CPUS_ON_NODE / per_node))
    ((SRUN_CPUS_PER_TASK > 0)) || knl_die "KNL_RANKS_PER_NODE=$per_node: must be 1 to $SLURM_CPUS_ON_NODE, the CPUs of a node"
    srun --nodes="$(knl_nodes)" --ntasks="$(knl_ranks)" --ntasks-per-node="$per_node" \
      --cpus-per-task="$SRUN_CPUS_PER_TASK" --cpu-bind=none --mpi="$(knl_pmi)" \
      --kill-on-bad-exit=1 "$@" </dev/null &
  fi
  knl_launched=$!
}

# Intel MPI speaks PMI2; a Slurm without that plugin has PMIx.
knl_pmi() {
  if [[ -n ${KNL_PMI:-} ]]; then
    echo "$KNL_PMI"
  elif srun --mpi=list 2>&1 | grep -qw pmi2; then
    echo pmi2
  else
    echo pmix
  fi
}

# Waits for the ranks; signals that the job gets meanwhile are theirs. Returns their status. An ibrun
# is a script that USR1 would end; its ranks know themselves when the job ends.
knl_wait() {
  local status signalled=yes
  trap 'signalled=yes; kill -"$knl_warning" "$knl_launched"' USR1
  trap 'signalled=yes; knl_cancelled=yes; kill -TERM "$knl_launched"' TERM
  while [[ $signalled == yes ]]; do # a signal ends `wait`, and not the ranks
    signalled=no
    wait "$knl_launched"
    status=$?
  done
  trap : USR1
  trap - TERM
  return "$status"
}

# Before Slurm 22.05 a job is not told when it ends; knl counts from its own start.
knl_time_limit() {
  local left days=0 parts
  [[ -z ${SLURM_JOB_END_TIME:-} && -z ${KNL_TIME_LIMIT:-} ]] || return 0
  left=$(squeue -h -j "$SLURM_JOB_ID" -o %L 2>/dev/null) || return 0
  [[ $left =~ ^([0-9]+-)?([0-9]+:){0,2}[0-9]+$ ]] || return 0
  [[ $left == *-* ]] && days=${left%%-*} && left=${left#*-}
  IFS=: read -r -a parts <<<"$left"
  local seconds=0 part
  for part in "${parts[@]}"; do seconds=$((60 * seconds + 10#$part)); done
  export KNL_TIME_LIMIT=$((86400 * days + seconds))
}

# --- the environment, on the nodes' own disks

# Copies KNL_BUNDLE to every node and unpacks it there; knl_python then is that of the copy. Where
# that cannot be done the shared environment is used, which is said.
knl_spread_bundle() {
  [[ -n ${KNL_BUNDLE:-} ]] || return 0
  [[ -r $KNL_BUNDLE ]] || knl_die "KNL_BUNDLE=$KNL_BUNDLE: cannot be read; make it with knl bundle"
  local began=$SECONDS
  knl_local=${KNL_LOCAL:-/tmp}/knl-$(id -u)-$SLURM_JOB_ID-${SLURM_RESTART_COUNT:-0}
  trap knl_clean_nodes EXIT
  if ! knl_on_nodes prepare "$knl_local" "$(stat -c %s "$KNL_BUNDLE")"; then
    knl_say "bundle not used: the nodes have no room for it in ${KNL_LOCAL:-/tmp}; reading $knl_python instead"
    return 0
  fi
  local copy=$knl_local/archive
  if ! { command -v sbcast >/dev/null && sbcast --force "$KNL_BUNDLE" "$copy"; }; then
    knl_say "sbcast does not work here: each node copies the bundle itself"
    copy=$KNL_BUNDLE
  fi
  knl_phase "copy of the bundle" "$began"
  began=$SECONDS
  if knl_on_nodes unpack "$knl_local" "$copy"; then
    knl_python=$knl_local/knl-env/bin/python
    unset PYTHONHOME PYTHONPATH VIRTUAL_ENV
  else
    knl_say "bundle not used: it could not be unpacked on every node; reading $knl_python instead"
  fi
  knl_phase "unpacking" "$began"
}

knl_clean_nodes() { knl_on_nodes clean "$knl_local" >/dev/null 2>&1; }

# One task a node, which does `knl_node_ACTION ARGUMENTS`; ibrun knows only tasks of all ranks, of
# which the first on a node does it.
knl_on_nodes() {
  if [[ $(knl_launcher) == ibrun ]]; then
    ibrun bash "$knl_job_sh" "$@"
  else
    srun --nodes="$(knl_nodes)" --ntasks="$(knl_nodes)" --ntasks-per-node=1 --cpu-bind=none \
      --mpi=none bash "$knl_job_sh" "$@" </dev/null
  fi
}

# Three times the archive's size are needed for what is in it.
knl_node_prepare() {
  local folder=$1 bytes=$2 free
  (umask 077 && mkdir -p "$folder") || return 1
  free=$(df -Pk "$folder" | awk 'NR == 2 { print $4 }')
  if ((free * 1024 < 4 * bytes)); then
    knl_say "$(hostname): $folder has $((free / 1024)) MB free, the bundle needs $((4 * bytes / 1048576)) MB"
    rm -rf "$folder"
    return 1
  fi
}

knl_node_unpack() { tar -xf "$2" -C "$1" && [[ -x $1/knl-env/bin/python ]] && rm -f "$1/archive"; }

knl_node_clean() { rm -rf "$1"; }

# --- again

# The step of the newest checkpoint of a run: -1 where there is none.
knl_newest() {
  local path newest=-1
  for path in "$1"/checkpoints/step-*.safetensors; do
    [[ $path =~ step-([0-9]+)\.safetensors$ ]] && ((10#${BASH_REMATCH[1]} > newest)) &&
      newest=$((10#${BASH_REMATCH[1]}))
  done
  echo "$newest"
}

knl_restarts() { echo $((${SLURM_RESTART_COUNT:-0} + ${KNL_CONTINUED:-0})); }

# What Slurm has the job for: scancel ends the ranks, and not this shell.
knl_state() {
  scontrol show job -o "$SLURM_JOB_ID" 2>/dev/null | sed -n 's/.* JobState=\([A-Z_]*\).*/\1/p'
}

# Nodes of this job that are down or do not answer.
knl_bad_nodes() {
  sinfo -h -N -n "${SLURM_JOB_NODELIST:-}" -t down,drain,fail,no_respond,unknown -o %N 2>/dev/null |
    sort -u | paste -sd,
}

# Ends the job with the status of its ranks, after it has seen to its next start:
# `knl_finish STATUS STOP_FILE PROGRESS_BEFORE PROGRESS_AFTER SCRIPT ARGUMENTS...`.
# 75 is a stop in order with a checkpoint; any other failure is started again only where a node is to
# blame. PROGRESS is any number: a start that has not raised it would not do better next time.
knl_finish() {
  local status=$1 stop=$2 before=$3 after=$4 bad=""
  shift 4
  if ((status == 0)); then
    exit 0
  elif [[ $knl_cancelled == yes || $(knl_state) != RUNNING ]]; then
    knl_say "the job is cancelled or over: not queued again"
    exit "$status"
  elif [[ -n $stop && -e $stop ]]; then
    knl_say "$stop is there: not queued again"
    exit "$status"
  elif ((status != 75)); then
    bad=$(knl_bad_nodes)
    [[ -n $bad ]] || exit "$status"
    knl_say "$bad: down or not answering, left out of the next start"
  fi
  if ((after <= before)); then
    knl_say "no progress since the last start (step $after): not queued again; look at the log above"
    exit "$status"
  elif (($(knl_restarts) >= ${KNL_MAX_RESTARTS:-100})); then
    knl_say "KNL_MAX_RESTARTS=${KNL_MAX_RESTARTS:-100} reached: not queued again; sbatch the same line to go on"
    exit "$status"
  fi
  knl_again "$bad" "$@" || knl_say "could not be queued again: sbatch the same line to go on"
  exit "$status"
}

# Into the queue again: by requeueing, or as a job of its own where the site forbids that.
knl_again() {
  local bad=$1
  shift
  if [[ ${KNL_REQUEUE:-yes} == yes ]]; then
    if [[ -n $bad ]]; then scontrol update JobId="$SLURM_JOB_ID" ExcNodeList="$bad"; fi
    if scontrol requeue "$SLURM_JOB_ID"; then
      knl_say "queued again (start $(($(knl_restarts) + 2)))"
      return 0
    fi
    knl_say "this site lets no job requeue itself: submitting a continuation"
  fi
  knl_continue "$bad" "$@"
}

# The same script with the same options, to the same log, once this job is over.
knl_continue() {
  local bad=$1 script=$2 id log limit
  shift 2
  log=$(scontrol show job "$SLURM_JOB_ID" | sed -n 's/^ *StdOut=//p')
  limit=$(squeue -h -j "$SLURM_JOB_ID" -o %l)
  id=$(KNL_CONTINUED=$(($(knl_restarts) + 1)) sbatch --parsable --dependency="afterany:$SLURM_JOB_ID" \
    --job-name="$SLURM_JOB_NAME" --nodes="$SLURM_JOB_NUM_NODES" --partition="$SLURM_JOB_PARTITION" \
    ${SLURM_JOB_ACCOUNT:+--account="$SLURM_JOB_ACCOUNT"} --time="$limit" --open-mode=append \
    ${log:+--output="$log"} ${bad:+--exclude="$bad"} "$script" "$@") || return 1
  knl_say "continues as job ${id%%;*}"
}

# A task of knl_on_nodes: this file is then run, not sourced.
if [[ ${BASH_SOURCE[0]} == "$0" ]]; then
  action=${1:?prepare, unpack or clean}
  shift
  [[ ${SLURM_LOCALID:-${MPI_LOCALRANKID:-0}} == 0 ]] || exit 0
  "knl_node_$action" "$@"
fi

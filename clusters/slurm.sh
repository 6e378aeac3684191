#!/usr/bin/env bash
# Slurm: one job that brings up Ray on its nodes, searches, and ends everything with it.
#
#   # once: an environment that all nodes see (python -m venv, pip install -c constraints.txt -e .)
#   # start and submit; what follows the script are arguments of tune/search.py, --storage must be on a shared disk
#   sbatch --nodes 2 --gpus-per-node 4 --cpus-per-task 32 clusters/slurm.sh cifar100 \
#       --data parquet:/shared/data/cifar100 --storage /shared/runs --gpus-per-worker 1 --cpus-per-worker 8
#   # watch
#   squeue --me
#   tail -f refilled-JOB.log
#   # stop
#   scancel JOB
#
# What it costs to leave it on: the nodes, until the search or the time limit ends. Five minutes before the limit the
# search is stopped and the job queued again under its number; it goes on where it was, as after any crash. Ray's logs
# stay on the nodes, in /tmp/ray-JOB.
#SBATCH --job-name=refilled
#SBATCH --output=refilled-%j.log
#SBATCH --open-mode=append
#SBATCH --ntasks-per-node=1
#SBATCH --exclusive
#SBATCH --time=24:00:00
#SBATCH --signal=B:USR1@300
#SBATCH --requeue
set -euo pipefail
umask 077

python=${REFILLED_PYTHON:-.venv/bin/python} # from the folder in which sbatch was called
ray=$(dirname "$(command -v "$python")")/ray
port=6379
private=$(mktemp -d "${REFILLED_PRIVATE:-$HOME}/refilled-$SLURM_JOB_ID.XXXXXX") # on all nodes, for this user only
started=()
driver=
again=

finish() {
  trap - EXIT USR1 TERM
  for process in $driver "${started[@]}"; do # srun hands it on to its nodes
    kill -TERM "$process" 2>/dev/null || true
  done
  wait || true
  rm -rf "$private"
}
trap finish EXIT
trap 'exit 143' TERM
trap 'again=yes; kill -TERM "$driver" 2>/dev/null || true' USR1

# The token is in a file, never in an argument or a log; srun hands its path on with the environment.
"$python" -c 'import secrets; print(secrets.token_hex(32), end="")' >"$private/token"
export RAY_AUTH_MODE=token RAY_AUTH_TOKEN_PATH=$private/token RAY_USAGE_STATS_ENABLED=0
export RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S=0 # nothing is left to drain when Ray ends with the job
unset RAY_ADDRESS

mapfile -t nodes < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
head_address=$(srun --nodes 1 --ntasks 1 --nodelist "${nodes[0]}" hostname --ip-address | awk '{print $1}')
common=(--block --temp-dir "/tmp/ray-$SLURM_JOB_ID" --num-cpus "${SLURM_CPUS_PER_TASK:-1}" --disable-usage-stats)
common+=(--object-manager-port 8076 --node-manager-port 8077 --dashboard-agent-grpc-port 8078)
common+=(--runtime-env-agent-port 8079 --metrics-export-port 8080 --dashboard-agent-listen-port 52365)
common+=(--min-worker-port 10002 --max-worker-port 19999)
if [[ -n ${SLURM_GPUS_ON_NODE:-} ]]; then
  common+=(--num-gpus "$SLURM_GPUS_ON_NODE")
fi

start_node() { # a Ray node in a step of its own that lets the driver have the same CPUs
  local node=$1
  shift
  srun --overlap --nodes 1 --ntasks 1 --nodelist "$node" "$ray" start "${common[@]}" "$@" &
  started+=($!)
}

start_node "${nodes[0]}" --head --port "$port" --node-ip-address "$head_address" \
  --dashboard-host 127.0.0.1 --dashboard-port 8265 --ray-client-server-port 10001
for node in "${nodes[@]:1}"; do # they try again until the head is there
  start_node "$node" --address "$head_address:$port"
done
# A search without an autoscaler counts the nodes once; five minutes later it goes on with those that came.
"$python" - "$head_address:$port" "${#nodes[@]}" <<'EOF'
import sys, time, ray
until = time.monotonic() + 300
while True:
    try:
        if not ray.is_initialized():
            ray.init(address=sys.argv[1], log_to_driver=False, logging_level="ERROR")
        if sum(node["Alive"] for node in ray.nodes()) >= int(sys.argv[2]) or time.monotonic() > until:
            break
    except ConnectionError:
        if time.monotonic() > until:
            raise
    time.sleep(1)
EOF

# The driver is on the first node, where this script is, and which Slurm takes away only together with the job.
RAY_ADDRESS=$head_address:$port "$python" tune/search.py "$@" &
driver=$!
while true; do # a signal ends `wait` before the driver has ended
  code=0
  wait "$driver" || code=$?
  kill -0 "$driver" 2>/dev/null || break
done
driver=
if [[ $again == yes && $code -ne 0 ]]; then
  finish
  echo "slurm: the time limit is near; queued again." >&2
  exec scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"

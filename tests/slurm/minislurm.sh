#!/usr/bin/env bash
# A throw-away Slurm cluster on loopback: real daemons, several "nodes" on this machine, nothing outside DIR is touched.
#
#   minislurm.sh start DIR [NODES] [FAKE_GPUS_PER_NODE]   prints: export SLURM_CONF=...
#   minislurm.sh stop DIR
#
# Needs: apt-get install --no-install-recommends slurm-wlm munge. Seen with Slurm 22.05 (Debian 12) as root.
# MINISLURM_PYXIS=/path/pyxis_stub.so adds a stand-in for pyxis (pyxis_stub.c).
set -euo pipefail
cmd=${1:?start or stop}
dir=$(realpath -m "${2:?directory}")
nodes=${3:-2}
gpus=${4:-0}

free_port() { python3 -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])'; }

write_configuration() {
  local me host cpus memory i
  me=$(id -un) host=$(hostname -s) cpus=$(nproc)
  memory=$(($(awk '/MemTotal/ {print int($2 / 1024)}' /proc/meminfo) * 9 / 10))
  # cred_expire: else a requeued job waits for two minutes. config_overrides: nodes may have more CPUs than the machine.
  # linuxproc and task/none: no cgroups. KillWait: a job that ignores SIGTERM must not hold up a test.
  cat > "$dir/slurm.conf" << C
ClusterName=mini
SlurmctldHost=$host(127.0.0.1)
SlurmctldPort=$(free_port)
SlurmUser=$me
SlurmdUser=$me
AuthType=auth/munge
AuthInfo=socket=$dir/munge/sock,cred_expire=5
CredType=cred/munge
StateSaveLocation=$dir/state
SlurmdSpoolDir=$dir/spool.%n
SlurmctldPidFile=$dir/slurmctld.pid
SlurmdPidFile=$dir/slurmd.%n.pid
SlurmctldLogFile=$dir/log/slurmctld.log
SlurmdLogFile=$dir/log/slurmd.%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SwitchType=switch/none
MpiDefault=none
ReturnToService=2
SlurmctldTimeout=30
SlurmdTimeout=30
InactiveLimit=0
KillWait=5
MinJobAge=600
JobRequeue=1
SchedulerParameters=sched_interval=1,batch_sched_delay=0,bf_interval=1,bf_resolution=1
SchedulerType=sched/backfill
SlurmdParameters=config_overrides
GresTypes=gpu
C
  for i in $(seq 1 "$nodes"); do
    echo "NodeName=n$i NodeHostname=$host NodeAddr=127.0.0.1 Port=$(free_port) CPUs=$((cpus > 4 ? cpus : 4))" \
      "RealMemory=$memory Gres=gpu:$gpus State=UNKNOWN" >> "$dir/slurm.conf"
  done
  echo "PartitionName=debug Nodes=ALL Default=YES MaxTime=INFINITE State=UP OverSubscribe=NO" >> "$dir/slurm.conf"
  if [ "$gpus" -gt 0 ]; then # Slurm wants device nodes: further /dev/null's will do (needs root)
    for i in $(seq 0 $((gpus - 1))); do [ -e "$dir/gpu/nvidia$i" ] || mknod -m 666 "$dir/gpu/nvidia$i" c 1 3; done
    echo "NodeName=n[1-$nodes] Name=gpu File=$dir/gpu/nvidia[0-$((gpus - 1))]" > "$dir/gres.conf"
  fi
  if [ -n "${MINISLURM_PYXIS:-}" ]; then
    echo "required $MINISLURM_PYXIS" > "$dir/plugstack.conf"
    echo "PlugStackConfig=$dir/plugstack.conf" >> "$dir/slurm.conf"
  fi
}

start() {
  local i idle
  mkdir -p "$dir"/{munge,state,log,gpu}
  for i in $(seq 1 "$nodes"); do mkdir -p "$dir/spool.n$i"; done
  chmod 0755 "$dir"
  chmod 0711 "$dir/munge"
  # A key and a socket of its own: /etc/munge and /run/munge stay as they are.
  head -c 128 /dev/urandom > "$dir/munge/key"
  chmod 0400 "$dir/munge/key"
  munged --force --key-file="$dir/munge/key" --socket="$dir/munge/sock" --pid-file="$dir/munge/pid" \
    --log-file="$dir/munge/log" --seed-file="$dir/munge/seed" --num-threads=2
  write_configuration
  export SLURM_CONF=$dir/slurm.conf
  slurmctld -f "$SLURM_CONF"
  for i in $(seq 1 "$nodes"); do slurmd -f "$SLURM_CONF" -N "n$i"; done
  for _ in $(seq 120); do
    idle=$(timeout 5 sinfo -h -N -t idle -o %N 2>/dev/null | wc -l)
    [ "$idle" -ge "$nodes" ] && break
    sleep .25
  done
  if [ "$idle" -lt "$nodes" ]; then
    { timeout 5 sinfo -N -o '%N %T %E'; tail -n 5 "$dir"/log/*.log; } >&2 || true
    echo "only $idle of $nodes nodes came up" >&2
    exit 1
  fi
  echo "export SLURM_CONF=$SLURM_CONF"
}

stop() {
  local file pid
  export SLURM_CONF=$dir/slurm.conf
  timeout 10 scancel -u "$(id -un)" 2>/dev/null || true
  for _ in $(seq 60); do [ -z "$(timeout 5 squeue -h 2>/dev/null)" ] && break; sleep .25; done
  for file in "$dir"/slurmd.*.pid "$dir/slurmctld.pid" "$dir/munge/pid"; do
    [ -s "$file" ] || continue
    pid=$(cat "$file")
    kill "$pid" 2>/dev/null || continue
    for _ in $(seq 40); do kill -0 "$pid" 2>/dev/null || break; sleep .1; done
  done
}

case $cmd in
  start) start ;;
  stop) stop ;;
  *) echo "minislurm.sh: start or stop, not $cmd" >&2; exit 2 ;;
esac

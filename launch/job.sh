# ---------------------------------------------------------------------------------------------------------------------
# From here on every script is the same (launch/job.sh of hymba_train).
#
# Training ends in one of five ways. It finished: the job ends with 0. It saved and stopped because the time limit is
# near: the job requeues itself, or its successor in the chain takes over. Somebody else stopped it (a file
# $RUN_DIR/stop_requested), or a guard ended it: the job ends. A rank or a node failed: nodes are checked and training
# starts again from the newest checkpoint. Starts that bring no new checkpoint are counted, so nothing loops for ever.

STOPPED_EARLY=75 # exit code: saved, not finished
GUARD_STOP=76    # a guard ended the run; started again unchanged it would end again

# torchrun keeps one store over its own restarts, in which a restarted rank would find the addresses of dead ones.
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1

job=${SLURM_ARRAY_JOB_ID:+${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID}
job=${job:-$SLURM_JOB_ID}
restart=${SLURM_RESTART_COUNT:-0}
attempt=0
mapfile -t all_nodes < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
bad_nodes=()
stop_asked=''
too_late=''
mkdir -p "$LAUNCH_DIR/logs"

say() { echo "[$(date '+%F %T')] $*"; }

# Wait for a background process to end; a signal that is trapped meanwhile does not end the waiting.
wait_for() {
  local code
  while :; do
    wait "$1"
    code=$?
    kill -0 "$1" 2>/dev/null || return "$code"
    [[ -n $too_late ]] && return "$code"
  done
}

newest_checkpoint() {
  local name=none
  { read -r name < "$RUN_DIR/checkpoints/latest"; } 2>/dev/null
  echo "${name:-none}"
}

# Slurm signals this script alone (--signal=B:USR1). Handed on as a signal it would kill torchrun, and the ranks with
# it; the training loop looks for this file instead, and stops on all ranks after the step in which it is found.
ask_to_stop() {
  stop_asked=$1
  say "$1: asking training to save and stop"
  local temporary="$RUN_DIR/.stop_requested.$job"
  printf '%s\n' "$1" > "$temporary" && mv -f "$temporary" "$RUN_DIR/stop_requested"
  # If training does not react, use the last seconds to requeue all the same: it then starts from an older checkpoint.
  (( SIGNAL_SECONDS > 60 )) && { sleep $((SIGNAL_SECONDS - 30)) && kill -USR2 $$; } 2>/dev/null &
}
trap 'ask_to_stop "time limit"' USR1
trap 'ask_to_stop "job is ended"' TERM
trap 'too_late=yes' USR2

# Put the job back into the queue, without the nodes that were found bad, if it may still do so.
come_back() {
  trap '' USR1 USR2 TERM
  if [[ $stop_asked == 'job is ended' ]]; then
    say "ended by scancel or preemption; Slurm decides whether it comes back"
  elif (( restart >= MAX_REQUEUES )); then
    (( MAX_REQUEUES > 0 )) && say "not requeued: max_requeues=$MAX_REQUEUES reached; submit again to go on"
  elif scontrol requeue "$job"; then
    say "requeued ($((restart + 1)) of at most $MAX_REQUEUES times)"
    exclude_bad_nodes
  else
    say "scontrol requeue failed; submit again to go on"
  fi
  exit "$STOPPED_EARLY"
}

exclude_bad_nodes() {
  (( ${#bad_nodes[@]} )) || return 0
  local excluded wanted
  excluded=$(scontrol show job "$job" | grep -o 'ExcNodeList=[^ ]*' | head -n 1 | cut -d= -f2)
  excluded=$(IFS=,; echo "${bad_nodes[*]}")$([[ -n $excluded && $excluded != '(null)' ]] && echo ",$excluded")
  # As many nodes less, or a job in a small partition would wait for ever.
  wanted=$((${#all_nodes[@]} - ${#bad_nodes[@]}))
  (( wanted < NODES )) && wanted=$NODES
  for _ in 1 2 3 4 5 6 7 8 9 10; do # possible once the job is pending again
    scontrol update JobId="$job" ExcNodeList="$excluded" NumNodes="$wanted" NumTasks="$wanted" 2>/dev/null \
      && { say "excluded from now on: $excluded"; return; }
    sleep 0.5
  done
  say "could not exclude $excluded"
}

# Refuse a start when the last NO_PROGRESS_LIMIT starts were from the same checkpoint.
count_start() {
  local step same
  step=$(newest_checkpoint)
  same=$(tail -n "$NO_PROGRESS_LIMIT" "$LAUNCH_DIR/starts" 2>/dev/null | awk -v s="$step" '$1 == s' | wc -l)
  if (( same >= NO_PROGRESS_LIMIT )); then
    say "giving up: $same starts in a row from checkpoint $step brought no new one; see $LAUNCH_DIR/logs"
    exit 1
  fi
  echo "$step job $job restart $restart attempt $attempt $(date '+%FT%T%z')" >> "$LAUNCH_DIR/starts"
  say "start from checkpoint $step"
}

# Choose $NODES healthy nodes into the array nodes. Each node writes "ok CLOCK" or "bad CLOCK REASON" into a file.
choose_nodes() {
  nodes=()
  if [[ $HEALTH_CHECK != yes ]]; then
    nodes=("${all_nodes[@]:0:NODES}")
    return 0
  fi
  local results="$LAUNCH_DIR/health/$job.$restart.$attempt" node before after pids=() pid verdict clock reason
  mkdir -p "$results"
  before=$(date +%s)
  for node in "${all_nodes[@]}"; do # a step each: a node that is down or hangs holds up no other
    timeout -k 10 "$HEALTH_CHECK_SECONDS" srun --nodes=1 --ntasks=1 --nodelist="$node" --output="$results/$node.log" \
      "${IN_ENVIRONMENT[@]}" "$PYTHON" -m launch.node_check --result "$results/$node" "${NODE_CHECK[@]}" < /dev/null &
    pids+=("$!")
  done
  for pid in "${pids[@]}"; do wait_for "$pid"; done
  after=$(date +%s)
  bad_nodes=()
  for node in "${all_nodes[@]}"; do
    verdict='' clock=0 reason=''
    { read -r verdict clock reason < "$results/$node"; } 2>/dev/null
    if [[ -z $verdict ]]; then
      verdict=bad reason="it gave no answer; see $results/$node.log"
    elif (( clock < before - MAX_CLOCK_SKEW || clock > after + MAX_CLOCK_SKEW )); then
      verdict=bad reason="its clock is more than $MAX_CLOCK_SKEW s away from that of $(hostname)"
    fi
    if [[ $verdict == ok ]]; then
      (( ${#nodes[@]} < NODES )) && nodes+=("$node")
    else
      bad_nodes+=("$node")
      say "node $node is left out: $reason"
    fi
  done
  (( ${#nodes[@]} == NODES ))
}

# An address of node $1 that the other nodes can reach.
head_address() {
  local address
  (( NODES == 1 )) && { echo 127.0.0.1; return; }
  if [[ -n $HEAD_ADDRESS_COMMAND ]]; then
    bash -c "$HEAD_ADDRESS_COMMAND" head_address "$1"
    return
  fi
  address=$(scontrol show node "$1" | grep -o 'NodeAddr=[^ ]*' | cut -d= -f2)
  if [[ -z $address ]] || ! getent hosts "$address" > /dev/null; then
    address=$(srun --nodes=1 --ntasks=1 --nodelist="$1" hostname --ip-address < /dev/null \
      | tr ' ' '\n' | grep -v '^127\.' | head -n 1)
  fi
  echo "${address:-$1}"
}

# One torchrun on each node. Its own restarts are off: the loop below starts again, on checked nodes.
run_training() {
  local address port list
  address=$(head_address "${nodes[0]}")
  port=$((20000 + (SLURM_JOB_ID * 10 + attempt) % 10000)) # a fixed port would clash with another job's on a shared node
  list=$(IFS=,; echo "${nodes[*]}")
  say "training on $list, rendezvous at $address:$port"
  # No --kill-on-bad-exit, which would cut a checkpoint that other ranks are publishing; --wait ends them soon enough.
  srun --nodes="$NODES" --ntasks="$NODES" --ntasks-per-node=1 --nodelist="$list" "${SRUN_OPTIONS[@]}" \
    --kill-on-bad-exit=0 --wait="$KILL_GRACE_SECONDS" \
    --output="$LAUNCH_DIR/logs/$job.$restart.$attempt-%n-%N.log" --open-mode=append "${IN_ENVIRONMENT[@]}" \
    "$PYTHON" -m torch.distributed.run --nnodes="$NODES" --nproc-per-node="$PROCESSES_PER_NODE" --max-restarts=0 \
    --rdzv-backend=c10d --rdzv-id="$job.$restart.$attempt" --rdzv-endpoint="$address:$port" \
    -m hymba_train train --frozen "$RUN_DIR/resolved.yaml" < /dev/null &
  wait_for "$!"
}

say "job $job, restart $restart, on $SLURM_JOB_NODELIST: $RUN_DIR"
while :; do
  attempt=$((attempt + 1))
  rm -f "$RUN_DIR/stop_requested" "$RUN_DIR/outcome" # of an earlier start
  count_start
  choose_nodes || { say "only ${#nodes[@]} of $NODES nodes are good; more spare_nodes would help"; come_back; }
  [[ -n $stop_asked ]] && come_back
  run_training
  code=$?
  outcome='' step='' reason=''
  { read -r outcome step reason < "$RUN_DIR/outcome"; } 2>/dev/null
  case $outcome in
    finished)
      say "finished at step $step"
      exit 0
      ;;
    stopped)
      say "saved and stopped at step $step: $reason"
      [[ -n $stop_asked || $reason == signal* ]] && come_back
      exit 0 # the user asked for it
      ;;
    failed)
      say "ended by a guard at step $step: $reason"
      exit "$GUARD_STOP"
      ;;
  esac
  [[ -n $too_late ]] && { say "training did not stop in time"; come_back; }
  [[ -n $stop_asked ]] && { say "training failed (srun: $code) after it was asked to stop"; come_back; }
  say "training failed (srun: $code); its messages are in $LAUNCH_DIR/logs/$job.$restart.$attempt-*.log"
  (( attempt > MAX_RESTARTS )) && come_back
done

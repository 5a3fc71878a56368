#!/usr/bin/env bash
@SBATCH@
#
# One training run under Slurm, on one node or many: one task per GPU. Written by launch/slurm/submit.py.
#
# Ahead of the time limit Slurm sends USR1 to this script, and on preemption with grace TERM. It is passed on to the
# ranks; they save and leave with 75, and then this job puts itself back into the queue and later goes on from there.
# Any other failure ends the job as failed. No ssh: srun starts the tasks.
set -u

@VALUES@

signalled='' caught='' step=''
pass_on() {
  echo "$(date '+%F %T') $1: asking the ranks to save"
  signalled=$1 caught=yes
  [ -z "$step" ] || kill -s "$1" "$step"
}
trap 'pass_on USR1' USR1
trap 'pass_on TERM' TERM

if [ -n "${SLURM_ARRAY_TASK_ID:-}" ]; then
  echo "error: this is a job array, and its tasks would train in one folder, $RUN; submit each run by itself" >&2
  exit 2
fi

hosts=$(scontrol show hostnames "$SLURM_JOB_NODELIST")
TRAINER_HOSTS=$(paste -s -d , <<<"$hosts")
MASTER_ADDR=${TRAINER_HOSTS%%,*}
# Another one for each job that may share the node, below the ports that the kernel gives to outgoing connections.
MASTER_PORT=$((15000 + SLURM_JOB_ID % 15000))
export TRAINER_HOSTS MASTER_ADDR MASTER_PORT PYTHONUNBUFFERED=1
# The code of the folder that the job was submitted from, whatever is installed.
export PYTHONPATH=$ROOT${PYTHONPATH:+:$PYTHONPATH}

newest() { cat "$RUN/latest" 2>/dev/null; }
started_from=$(newest)
echo "$(date '+%F %T') job $SLURM_JOB_ID, start $((${SLURM_RESTART_COUNT:-0} + 1)), on $TRAINER_HOSTS," \
  "from ${started_from:-the beginning}; logs: $RUN/slurm/"

# As soon as one task fails the others are ended: they would wait for it.
srun --kill-on-bad-exit=1 --distribution=block --open-mode=append --output="$RUN/slurm/%j-rank-%t.log" \
  "${SRUN[@]}" "${COMMAND[@]}" &
step=$!
# A signal that came before is told now.
[ -z "$signalled" ] || kill -s "$signalled" "$step"
while :; do
  caught=''
  wait "$step"
  code=$?
  # A signal ends the waiting, not the step.
  [ -n "$caught" ] && [ "$code" -gt 128 ] || break
done
echo "$(date '+%F %T') ended with $code at ${signalled:-its own time}, newest checkpoint: $(newest)"

# 75: saved, go on. 138 and 143: a task that was signalled before Python had started.
case "$signalled $code" in
  "USR1 75" | "TERM 75" | "USR1 138" | "TERM 143") ;;
  *) exit "$code" ;;
esac
# A cancelled job gets signals too, but is to stay cancelled.
state=$(squeue --noheader --jobs "$SLURM_JOB_ID" --format %T)
[ "$state" = RUNNING ] || exit "$code"

idle_file=$RUN/slurm/$SLURM_JOB_ID.no-progress
if [ "$(newest)" = "$started_from" ]; then
  echo x >>"$idle_file"
else
  rm -f "$idle_file"
fi
if [ -f "$idle_file" ] && [ "$(wc -l <"$idle_file")" -ge "$STARTS_WITHOUT_PROGRESS" ]; then
  echo "error: $STARTS_WITHOUT_PROGRESS starts in a row ended without a newer checkpoint than ${started_from:-none}:" \
    "not put back into the queue; give it more time, or a larger lead (--save-seconds)" >&2
  exit "$code"
fi
echo "$(date '+%F %T') putting job $SLURM_JOB_ID back into the queue"
scontrol requeue "$SLURM_JOB_ID" || exit "$code"

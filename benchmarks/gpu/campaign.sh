#!/usr/bin/env bash
# What a GPU is asked in one short loan of it, the most valuable first: bash benchmarks/gpu/campaign.sh PHASE
#
#   1  facts, doctor, the time of a training step, errors and latency of folded students     (at most 7 minutes)
#   2  gate, bench and serve on the GPU; then cells of the first column of the table          (at most 5 minutes)
#
# Each stage has its own limit, and its result is written before the next one begins; a stage for which something is
# missing, or for which no time is left, says so. Phase 2 continues the cells of an earlier call.
#
#   OUT      results, small enough to be copied (build/campaign/out)
#   KEEP     runs and logs, which stay on the machine (build/campaign/keep)
#   PY       the Python (python3); TRAIN its training commands ("$PY -m training"), KDEXPORT the others ("$PY -m kdexport")
#   BUDGET   seconds of this call (420 and 300); SLOWER multiplies it and every limit, for a busy machine (1)
#   BUNDLE   a bundle with an ONNX target (dist/quickstart)
#   DATA     the folder of CIFAR-100, TEACHER weights of resnet32x4: for the cells
#   EPOCHS   epochs of a cell (10); METHODS its methods
#   DRY=1    a device that runs no kernel: few steps, nothing checked, every result is meaningless
set -u
PHASE=${1:?usage: bash benchmarks/gpu/campaign.sh 1 or 2}
HERE=$(cd "$(dirname "$0")" && pwd) ROOT=$(cd "$HERE/../.." && pwd)
OUT=${OUT:-$ROOT/build/campaign/out} KEEP=${KEEP:-$ROOT/build/campaign/keep} PY=${PY:-python3} DRY=${DRY:-}
TRAIN=${TRAIN:-$PY -m training} KDEXPORT=${KDEXPORT:-$PY -m kdexport}
BUNDLE=${BUNDLE:-$ROOT/dist/quickstart} DATA=${DATA:-} TEACHER=${TEACHER:-}
EPOCHS=${EPOCHS:-10} METHODS=${METHODS:-plain kd average kdiffusion-multi-guide} PAIR=cifar100/resnet32x4-shufflenetv1
case $PHASE in 1) BUDGET=${BUDGET:-420} ;; 2) BUDGET=${BUDGET:-300} ;; *) echo "PHASE must be 1 or 2; got $PHASE" >&2; exit 2 ;; esac
SLOWER=${SLOWER:-1} BUDGET=$((BUDGET * ${SLOWER:-1}))
STEPS=300 STUDENTS=mobilenetv2:32,shufflenetv1:32,resnet18:32,mobilenetv2:224 PAIRS=12 EXTRA=()
if [ -n "$DRY" ]; then
  STEPS=4 STUDENTS=mobilenetv2:32 PAIRS=2 EXTRA=(--dry)
fi
export PYTHONUNBUFFERED=1 PYTHONPATH=$ROOT${PYTHONPATH:+:$PYTHONPATH} OMP_NUM_THREADS=${OMP_NUM_THREADS:-4}
mkdir -p "$OUT" "$KEEP/logs"
SUMMARY=$OUT/phase$PHASE.txt
say() { echo "[$SECONDS s] $*" | tee -a "$SUMMARY"; }

# stage NAME LIMIT COMMAND...: at most LIMIT seconds, and never beyond the budget of the call.
stage() {
  local name=$1 limit=$(($2 * SLOWER)) began=$SECONDS left=$((BUDGET - SECONDS)) code
  shift 2
  [ "$left" -lt "$limit" ] && limit=$left
  if [ "$limit" -lt 10 ]; then say "$name: left out, no time is left"; return; fi
  timeout --kill-after=5 "$limit" "$@" > "$KEEP/logs/$name.log" 2>&1
  code=$?
  [ "$code" -eq 124 ] && code="124 (its limit of $limit s)"
  say "$name: exit $code, $((SECONDS - began)) s: $(grep -v '^ *$' "$KEEP/logs/$name.log" | tail -n 1 | cut -c 1-200)"
  tar -czf "$OUT/logs$PHASE.tar.gz" -C "$KEEP/logs" .
}

phase1() {
  stage facts 30 bash -c 'nvidia-smi; nvidia-smi -q -d CLOCK,PERFORMANCE,POWER; nproc; free -g; which gcc; true'
  stage torch 40 $PY -c 'import torch; print(torch.__version__, torch.version.cuda, torch.backends.cudnn.version(), torch.cuda.get_device_name())'
  stage doctor 40 $KDEXPORT doctor
  local step=("$PY" "$HERE/step_time.py" --steps "$STEPS" --out "$OUT/step_time.jsonl" "${EXTRA[@]}")
  stage step-graph 60 "${step[@]}" --arms graph
  stage step-loop 60 "${step[@]}" --arms loop
  stage step-seeds 80 "${step[@]}" --arms graph --seeds 2,4
  stage folded 80 "$PY" "$HERE/folded_students.py" --students "$STUDENTS" --pairs "$PAIRS" --out "$OUT/folded_students.jsonl"
  # Compiling takes minutes, so it comes last.
  if [ -n "$DRY" ]; then say "step-compiled: left out in a dry run"; else stage step-compiled 200 "${step[@]}" --arms compiled; fi
}

serve_on_gpu() {
  $KDEXPORT serve "$BUNDLE" --provider cuda --port 8123 &
  local server=$! code=1
  for _ in $(seq 40); do
    if "$PY" -c 'import urllib.request as u; print(u.urlopen("http://127.0.0.1:8123/v2/health/ready", timeout=2).status)' 2> /dev/null; then code=0; break; fi
    kill -0 $server 2> /dev/null || break
    sleep 1
  done
  kill $server 2> /dev/null
  wait $server 2> /dev/null
  return $code
}

phase2() {
  if [ -d "$BUNDLE" ]; then
    stage gate-same 60 $KDEXPORT gate "$BUNDLE" --baseline "$BUNDLE" --clock gpu --json
    stage gate-unfolded 60 $KDEXPORT gate "$BUNDLE" --clock gpu --max-slowdown 5% --json
    stage bench 60 $KDEXPORT bench "$BUNDLE" --clock gpu --json
    stage serve 60 bash -c "$(declare -f serve_on_gpu); PY='$PY' KDEXPORT='$KDEXPORT' BUNDLE='$BUNDLE'; serve_on_gpu"
  else
    say "gate, bench, serve: left out, there is no bundle $BUNDLE (make quickstart)"
  fi
  if [ -z "$DATA" ] || [ -z "$TEACHER" ]; then say "cells: left out, DATA and TEACHER are not set"; return; fi
  # In one process: a small network does not fill a GPU.
  local method recipes=() count=0 limit=$((BUDGET - SECONDS - 5))
  for method in $METHODS; do recipes+=(--recipes "$PAIR/$method") count=$((count + 1)); done
  stage cells "$limit" $TRAIN table "${recipes[@]}" --parallel "$count" --runs "$KEEP/runs" --out "$OUT/cells.md" \
    --data "$DATA" --teacher-checkpoint "$TEACHER" --set train.epochs="$EPOCHS" --set train.schedule=cosine \
    --set train.warmup_epochs=0.5 --set distiller.ramp_epochs=0.5 --set train.compile=no ${DRY:+--set teacher.plausibility=reported}
  for method in $METHODS; do
    local lines=$KEEP/runs/$PAIR/$method/seed0/metrics.jsonl
    [ -f "$lines" ] && cp "$lines" "$OUT/cell-$method.jsonl"
    say "cell $method: $([ -f "$lines" ] && wc -l < "$lines" || echo 0) of $EPOCHS epochs"
  done
}

say "phase $PHASE, $BUDGET s${DRY:+, on a device that runs no kernel: no number means anything}"
"phase$PHASE"
say "phase $PHASE is done"

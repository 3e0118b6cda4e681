#!/usr/bin/env bash
# Train `liver-early` 6 and measure it beside version 4, on one CPU core; start it again to resume.
#   benchmarks/realism/liver_early/train.sh CT_DIR RUN VERSION_4_FOLDER
# Each step leaves RUN/NAME.done; a started training resumes from its last checkpoint. The packs and
# pictures in RUN hold parts of scans: mind their terms (README.md), and keep RUN out of the project.
set -euo pipefail
scans=$1 run=$2 old=$3
# on CPUs without AMX, bfloat16 takes 1.7 times as long
training=(--precision "${PRECISION:-32-true}")
. "$(dirname "${BASH_SOURCE[0]}")/../steps.sh"

patients() {  # patients NAME [OPTION...]: both generators beside the real tumours of all patients
  local name=$1
  shift
  "$python" -m benchmarks.realism.patients "$scans" --generator v4="$old" \
    --generator v6="$run/liver-early-6" -o "$run/results/$name" "$@"
}

step pack "$python" -m benchmarks.realism.liver_early.data "$scans" -o "$run"
step autoencoder train autoencoder "$run/autoencoder" "$run/autoencoder.npz" --steps 6000 \
  --save-every 100 --picture-every 2000
step denoiser train denoiser "$run/liver-early" "$run/tumours.npz" \
  --autoencoder "$run/autoencoder" --name liver-early --steps 2400 --transplant 0.8 \
  --brighter 0.35 --structure 0.3 --outlines annotated --tissue-high 245 \
  --patch-size 48 --save-every 100 --picture-every 500
step finish "$python" -m benchmarks.realism.liver_early.finish "$run/liver-early" \
  "$run/tumours.npz" -o "$run/liver-early-6"
for set in lits portal arterial; do
  step "reconstruction_$set" "$python" -m benchmarks.realism.reconstruction \
    "$run/measure_$set.npz" --generator v4="$old" --generator v6="$run/liver-early-6" \
    --tissue liver=1 tumour=2 -o "$run/results/reconstruction_$set"
done
step evaluate "$python" -m benchmarks.realism.evaluated "$run/measure_lits.npz" \
  --generator v4="$old" --generator v6="$run/liver-early-6" -o "$run/results/liver_early_6_evaluate"
step patients patients patients
step patients_early patients patients_early --size-mm 0 20
step card "$python" -m benchmarks.realism.liver_early.finish "$run/liver-early" \
  "$run/tumours.npz" -o "$run/liver-early-6" --results "$run/results"
echo "$(date '+%F %T') finished: see $run/results"

#!/usr/bin/env bash
# Train `lung` 3 and measure it beside version 2, on one CPU core; start it again to resume.
#   benchmarks/realism/lung/train.sh CT_DIR RUN VERSION_2_FOLDER [LIVER_EARLY_FOLDER]
# Each step leaves RUN/NAME.done; a started training resumes from its last checkpoint. The packs and
# pictures in RUN hold parts of scans: mind their terms (README.md), and keep RUN out of the project.
set -euo pipefail
scans=$1 run=$2 old=$3 start=${4:-liver-early}
training=(--preset lung --precision 32-true)
. "$(dirname "${BASH_SOURCE[0]}")/../steps.sh"

step pack "$python" -m benchmarks.realism.lung.data "$scans" -o "$run"
step autoencoder train autoencoder "$run/autoencoder" "$run/autoencoder.npz" --steps 1800 \
  --init "$start" --lr 0.001 --save-every 100 --picture-every 1000
step denoiser train denoiser "$run/lung" "$run/tumours.npz" --autoencoder "$run/autoencoder" \
  --name lung --steps 2500 --transplant 0.9 --brighter 0 --outlines annotated --patch-size 48 \
  --save-every 100 --picture-every 500
step finish "$python" -m benchmarks.realism.lung.finish "$run/lung" -o "$run/lung-3"
step evaluate "$python" -m benchmarks.realism.evaluated "$run/measure.npz" --generator v2="$old" \
  --generator v3="$run/lung-3" -o "$run/results/lung_3_evaluate"
echo "$(date '+%F %T') finished: see $run/results"

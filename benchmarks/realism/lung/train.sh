#!/usr/bin/env bash
# Train `lung` 3 and measure it beside version 2, on one CPU core; start it again to resume.
#   benchmarks/realism/lung/train.sh CT_DIR RUN [VERSION_2_FOLDER [LIVER_EARLY_FOLDER]]
# Each step leaves RUN/NAME.done; a started training resumes from its last checkpoint. The packs and
# pictures in RUN hold parts of scans: mind their terms (README.md), and keep RUN out of the project.
set -euo pipefail
scans=$1 run=$2 old=${3:-lung} start=${4:-liver-early}
python=${PYTHON:-python}
export OMP_NUM_THREADS=1
mkdir -p "$run/results"

step() {  # step NAME COMMAND...: once
  local name=$1
  shift
  [ -e "$run/$name.done" ] && return
  echo "$(date '+%F %T') $name"
  "$@"
  echo "$(date '+%F %T') $name done"
  touch "$run/$name.done"
}

train() {  # train STAGE FOLDER ...: resumes where there is a checkpoint
  local stage=$1 folder=$2
  shift 2
  local resume=()
  [ -e "$folder/checkpoint.pt" ] && resume=(--resume)
  "$python" -m tumorsynth.training."$stage" "$@" -o "$folder" --preset lung --workers 0 \
    --precision 32-true "${resume[@]}"
}

evaluate() {  # evaluate GENERATOR NAME: on a scan that no version has seen
  "$python" -m tumorsynth.training.evaluate "$1" "$run/measure.npz" --organ-label 1 \
    --tumor-label 2 >"$run/results/evaluate_$2.json"
}

step pack "$python" -m benchmarks.realism.lung.data "$scans" -o "$run"
step autoencoder train autoencoder "$run/autoencoder" "$run/autoencoder.npz" --steps 1800 \
  --init "$start" --lr 0.001 --save-every 100 --picture-every 1000
step denoiser train denoiser "$run/lung" "$run/tumours.npz" --autoencoder "$run/autoencoder" \
  --name lung --steps 2500 --transplant 0.9 --brighter 0 --outlines annotated --patch-size 48 \
  --save-every 100 --picture-every 500
step finish "$python" -m benchmarks.realism.lung.finish "$run/lung" -o "$run/lung-3"
step evaluate_v2 evaluate "$old" v2
step evaluate_v3 evaluate "$run/lung-3" v3
echo "$(date '+%F %T') finished: see $run/results"

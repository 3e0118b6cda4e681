# Steps of a recipe that can be started again; liver_early/train.sh and lung/train.sh source it.
# They set: run (its folder), training (an array: options of every training).
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
  "$python" -m tumorsynth.training."$stage" "$@" -o "$folder" --workers 0 \
    "${training[@]}" "${resume[@]}"
}

#!/usr/bin/env bash
# Trains the pipeline of this folder, without LPL: autoencoder, text encoders, denoiser; goes on where it was stopped.
# Usage: train_pipeline.sh WORK_FOLDER [PIPELINE_FOLDER]
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
work=${1:?folder for intermediate results}
data=$here/data/train

[ -f "$work/autoencoder/reconstructions.png" ] || python "$here/grow_autoencoder.py" --data "$data" --output_dir "$work/autoencoder"
[ -f "$work/untrained/model_index.json" ] || python "$here/../quickstart/build_pipeline.py" \
  --vae "$work/autoencoder" --data "$data" --output_dir "$work/untrained" --text_width 64 --text_steps 1000
"$here/train_denoiser.sh" "$work/untrained" "$data" "$work/denoiser"
python "$here/../quickstart/store_half.py" --pipeline "$work/denoiser" --output_dir "${2:-$here/pipeline}"

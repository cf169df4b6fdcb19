#!/usr/bin/env bash
# Trains the pipeline that the quickstart starts from, without LPL: autoencoder, text encoders, denoiser; goes on where it was stopped.
# Usage: train_pipeline.sh WORK_FOLDER [PIPELINE_FOLDER]
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
work=${1:?folder for intermediate results}

[ -f "$work/autoencoder/reconstructions.png" ] || python "$here/train_autoencoder.py" --output_dir "$work/autoencoder"
[ -f "$work/untrained/model_index.json" ] || python "$here/build_pipeline.py" --vae "$work/autoencoder" --output_dir "$work/untrained"
"$here/train_denoiser.sh" "$work/untrained" "$here/data/plain" "$work/denoiser"
python "$here/store_half.py" --pipeline "$work/denoiser" --output_dir "${2:-$here/pipeline}"

#!/usr/bin/env bash
# Trains the pipeline that the quickstart starts from, without LPL: data, autoencoder, text encoders, denoiser.
# Took 33 + 1 + 66 minutes on 2 busy cores, the denoiser on one of them. Usage: train_pipeline.sh WORK_FOLDER [PIPELINE_FOLDER]
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
work=${1:?folder for data and intermediate results}
result=${2:-$here/pipeline}

python "$here/prepare_data.py" --output_dir "$work/data"
[ -f "$work/autoencoder/reconstructions.png" ] || python "$here/train_autoencoder.py" --data "$work/data" --output_dir "$work/autoencoder"
python "$here/build_pipeline.py" --vae "$work/autoencoder" --data "$work/data" --output_dir "$work/untrained_pipeline"
"$here/train_denoiser.sh" "$work/untrained_pipeline" "$work/data" "$work/denoiser"
python "$here/store_half.py" --pipeline "$work/denoiser" --output_dir "$result"

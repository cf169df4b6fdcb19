#!/usr/bin/env bash
# Prepares the study: pictures in three parts, an autoencoder, a feature network, the untrained model; and measures the
# best values that the study could reach.
# Usage: prepare.sh [STUDY_FOLDER]
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
study=${1:-study}

python "$here/prepare_data.py" --output_dir "$study/data"
[ -f "$study/features.safetensors" ] || python "$here/features.py" \
  --data "$study/data/features" --held_out "$study/data/reference" --output "$study/features.safetensors"
[ -f "$study/autoencoder/reconstructions.png" ] || python "$here/../quickstart/train_autoencoder.py" \
  --data "$study/data/train" --output_dir "$study/autoencoder" --channels 24 40 80 --steps 8000 --max_minutes 600
python "$here/build_pipeline.py" --vae "$study/autoencoder" --output_dir "$study/untrained"
[ -f "$study/checks/floor.json" ] || PYTHONPATH="$here/../.." python "$here/floor.py" --study "$study"

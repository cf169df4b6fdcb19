#!/usr/bin/env bash
# The quickstart: with the latent perceptual loss, the shipped pipeline learns emoji of people with another skin tone.
# Usage: finetune.sh OUTPUT STEPS [MORE FLAGS]
set -euo pipefail
here=$(dirname "$0")
HF_HUB_OFFLINE=1 accelerate launch --num_processes 1 --num_machines 1 --mixed_precision no --dynamo_backend no \
  --num_cpu_threads_per_process "${OMP_NUM_THREADS:-$(getconf _NPROCESSORS_ONLN)}" \
  "$here/../../train_text_to_image_lpl.py" \
  --pretrained_model_name_or_path "$here/pipeline" --train_data_dir "$here/data/toned" --output_dir "$1" \
  --resolution 96 --max_sequence_length 4 --proportion_empty_prompts 0.1 \
  --center_crop --cache_latents --cache_text_embeddings --data_cache_dir "$1-cache" \
  --lpl_weight auto:0.2 --train_batch_size 16 --max_train_steps "$2" \
  --learning_rate 2e-4 --lr_scheduler cosine --lr_warmup_steps 20 --use_ema --ema_decay 0.99 --seed 1 \
  --validation_prompts "father christmas" "thumbs up sign" "woman, rocket" "man, graduation cap" "guardsman, man" "mage, man" "ear" "haircut" \
  --validation_steps "$2" --validation_guidance_scale 2.0 --checkpointing_steps "$2" "${@:3}"

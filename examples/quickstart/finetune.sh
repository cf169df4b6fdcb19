#!/usr/bin/env bash
# The quickstart: fine-tunes the shipped pipeline with the latent perceptual loss.
# Usage: finetune.sh DATA OUTPUT STEPS [MORE FLAGS]
set -euo pipefail
here=$(dirname "$0")
HF_HUB_OFFLINE=1 accelerate launch --num_processes 1 --num_machines 1 --mixed_precision no --dynamo_backend no \
  --num_cpu_threads_per_process "$(getconf _NPROCESSORS_ONLN)" \
  "$here/../../train_text_to_image_lpl.py" \
  --pretrained_model_name_or_path "$here/pipeline" --train_data_dir "$1" --output_dir "$2" \
  --resolution 64 --max_sequence_length 16 --proportion_empty_prompts 0.1 \
  --lpl_weight auto:0.2 --train_batch_size 16 --max_train_steps "$3" \
  --learning_rate 2e-4 --lr_scheduler cosine --lr_warmup_steps 20 --use_ema --ema_decay 0.99 --seed 1 \
  --validation_prompts "a photo of a tabby cat" "an astronaut in an orange space suit" "a cup of coffee on a saucer" \
  "a texture of gravel" "a wall of bricks" "old coins on a dark cloth" "the retina of a human eye" "distant galaxies in deep space" \
  --validation_steps "$3" --validation_guidance_scale 2.0 --checkpointing_steps "$3" "${@:4}"

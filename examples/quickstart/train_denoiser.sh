#!/usr/bin/env bash
# Trains the denoiser with the training script and the plain flow-matching loss, without LPL.
# Usage: train_denoiser.sh UNTRAINED_PIPELINE DATA OUTPUT [MORE FLAGS]; resumes where it was interrupted.
set -euo pipefail
HF_HUB_OFFLINE=1 accelerate launch --num_processes 1 --num_machines 1 --mixed_precision bf16 --dynamo_backend no \
  --num_cpu_threads_per_process "${OMP_NUM_THREADS:-$(getconf _NPROCESSORS_ONLN)}" \
  "$(dirname "$0")/../../train_text_to_image_lpl.py" \
  --pretrained_model_name_or_path "$1" --train_data_dir "$2" --output_dir "$3" \
  --lpl_weight 0 --resolution 96 --max_sequence_length 4 --proportion_empty_prompts 0.1 \
  --center_crop --cache_latents --cache_text_embeddings --data_cache_dir "$3-cache" \
  --train_batch_size 32 --max_train_steps 16000 --learning_rate 1e-3 --lr_scheduler cosine --lr_warmup_steps 200 \
  --adam_weight_decay 0.01 --use_ema --ema_decay 0.999 --seed 0 --report_to none --logging_steps 50 \
  --validation_prompts "red apple" "cat face" "automobile" "grinning face" "tulip" "guitar" "house building" "penguin" \
  --validation_steps 2000 --validation_guidance_scale 2.0 \
  --checkpointing_steps 500 --checkpoints_total_limit 1 --resume_from_checkpoint latest "${@:4}"

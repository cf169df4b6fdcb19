#!/usr/bin/env bash
# A preemptible Slurm job: when it is stopped, the training saves, the job is requeued, and the training resumes.
# Usage: sbatch examples/slurm.sh --pretrained_model_name_or_path PIPELINE --train_data_dir IMAGES --output_dir RUN ...
#SBATCH --job-name=lpl
#SBATCH --nodes=1
#SBATCH --gpus-per-node=4
#SBATCH --time=04:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --signal=USR1@300
# Five minutes before the end each process of the step gets SIGUSR1, saves after its step, and exits with code 75.
# torchrun is not used, since it would end the workers before they have saved. Each process is one task instead.
set -uo pipefail
export MASTER_ADDR=127.0.0.1 MASTER_PORT=$((20000 + SLURM_JOB_ID % 20000)) WORLD_SIZE=${SLURM_GPUS_ON_NODE:-1}
srun --ntasks="$WORLD_SIZE" --kill-on-bad-exit=0 --wait=120 bash -c \
  'RANK=$SLURM_PROCID LOCAL_RANK=$SLURM_LOCALID exec python train_text_to_image_lpl.py --resume_from_checkpoint latest "$@"' \
  job "$@"
code=$?
if [ "$code" -eq 75 ]; then
  scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"

#!/usr/bin/env bash
# A preemptible Slurm job on one or several nodes: when it is stopped, the training saves, the job is requeued, and the
# training resumes, also on another number of nodes or GPUs if the images per step stay the same.
# Usage: sbatch [--nodes 4] examples/slurm.sh --pretrained_model_name_or_path PIPELINE --train_data_dir IMAGES ...
# The images, the output folder and the cache of the Hub have to be on disks that all nodes see.
# For another number of GPUs per node, give both: sbatch --gpus-per-node 8 --ntasks-per-node 8 examples/slurm.sh ...
# With the model in shards (FSDP2): sbatch --export=ALL,ACCELERATE_USE_FSDP=true,FSDP_VERSION=2 examples/slurm.sh ...
#SBATCH --job-name=lpl
#SBATCH --nodes=1
#SBATCH --gpus-per-node=4
#SBATCH --ntasks-per-node=4
#SBATCH --cpus-per-task=8
#SBATCH --time=04:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --signal=USR1@300
# Five minutes before the end each process of the step gets SIGUSR1, saves after its step, and exits with code 75.
# torchrun is not used, since it would end the workers before they have saved. Each process is one task instead.
set -uo pipefail
MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
export MASTER_ADDR MASTER_PORT=$((20000 + SLURM_JOB_ID % 20000))
tasks=${SLURM_GPUS_ON_NODE:-1}
# srun does not take the number of cores from the job. The tasks of a node share them all: LOCAL_WORLD_SIZE says how
# many loaders divide them.
export WORLD_SIZE=$((tasks * SLURM_JOB_NUM_NODES)) LOCAL_WORLD_SIZE=$tasks
srun --ntasks="$WORLD_SIZE" --ntasks-per-node="$tasks" --cpus-per-task="${SLURM_CPUS_PER_TASK:-1}" --cpu-bind=none \
  --kill-on-bad-exit=0 --wait=120 bash -c \
  'RANK=$SLURM_PROCID LOCAL_RANK=$SLURM_LOCALID exec python train_text_to_image_lpl.py --resume_from_checkpoint latest "$@"' \
  job "$@"
code=$?
if [ "$code" -eq 75 ]; then
  scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"

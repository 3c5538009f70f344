#!/bin/bash
# sbatch configs/slurm_two_nodes.sh      (from the project's folder, which both machines must see)
#
# Trains both methods one after the other on two machines, one whole copy of the model on each GPU (DDP).
# Change: the GPUs of a machine (twice), the time, and how the environment is activated on your cluster.
#SBATCH --job-name=lora-or-full
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=4
#SBATCH --cpus-per-task=16
#SBATCH --time=24:00:00
#SBATCH --signal=TERM@120

set -euo pipefail
GPUS=4
source .venv/bin/activate
first=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
for script in 2_lora_finetuning.py 3_full_finetuning.py; do
    # after an interruption, `sbatch` of the same file goes on from the last checkpoint
    srun --kill-on-bad-exit=1 bash -c "accelerate launch --config_file configs/accelerate/two_nodes.yaml \
        --num_machines $SLURM_NNODES --num_processes $((SLURM_NNODES * GPUS)) --machine_rank \$SLURM_PROCID \
        --main_process_ip $first $script"
done

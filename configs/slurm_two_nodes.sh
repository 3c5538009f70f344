#!/bin/bash
# sbatch configs/slurm_two_nodes.sh
#
# Trains LoRA and then the full model on two nodes; step 1 has prepared the data already (python 1_prepare_dataset.py).
# Submitted again, it goes on from the last checkpoint. Change the #SBATCH lines and those that say "change".
#SBATCH --job-name=lora-or-full
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=4
#SBATCH --cpus-per-task=32
#SBATCH --time=12:00:00
set -euo pipefail

GPUS=4                               # change: as in --gpus-per-node above
SHARED="/shared/$USER/lora-or-full"  # change: a folder that both nodes see, with data/ in it
source "$HOME/venv/bin/activate"     # change: where requirements.txt is installed
cd "$SLURM_SUBMIT_DIR"               # the project's folder, which both nodes see

HEAD=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
PORT=$((20000 + SLURM_JOB_ID % 10000))  # so that two jobs on a node do not meet
export GPUS HEAD PORT

# One task a node: accelerate's launcher, which starts a process for each GPU. SLURM_NODEID is known in the task only.
launch() {
    srun --kill-on-bad-exit=1 bash -c 'accelerate launch \
        --config_file configs/accelerate/two_nodes.yaml \
        --num_machines "$SLURM_NNODES" --num_processes $((SLURM_NNODES * GPUS)) \
        --machine_rank "$SLURM_NODEID" --main_process_ip "$HEAD" --main_process_port "$PORT" "$@"' launch "$@"
}

launch 2_lora_finetuning.py --data_dir "$SHARED/data" --output_dir "$SHARED/lora_model"
launch 3_full_finetuning.py --data_dir "$SHARED/data" --output_dir "$SHARED/full_model"

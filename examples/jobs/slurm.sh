#!/bin/bash
# 32 ranks on 4 node(s), openmpi; from `mpizero job slurm`. Submit with: sbatch examples/jobs/slurm.sh
#SBATCH --job-name=train
#SBATCH --nodes=4
#SBATCH --ntasks-per-node=8
#SBATCH --cpus-per-task=8
#SBATCH --time=04:00:00
#SBATCH --output=%x-%j.out
#SBATCH --open-mode=append
#SBATCH --requeue
# At least so many seconds before the end every rank gets it, to save and leave.
#SBATCH --signal=USR1@120

export OMP_NUM_THREADS=8
export SRUN_CPUS_PER_TASK=8

srun --mpi=pmix --cpu-bind=cores \
    python examples/train_gpt.py --strategy zero2 --checkpoint-dir run-train --checkpoint-every 500 --resume
status=$?
if [ "$status" -eq 75 ]; then # saved, and not done
    exec scontrol requeue "$SLURM_JOB_ID"
fi
exit "$status"

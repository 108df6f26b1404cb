#!/bin/bash
# Train on four nodes for as long as it takes: the job saves before its time is over, and requeues
# itself. Submit with `sbatch examples/jobs/slurm.sh`, from the project's folder.
#
#SBATCH --job-name=train
#SBATCH --nodes=4
#SBATCH --ntasks-per-node=8
#SBATCH --cpus-per-task=8
#SBATCH --time=04:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
# Two minutes before the end, and before a preemption, every rank gets SIGUSR1.
#SBATCH --signal=USR1@120

export OMP_NUM_THREADS=${SLURM_CPUS_PER_TASK:-1}
export SRUN_CPUS_PER_TASK=$OMP_NUM_THREADS # which srun does not take over by itself, from 22.05 on

srun --cpu-bind=cores python examples/train_gpt.py \
    --strategy zero2 --checkpoint-dir "run-${SLURM_JOB_NAME:-train}" --checkpoint-every 500 --resume
status=$?

if [ "$status" -eq 75 ]; then # saved, and not done
    exec scontrol requeue "$SLURM_JOB_ID"
fi
exit "$status"

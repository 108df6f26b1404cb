#!/bin/bash
# Train on four nodes for as long as it takes: the job saves before its time is over, and submits
# itself again. Submit with `qsub examples/jobs/pbs.sh`, from the project's folder.
#
#PBS -N train
#PBS -l select=4:ncpus=64:mpiprocs=8:ompthreads=8
#PBS -l walltime=04:00:00

cd "$PBS_O_WORKDIR" || exit 1

# The time that is left mpizero asks qstat for; it saves two minutes before the end.
mpiexec python examples/train_gpt.py \
    --strategy zero2 --checkpoint-dir run-train --checkpoint-every 500 --resume
status=$?

if [ "$status" -eq 75 ]; then # saved, and not done
    exec qsub "$PBS_O_WORKDIR/examples/jobs/pbs.sh"
fi
exit "$status"

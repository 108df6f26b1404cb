#!/bin/bash
# 32 ranks on 4 node(s), mpich; from `mpizero job pbs`. Submit with: qsub examples/jobs/pbs.sh
#PBS -N train
#PBS -l select=4:ncpus=64:mpiprocs=8:ompthreads=8
#PBS -l place=scatter
#PBS -l walltime=04:00:00
#PBS -j oe
#PBS -r y

cd "$PBS_O_WORKDIR" || exit 1
export OMP_NUM_THREADS=8

# 120 s before the end the launcher gets it, and passes it on.
timeout --foreground --preserve-status --signal=USR1 14280 mpiexec -n 32 -ppn 8 -bind-to core:8 \
    python examples/train_gpt.py --strategy zero2 --checkpoint-dir run-train --checkpoint-every 500 --resume
status=$?
if [ "$status" -eq 75 ]; then # saved, and not done
    exec qsub examples/jobs/pbs.sh
fi
exit "$status"

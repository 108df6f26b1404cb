#!/bin/bash
# 32 ranks on 4 node(s), openmpi; from `mpizero job lsf`. Submit with: bsub < examples/jobs/lsf.sh
#BSUB -J train
#BSUB -n 32
#BSUB -R "span[ptile=8]"
#BSUB -R "affinity[core(8)]"
#BSUB -W 04:00
#BSUB -o train-%J.out
#BSUB -wa USR1 -wt 2
#BSUB -r -Q 75

export OMP_NUM_THREADS=8

trap : USR1 # LSF signals this shell, too: the ranks save, and it waits
mpirun -n 32 --map-by ppr:8:node:PE=8 --bind-to core \
    python examples/train_gpt.py --strategy zero2 --checkpoint-dir run-train --checkpoint-every 500 --resume

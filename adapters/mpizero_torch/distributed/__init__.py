"""A ``torch.distributed`` backend over any MPI.

    import torch.distributed as dist
    import mpizero_torch.distributed

    dist.init_process_group("mpizero")  # under mpirun or srun: no address, no port, no store

Importing it registers the backend "mpizero" for CPU and CUDA tensors, also as
"cpu:mpizero,cuda:mpizero". What runs on ``torch.distributed`` (DistributedDataParallel,
``fully_shard``, DTensor, tensor and pipeline parallelism, distributed checkpoints) runs on it.
"""

from __future__ import annotations

from mpizero_torch.distributed.process_group import MpiProcessGroup
from mpizero_torch.distributed.registration import BACKEND, register
from mpizero_torch.who import say_from_launcher

__all__ = ["BACKEND", "MpiProcessGroup"]

register()
say_from_launcher("import mpizero_torch.distributed")

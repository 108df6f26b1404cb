"""In the manner of tutorials: the program starts its processes itself, and names an address."""

import os
import sys

import torch
import torch.distributed as dist
import torch.multiprocessing as mp


def train(rank, world_size, word):
    os.environ["MASTER_ADDR"] = "192.0.2.1"  # where nobody is
    os.environ["MASTER_PORT"] = "12355"
    dist.init_process_group("cpu:gloo,cuda:nccl", rank=rank, world_size=world_size)
    group = dist.new_group(backend="gloo")
    total = torch.tensor([rank + 1])
    dist.all_reduce(total, group=group)
    print(f"{word} {total.item()} of {world_size} over {dist.get_backend(group)}")
    dist.destroy_process_group()


if __name__ == "__main__":
    count = int(sys.argv[1])
    mp.spawn(train, args=(count, "sum"), nprocs=count, join=True)

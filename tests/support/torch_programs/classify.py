"""In the manner of reference trainings of classifiers: workers, and printing on rank 0."""

import argparse
import builtins
import os

import torch
import torch.distributed as dist
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset


def init_distributed_mode(args):
    if "RANK" in os.environ and "WORLD_SIZE" in os.environ:
        args.rank, args.world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
        args.gpu = int(os.environ["LOCAL_RANK"])
    else:
        print("Not using distributed mode")
        args.distributed = False
        return
    args.distributed = True
    dist.init_process_group(
        backend="gloo", init_method=args.dist_url, world_size=args.world_size, rank=args.rank
    )
    dist.barrier()
    builtin_print = builtins.print

    def print_on_rank_0(*given, **options):
        if args.rank == 0:
            builtin_print(*given, **options)

    builtins.print = print_on_rank_0


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--dist-url", default="env://")
    args = parser.parse_args()
    init_distributed_mode(args)
    torch.manual_seed(0)
    x = torch.arange(16.0).view(16, 1) / 16
    dataset = TensorDataset(x, 3 * x - 1)
    sampler = DistributedSampler(dataset, shuffle=False) if args.distributed else None
    loader = DataLoader(dataset, batch_size=4, sampler=sampler, num_workers=1)
    model = torch.nn.Linear(1, 1)
    if args.distributed:
        model = torch.nn.parallel.DistributedDataParallel(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(2):
        seen = torch.zeros(1)
        for samples, targets in loader:
            optimizer.zero_grad()
            torch.nn.functional.mse_loss(model(samples), targets).backward()
            optimizer.step()
            seen += len(samples)
        if args.distributed:
            dist.barrier()
            dist.all_reduce(seen)
        print(f"seen {int(seen)} by {dist.get_world_size() if args.distributed else 1}")


if __name__ == "__main__":
    main()

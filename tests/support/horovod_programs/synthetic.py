"""A program as Horovod's users have them: how many samples a second a model trains on."""

import timeit

import horovod.torch as hvd
import numpy as np
import torch
import torch.nn.functional as F
from torch import nn, optim

hvd.init()
model = nn.Sequential(
    nn.Conv2d(3, 8, 3), hvd.SyncBatchNorm(8), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 14 * 14, 10)
)
optimizer = optim.SGD(model.parameters(), lr=0.01 * hvd.size())
optimizer = hvd.DistributedOptimizer(
    optimizer,
    named_parameters=model.named_parameters(),
    compression=hvd.Compression.none,
    op=hvd.Average,
)
hvd.broadcast_parameters(model.state_dict(), root_rank=0)
hvd.broadcast_optimizer_state(optimizer, root_rank=0)
data, target = torch.randn(4, 3, 16, 16), torch.LongTensor(4).random_() % 10


def benchmark_step():
    optimizer.zero_grad()
    F.cross_entropy(model(data), target).backward()
    optimizer.step()


def log(text):
    if hvd.rank() == 0:
        print(text)


log(f"Number of CPUs: {hvd.size()}")
timeit.timeit(benchmark_step, number=2)
rates = [4 * 3 / timeit.timeit(benchmark_step, number=3) for _ in range(3)]
mean, error = np.mean(rates), 1.96 * np.std(rates)
log(f"Total img/sec on {hvd.size()} CPU(s): {hvd.size() * mean:.1f} +-{hvd.size() * error:.1f}")

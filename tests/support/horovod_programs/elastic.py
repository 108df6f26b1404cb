"""A program as Horovod's users have them: a training that goes on when a rank is killed."""

import os
import signal
import sys

import horovod.torch as hvd
import torch
from torch import nn

STEPS, LR = 12, 0.05
# Which process dies in which step, and whether before backward or after the update.
KILLS = {3: (1, "backward"), 7: (0, "update")}

hvd.init()
first_rank = hvd.rank()
torch.manual_seed(5)
model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1)).double()
optimizer = torch.optim.SGD(model.parameters(), lr=LR * hvd.size(), momentum=0.9)
optimizer = hvd.DistributedOptimizer(optimizer, named_parameters=model.named_parameters())


def die(step, moment):
    if KILLS.get(step) == (first_rank, moment):
        os.kill(os.getpid(), signal.SIGKILL)


@hvd.elastic.run
def train(state, what):
    for state.batch in range(state.batch, STEPS):
        numbers = torch.Generator().manual_seed(100 * state.batch + hvd.rank())
        x = torch.randn(5, 4, generator=numbers, dtype=torch.float64)
        state.optimizer.zero_grad()
        loss = (state.model(x).squeeze(1) - x.sum(1)).square().mean()
        die(state.batch, "backward")
        loss.backward()
        state.optimizer.step()
        die(state.batch, "update")
        state.seen.append((state.batch, hvd.size()))
        state.batch += 1
        state.commit()
    return what


def on_state_reset():
    resets.append(hvd.size())
    for group in optimizer.param_groups:
        group["lr"] = LR * hvd.size()


resets = []
state = hvd.elastic.TorchState(model, optimizer, batch=0, seen=[])
state.register_reset_callbacks([on_state_reset])
assert train(state, what="done") == "done"
weights = hvd.allgather_object([p.tolist() for p in model.parameters()])
assert all(each == weights[0] for each in weights)
if hvd.rank() == 0:
    print(
        resets, state.seen, torch.cat([p.flatten() for p in model.parameters()]).tolist(), sep="\n"
    )
    sys.stdout.flush()

"""In the manner of small trainers of language models: torchrun's variables are asked first."""

import json
import os
import sys

import torch
from torch.distributed import destroy_process_group, init_process_group
from torch.nn.parallel import DistributedDataParallel as DDP

backend = "nccl" if len(sys.argv) < 3 else sys.argv[2]  # which this machine need not have
ddp = int(os.environ.get("RANK", -1)) != -1
accumulation, seed_offset = 2, 0
if ddp:
    init_process_group(backend=backend)
    rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    device = f"cpu:{int(os.environ['LOCAL_RANK'])}"
    master_process = rank == 0
else:
    master_process, rank, world_size = True, 0, 1

torch.manual_seed(0)
model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Tanh(), torch.nn.Linear(8, 1))
if ddp:
    model = DDP(model)
optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
data = torch.randn(24, 4, generator=torch.Generator().manual_seed(1))
losses = []
for _ in range(3):
    for micro_step in range(accumulation):
        if ddp:
            model.require_backward_grad_sync = micro_step == accumulation - 1
        mine = data[micro_step * 12 : (micro_step + 1) * 12][rank::world_size]
        loss = model(mine).square().mean() / accumulation
        loss.backward()
        total = loss.detach() * accumulation
        if ddp:
            torch.distributed.all_reduce(total)
            total /= world_size
    losses.append(total.item())
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
if master_process:
    used = torch.distributed.get_backend() if ddp else ""
    print(json.dumps({"size": world_size, "backend": used, "losses": losses, "argv": sys.argv[1:]}))
if ddp:
    destroy_process_group()

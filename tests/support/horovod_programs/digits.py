"""A program as Horovod's users have them: a small network on images, trained and evaluated."""

import argparse

import horovod.torch as hvd
import torch
import torch.nn.functional as F
from torch import nn, optim
from torch.utils.data import DataLoader, TensorDataset
from torch.utils.data.distributed import DistributedSampler

parser = argparse.ArgumentParser()
parser.add_argument("--epochs", type=int, default=3)
parser.add_argument("--batch-size", type=int, default=16)
parser.add_argument("--lr", type=float, default=0.05)
parser.add_argument("--fp16-allreduce", action="store_true")
parser.add_argument("--use-adasum", action="store_true")
parser.add_argument("--gradient-predivide-factor", type=float, default=1.0)
parser.add_argument("--batches-per-allreduce", type=int, default=1)


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(1, 6, kernel_size=3)
        self.norm = hvd.SyncBatchNorm(6)
        self.dense = nn.Linear(6 * 3 * 3, 10)

    def forward(self, x):
        x = F.relu(F.max_pool2d(self.norm(self.conv(x)), 2))
        return F.log_softmax(self.dense(x.flatten(1)), dim=1)


def images(count, seed):
    """Ten blurred stripes and crosses, with noise."""
    numbers = torch.Generator().manual_seed(seed)
    shapes = torch.randn(10, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    labels = torch.randint(0, 10, (count,), generator=numbers)
    return TensorDataset(shapes[labels] + torch.randn(count, 1, 8, 8, generator=numbers), labels)


def metric_average(value, name):
    return hvd.allreduce(torch.tensor(value), name=name).item()


def train(epoch):
    model.train()
    sampler.set_epoch(epoch)
    for x, y in loader:
        optimizer.zero_grad()
        for at in range(0, len(x), args.batch_size):
            part, labels = x[at : at + args.batch_size], y[at : at + args.batch_size]
            loss = F.nll_loss(model(part), labels)
            (loss / args.batches_per_allreduce).backward()
        optimizer.step()


def test():
    model.eval()
    loss = right = 0.0
    with torch.no_grad():
        for x, y in test_loader:
            output = model(x)
            loss += F.nll_loss(output, y, reduction="sum").item()
            right += (output.argmax(1) == y).float().sum().item()
    loss = metric_average(loss / len(test_sampler), "avg_loss")
    return loss, metric_average(right / len(test_sampler), "avg_accuracy")


args = parser.parse_args()
hvd.init()
torch.manual_seed(42)
if torch.cuda.is_available():
    torch.cuda.set_device(hvd.local_rank())
torch.set_num_threads(1)

data, test_data = images(640, seed=1), images(160, seed=2)
sampler = DistributedSampler(data, num_replicas=hvd.size(), rank=hvd.rank())
batch = args.batch_size * args.batches_per_allreduce
loader = DataLoader(data, batch_size=batch, sampler=sampler, drop_last=True)
test_sampler = DistributedSampler(test_data, num_replicas=hvd.size(), rank=hvd.rank())
test_loader = DataLoader(test_data, batch_size=80, sampler=test_sampler)

model = Net()
scale = 1 if args.use_adasum else hvd.size()
if torch.cuda.is_available() and args.use_adasum and hvd.nccl_built():
    scale = hvd.local_size()
optimizer = optim.SGD(model.parameters(), lr=args.lr * scale, momentum=0.5)
hvd.broadcast_parameters(model.state_dict(), root_rank=0)
hvd.broadcast_optimizer_state(optimizer, root_rank=0)
compression = hvd.Compression.fp16 if args.fp16_allreduce else hvd.Compression.none
optimizer = hvd.DistributedOptimizer(
    optimizer,
    named_parameters=model.named_parameters(),
    compression=compression,
    backward_passes_per_step=args.batches_per_allreduce,
    op=hvd.Adasum if args.use_adasum else hvd.Average,
    gradient_predivide_factor=args.gradient_predivide_factor,
)
for epoch in range(1, args.epochs + 1):
    train(epoch)
loss, accuracy = test()
weights = hvd.allgather_object([p.tolist() for p in model.parameters()])
assert all(each == weights[0] for each in weights)
if hvd.rank() == 0:
    print(f"loss {loss:.4f}, accuracy {accuracy:.3f}")

"""PyTorch Lightning on the ranks of an MPI job.

    import lightning as L  # or: import pytorch_lightning as pl
    from mpizero_torch.lightning import MpiStrategy, ZeroStrategy

    trainer = L.Trainer(strategy=MpiStrategy())  # or strategy="mpizero"
    trainer = L.Trainer(strategy=ZeroStrategy(stage=3, precision="bf16"))  # or "mpizero_stage_3"

Lightning comes as two packages whose classes are not each other's: this module's derive from the
one that was imported before it, else from the one that is installed.
"""

from mpizero_torch.lightning.replicas import MpiEnvironment, MpiStrategy
from mpizero_torch.lightning.sharded import ZeroPrecision, ZeroStrategy

__all__ = ["MpiEnvironment", "MpiStrategy", "ZeroPrecision", "ZeroStrategy"]

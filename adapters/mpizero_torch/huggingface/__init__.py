"""Hugging Face Accelerate and ``transformers.Trainer`` on the ranks of an MPI job.

    import mpizero_torch.huggingface

    world = mpizero_torch.huggingface.init()  # before Accelerator() or TrainingArguments(...)

Nothing else changes: both read torchrun's variables and use the process group that they find. What
their configuration says of DeepSpeed's or FSDP's sharding is done by ``mz.zero``.
"""

from mpizero_torch.huggingface.start import init

__all__ = ["init"]

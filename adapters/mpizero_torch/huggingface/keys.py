"""Keys of DeepSpeed's configuration that are not taken: passed over, or refused with a remedy."""

from __future__ import annotations

_ZERO = "zero_optimization."

# How DeepSpeed goes about it, what it prints, and what holds here anyway: the same is learnt.
BESIDE = frozenset(
    {
        *(
            _ZERO + key
            for key in (
                "overlap_comm", "contiguous_gradients", "reduce_scatter", "allgather_partitions",
                "allgather_bucket_size", "reduce_bucket_size", "round_robin_gradients",
                "stage3_prefetch_bucket_size", "stage3_param_persistence_threshold",
                "stage3_model_persistence_threshold", "stage3_max_live_parameters",
                "stage3_max_reuse_distance", "sub_group_size", "use_multi_rank_bucket_allreduce",
                "stage3_gather_16bit_weights_on_model_save", "elastic_checkpoint",
                "stage3_gather_fp16_weights_on_model_save", "load_from_fp32_weights",
                "ignore_unused_parameters", "param_persistence_threshold",
                "memory_efficient_linear",
                "offload_optimizer.pin_memory", "offload_optimizer.buffer_count",
                "offload_optimizer.fast_init", "offload_optimizer.ratio",
                "offload_optimizer.pipeline", "offload_optimizer.pipeline_read",
                "offload_optimizer.pipeline_write", "offload_param.pin_memory",
                "offload_param.nvme_path", "offload_param.buffer_count",
                "offload_param.buffer_size", "offload_param.max_in_cpu", "leaf_module",
                "mics_hierarchical_params_gather",
            )
        ),
        "fp16.hysteresis", "fp16.consecutive_hysteresis", "fp16.auto_cast",
        "bf16.check_grad_overflow", "bf16.immediate_grad_update",
        "steps_per_print", "wall_clock_breakdown", "memory_breakdown", "dump_state",
        "zero_allow_untested_optimizer", "zero_force_ds_cpu_optimizer", "disable_allgather",
        "graph_harvesting", "use_data_before_expert_parallel_", "checkpoint", "aio",
        "activation_checkpointing", "nebula",
    }
)  # fmt: skip

_COMPRESSED = "Communication is not compressed here: leave it out."
_CURVES = "Say report_to=... in TrainingArguments, or log_with=... to the Accelerator."
_DATA = "What a rank is given is the data loader's business: do it in the dataset or the sampler."

# What would change what is learnt, or what a program gets; allowed where it is off.
REFUSED = {
    _ZERO + "offload_param": "Parameters stay with the device: use stage 3 on more ranks.",
    _ZERO + "offload_param.device": "Parameters stay with the device: use stage 3 on more ranks.",
    _ZERO + "zero_quantized_weights": _COMPRESSED,
    _ZERO + "zero_quantized_nontrainable_weights": _COMPRESSED,
    _ZERO + "zero_quantized_gradients": _COMPRESSED,
    _ZERO + "zeropp_loco_param": _COMPRESSED,
    _ZERO + "cpu_offload": "It is zero_optimization.offload_optimizer: {'device': 'cpu'} now.",
    _ZERO + "cpu_offload_params": "Parameters stay with the device: use stage 3 on more ranks.",
    "communication_data_type": "Gradients travel in the dtype that they have: leave it out.",
    "seq_parallel_communication_data_type": "Leave it out.",
    "prescale_gradients": "Gradients are averaged: leave it out.",
    "gradient_predivide_factor": "Gradients are averaged: leave it out.",
    "sparse_gradients": "Let embeddings have dense gradients (sparse=False): leave it out.",
    "fp16.fp16_master_weights_and_grads": "What is trained are float32 copies: leave it out.",
    "bf16.bf16_master_weights_and_grads": "What is trained are float32 copies: leave it out.",
    "bf16.bf16_optimizer_states": "The optimizer's state is float32: leave it out.",
    "torch_autocast": "Say bf16.enabled or fp16.enabled instead.",
    "amp": "Say bf16.enabled or fp16.enabled instead.",
    "compression_training": _COMPRESSED,
    "quantize_training": "Quantise the model before it is trained: leave it out.",
    "curriculum_learning": _DATA,
    "data_efficiency": _DATA,
    "progressive_layer_drop": "Drop layers in the model's forward: leave it out.",
    "eigenvalue": "Leave it out.",
    "sparse_attention": "Choose the model's attention (attn_implementation=...): leave it out.",
    "tensor_parallel": "Tensor parallelism is torch's, on mz.mesh: docs/tensor-and-pipeline.md.",
    "sequence_parallel_size": "Sequence parallelism is mz.ulysses's: docs/tensor-and-pipeline.md.",
    "pipeline": "Pipelines are torch's, on mz.mesh: docs/tensor-and-pipeline.md.",
    "elasticity": "A job goes on with fewer ranks by mz.elastic: docs/elastic.md.",
    "autotuning": "`mpizero plan` says what training will take: leave it out.",
    "hybrid_engine": "Leave it out.",
    "inference": "Leave it out.",
    "tensorboard": _CURVES,
    "wandb": _CURVES,
    "comet": _CURVES,
    "csv_monitor": _CURVES,
    "flops_profiler": "Use torch.profiler: leave it out.",
    "comms_logger": "mz.trace writes down what is sent: leave it out.",
    "compile": "Say torch_compile=True in TrainingArguments, or compile the model.",
    "zero_optimization.zeropp": _COMPRESSED,
    "dataloader_drop_last": "Say drop_last=True to the data loader.",
}

ONE_IS_OFF = frozenset(
    {"gradient_predivide_factor", "sequence_parallel_size", "tensor_parallel.autotp_size"}
)

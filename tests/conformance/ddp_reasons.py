"""Why a test does not go with mpizero's DistributedDataParallel as with torch's on gloo."""

from __future__ import annotations

_TORCHS = 'torch\'s own wrapper, on `init_process_group("mpizero")`, has them'
_HOOK = (
    "Gradients are averaged by mpizero's engine, which takes no communication hooks of torch's "
    f"(`register_comm_hook`, `_register_buffer_comm_hook`); {_TORCHS}."
)
_REDUCER = f"Looks into torch's reducer, or into private methods around it; {_TORCHS}."
_LOGGED = f"Reads torch's log of its reducer (`_get_ddp_logging_data`); {_TORCHS}."
_UNUSED = (
    "Expects an error where a parameter is not used and `find_unused_parameters` is false. Here "
    "parameters may go unused without a flag, on all ranks or on some."
)
_STATIC = (
    "Expects an error where a graph changes although it was said to be static, or is said so late. "
    "Here a graph may always change, and there is nothing to say."
)
_DEPRECATED = "Expects torch's warning that `broadcast_buffers=` will go: here it stays."
_PICKLED = (
    "Pickles the wrapper in the middle of training, which is refused: it holds communicators and "
    "hooks of its process. Save `model.state_dict()`, or `model.module`."
)
_JOIN = (
    "torch's `join` divides by the number of all ranks unless "
    "`divide_by_initial_world_size=False` says otherwise. Here it is by those that still train, "
    "unless it says True."
)
_JOINED = (
    "Joins the wrapper by torch's `Join([...])`, which looks into it (`_join_config`): use "
    "`with model.join(optimizer):`."
)
_PROFILED = (
    "Expects the profiler to show calls of `torch.distributed`. Gradients do not go through it "
    "here; `mz.trace` shows what they do."
)

REASONS: dict[str, str] = {
    "test_ddp_hook_parity_allreduce": _HOOK,
    "test_ddp_hook_parity_allreduce_process_group": _HOOK,
    "test_ddp_hook_parity_powerSGD": _HOOK,
    "test_ddp_hook_parity_post_localSGD": _HOOK,
    "test_accumulate_gradients_no_sync_allreduce_hook": _HOOK,
    "test_accumulate_gradients_no_sync_allreduce_with_then_hook": _HOOK,
    "test_ddp_comm_hook_logging": _HOOK,
    "test_ddp_python_error_logged": _HOOK,
    "test_ddp_buffer_hook_allreduce": _HOOK,
    "test_ddp_buffer_hook_allreduce_return_future": _HOOK,
    "test_ddp_broadcast_buffer_via_hook": _HOOK,
    "test_ddp_control_flow_same_across_ranks": _REDUCER,
    "test_ddp_control_flow_different_across_ranks": _REDUCER,
    "test_detect_ddp_is_actually_static": _REDUCER,
    "test_ddp_build_debug_param_to_name_mapping": _REDUCER,
    "test_ddp_build_debug_param_to_name_mapping_requires_grad": _REDUCER,
    "test_ddp_remove_autograd_hooks": _REDUCER,
    "test_ddp_sync_module_states": _REDUCER,
    "test_ddp_sink_noclone": _REDUCER,
    "test_ddp_logging_data_cpu": _LOGGED,
    "test_different_graph_across_ranks": _LOGGED,
    "test_skip_all_reduce_unused_parameters": _LOGGED,
    "test_ddp_unused_params_rebuild_buckets_exception": _UNUSED,
    "test_ddp_multiple_nested_unused_params_error": _UNUSED,
    "test_ddp_multiple_nested_unused_params_err_ignore_params": _UNUSED,
    "test_get_data_parallel_params": _REDUCER,
    "test_invalid_static_graph": _STATIC,
    "test_static_graph_api_cpu": _STATIC,
    "test_ddp_broadcast_buffers_deprecation_warning": _DEPRECATED,
    "test_DistributedDataParallelCPU": _PICKLED,
    "test_DistributedDataParallelCPU_grad_is_view": _PICKLED,
    "test_ddp_join_model_equivalence": _JOIN,
    "test_ddp_uneven_input_join_disable": _JOINED,
    "test_ddp_profiling_torch_profiler": _PROFILED,
    "test_DistributedDataParallel_requires_grad": (
        "A module without trainable parameters is refused, as by torch, with an `ArgumentError`, "
        "which is a `ValueError`; the test expects a `RuntimeError`."
    ),
    "test_ddp_create_graph": (
        "Gradients of gradients (`create_graph=True`) would not be averaged, and are refused; "
        "torch warns, and the test asks no more than that backward raises nothing."
    ),
    "test_ddp_native_mixed_precision_ignored_params": (
        "`mixed_precision=` is not taken: use `torch.autocast`."
    ),
    "test_ddp_bucket_cap_mb_list": (
        "`bucket_cap_mb_list=` is not taken: all buckets have the size `bucket_cap_mb`."
    ),
    "test_stateless_api_with_ddp": (
        "Runs the wrapper by `functional_call` with other tensors for its parameters. Their "
        "gradients would stay on each rank, as they do with torch's, so it is refused: call "
        "`functional_call` on `model.module`."
    ),
    "test_ddp_device_mesh_initialization": (
        "Reads `device_mesh` of the wrapper, which takes one, and keeps its ranks as `world`."
    ),
    "test_ddp_inference": (
        "torch's wrapper takes no module with `SyncBatchNorm` on the CPU; evaluated it needs no "
        "other ranks, and works here."
    ),
}

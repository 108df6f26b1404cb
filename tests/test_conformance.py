"""torch's own suite for backends: what has passed passes, and the page says what does not.

``tests/conformance`` runs it; a quick part here, all with MPIZERO_TEST_ALL=1.
"""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from conformance import compare, model_table, page, stored
from conformance.launches import Setting, run_tests
from conformance.outcomes import FAILED, PASSED, SKIPPED, Outcome, together
from conformance.tables import BACKEND, DDP, TABLES, Table
from support.launch import ROOT, find_mpirun, is_openmpi, launch_environment, mpirun

# One or two of each kind, of those that take little time.
QUICK_BACKEND = (
    "test_get_rank",
    "test_get_backend",
    "test_Backend_enum_class",
    "test_destroy_group",
    "test_get_rank_size_group",
    "test_batch_isend_irecv_gloo_tags",
    "test_send_recv_torch_profiler",
    "test_send_recv_any_source_autograd_profiler",
    "test_send_recv_with_tag",
    "test_isend",
    "test_irecv",
    "test_broadcast",
    "test_broadcast_group",
    "test_all_reduce_sum_async",
    "test_all_reduce_sum_complex",
    "test_all_reduce_complex_unsupported_ops",
    "test_all_reduce_group_product",
    "test_all_reduce_full_group_max",
    "test_sparse_all_reduce_sum",
    "test_all_reduce_coalesced_group_sum",
    "test_reduce_group_min",
    "test_reduce_sum_twice",
    "test_scatter_checks",
    "test_scatter_group",
    "test_scatter_complex",
    "test_gather_checks",
    "test_gather_full_group",
    "test_all_gather",
    "test_all_gather_complex",
    "test_all_gather_coalesced_with_empty",
    "test_all_gather_object_subgroup",
    "test_all_to_all_group",
    "test_all_to_all_single_unequal_split",
    "test_barrier_group",
    "test_monitored_barrier_gloo_subgroup",
    "test_monitored_barrier_wait_all_ranks",
    "test_scatter_object_list",
    "test_DistributedDataParallel_requires_grad",
    "test_DistributedDataParallelCPU_grad_is_view",
    "test_accumulate_gradients_no_sync_allreduce_hook",
    "test_get_future",
    "test_ddp_logging_data_cpu",
)
QUICK_DDP = (
    "test_ddp_zero_output_features",
    "test_DistributedDataParallel_with_amp_and_grad_is_view",
    "test_post_localSGD_optimizer_step_reload",
    "test_ddp_uneven_input_exception",
    "test_ddp_shared_grad_acc_unused_params",
    "test_ddp_namedtuple",
    "test_grads_same_across_ranks_with_no_sync",
    "test_ddp_model_diff_num_params_across_ranks",
    "test_output_unused_in_loss_dict_module",
    "test_undefined_grad_parity_unused_parameters",
    "test_ddp_returns_tensor_with_no_grad",
    "test_ddp_new_tensor_in_fwd",
    "test_ddp_broadcast_buffer",
    "test_static_graph_multi_forward",
    "test_ddp_forward_backward_hook",
)
QUICK = {BACKEND.name: QUICK_BACKEND, DDP.name: QUICK_DDP}

# One or two of each kind; all: tests/conformance/models.py
QUICK_MODELS = (
    "causal gpt2", "causal qwen3_moe", "causal mixtral", "causal falcon_mamba", "masked bert",
    "seq2seq t5", "image vit_msn",
)  # fmt: skip

_MPI = stored.OPENMPI if is_openmpi(find_mpirun(sys.executable)) else stored.MPICH
_ALL = bool(os.environ.get("MPIZERO_TEST_ALL"))


def _run(names: list[str], limit: float = 60.0, table: Table = BACKEND) -> dict[str, Outcome]:
    setting = Setting(sys.executable, "mpizero", limit, table=table)
    return run_tests(setting, names, lambda *_: None)


@pytest.mark.timeout(3600 if _ALL else 240)
@pytest.mark.parametrize("table", TABLES.values(), ids=TABLES)
def test_what_has_passed_passes(table: Table) -> None:
    _, columns = stored.read(table.file)
    before, quick = columns[_MPI], QUICK[table.name]
    names = [name for name, o in before.items() if o.verdict == PASSED and (_ALL or name in quick)]
    assert _ALL or len(names) == len(quick), set(quick) - set(names)
    now = _run(names, table=table)
    assert {n: o.details for n, o in now.items() if o.verdict != PASSED} == {}


@pytest.mark.once
@pytest.mark.timeout(400)
def test_models_of_transformers_train_as_in_one_process() -> None:
    pytest.importorskip("transformers")
    script = ROOT / "tests" / "conformance" / "models.py"
    done = mpirun(2, [str(script), "--only", *QUICK_MODELS], timeout=360)
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"{len(QUICK_MODELS)} architectures, 0 differ" in done.stdout, done.stdout


@pytest.mark.once
def test_the_page_shows_the_models_and_why_some_differ() -> None:
    made_with, results = model_table.stored()
    text = page.PAGE.read_text()
    assert model_table.put_in(text, model_table.section(made_with, results)) == text
    tried = {name for name, found in results.items() if model_table.LEFT_OUT not in found}
    differing = {name for name in tried if any(results[name].values())}
    assert len(tried) > 100 and not differing & set(QUICK_MODELS)
    assert differing == set(model_table.REASONS)


@pytest.mark.once
@pytest.mark.timeout(240)
def test_what_hangs_has_failed_and_the_rest_goes_on() -> None:
    """Of this barrier one rank alone knows; the launch behind it runs what is left."""
    hangs, runs = "test_barrier_timeout_full_group", "test_get_rank"
    found = _run([hangs, runs], limit=10.0)
    assert found[hangs].verdict == FAILED and "not done in 10 s" in found[hangs].reason
    assert "_test_barrier_timeout" in found[hangs].details  # where the rank that hung was
    assert found[runs].verdict == PASSED


@pytest.mark.once
def test_one_rank_fails_a_test_for_all() -> None:
    passed, failed = Outcome(PASSED), Outcome(FAILED, "RuntimeError: no", details="Traceback")
    gone = Outcome(FAILED, "did not end", is_guess=True)
    assert together([passed, passed]).verdict == PASSED
    assert together([passed, failed]).reason == "rank 1: RuntimeError: no"
    assert together([gone, failed]).reason == "rank 1: RuntimeError: no"  # the cause
    assert together([Outcome(SKIPPED, "why")] * 2) == Outcome(SKIPPED, "why")
    assert "disagree" in together([passed, Outcome(SKIPPED, "why")]).reason


@pytest.mark.once
@pytest.mark.parametrize("table", TABLES.values(), ids=TABLES)
def test_the_page_shows_the_results_with_every_difference(table: Table) -> None:
    made_with, columns = stored.read(table.file)
    assert list(columns) == list(stored.COLUMNS)
    text = page.PAGE.read_text()
    assert page.put_in(text, table, page.section(table, made_with, columns)) == text
    found = compare.differences(columns, table.reasons)
    assert found and all(f"`{each.name}`" in text and each.reason in text for each in found)


@pytest.mark.once
@pytest.mark.parametrize("table", TABLES.values(), ids=TABLES)
def test_every_difference_has_its_reason(table: Table) -> None:
    assert compare.unexplained(stored.read(table.file)[1], table.reasons) == []


@pytest.mark.once
def test_the_tests_that_make_a_replica_are_found() -> None:
    """In a process of its own: to import the suite changes the environment."""
    code = (
        "from conformance.suite import Suite; from conformance.tables import DDP; "
        "print(*Suite('gloo', 3, DDP).names())"
    )
    environment = launch_environment()
    environment["PYTHONPATH"] += f"{os.pathsep}{ROOT / 'tests'}"
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, stdout=subprocess.PIPE, text=True, check=True
    )
    found = done.stdout.split()
    itself, by_another = "test_ddp_broadcast_buffer", "test_DistributedDataParallelCPU"
    assert {itself, by_another} < set(found)
    assert "test_all_reduce_sum" not in found
    assert set(found) == set(stored.read(DDP.file)[1][stored.GLOO])

"""Why a test does not go with "mpizero" as with gloo. Every difference needs its line."""

from __future__ import annotations

_NO_TIMEOUT = (
    'The suite asks this of gloo alone ("only gloo backend supports timeouts"): a rank that waits '
    "alone in a barrier gets an exception when the group's timeout is up. Here `MPIZERO_TIMEOUT` "
    "ends the job, with a report of who waits for whom; `monitored_barrier` keeps its timeout."
)
_OF_MPI = "The suite does not ask for all-to-all of gloo on CPUs, but of MPI."

REASONS: dict[str, str] = {
    "test_barrier_timeout_full_group": _NO_TIMEOUT,
    "test_barrier_timeout_global": _NO_TIMEOUT,
    "test_barrier_timeout_group": _NO_TIMEOUT,
    "test_all_to_all": _OF_MPI,
    "test_all_to_all_complex": _OF_MPI,
    "test_all_to_all_full_group": _OF_MPI,
    "test_all_to_all_group": _OF_MPI,
    "test_all_to_all_single_equal_split": _OF_MPI,
    "test_all_to_all_single_equal_split_complex": _OF_MPI,
    "test_all_to_all_single_equal_split_full_group": _OF_MPI,
    "test_all_to_all_single_equal_split_group": _OF_MPI,
    "test_all_to_all_single_unequal_split": _OF_MPI,
    "test_all_to_all_single_unequal_split_complex": _OF_MPI,
    "test_all_to_all_single_unequal_split_full_group": _OF_MPI,
    "test_all_to_all_single_unequal_split_group": _OF_MPI,
}

"""The share of a process, as a scheduler's variables say it."""

import pytest

from elastic.distributed.job_share import share_of_job


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({}, None),
        ({"SLURM_PROCID": "0", "SLURM_NTASKS": "1"}, None),
        ({"SLURM_NTASKS": "1"}, None),  # a shell that was allocated one task
        ({"SLURM_PROCID": "2", "SLURM_NTASKS": "4"}, (2, 4)),
        ({"SLURM_ARRAY_TASK_ID": "3", "SLURM_ARRAY_TASK_COUNT": "8"}, (3, 8)),
        # --array=10-40:10
        (
            {
                "SLURM_ARRAY_TASK_ID": "30", "SLURM_ARRAY_TASK_COUNT": "4",
                "SLURM_ARRAY_TASK_MIN": "10", "SLURM_ARRAY_TASK_STEP": "10",
            },
            (2, 4),
        ),
        ({"JOB_COMPLETION_INDEX": "5", "JOB_COMPLETIONS": "6"}, (5, 6)),
    ],
)  # fmt: skip
def test_a_job_says_which_share_is_this_process(environment, expected):
    found = share_of_job(environment)
    assert (found and found[:2]) == expected
    if found:
        assert all(name in found.source for name in environment if name.endswith(("ID", "INDEX")))


def test_tasks_share_the_part_of_their_array_job():
    """Every process has a number of its own, and together they are all."""
    shares = [
        share_of_job({
            "SLURM_ARRAY_TASK_ID": str(job), "SLURM_ARRAY_TASK_COUNT": "3",
            "SLURM_PROCID": str(task), "SLURM_NTASKS": "2",
        })
        for job in range(3)
        for task in range(2)
    ]  # fmt: skip
    assert [share and share[:2] for share in shares] == [(k, 6) for k in range(6)]


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({"SLURM_NTASKS": "4"}, "SLURM_NTASKS=4 is set but SLURM_PROCID is not: start .* srun"),
        ({"SLURM_PROCID": "1"}, "SLURM_PROCID=1 is set but SLURM_NTASKS is not"),
        ({"SLURM_ARRAY_TASK_ID": "1"}, "SLURM_ARRAY_TASK_COUNT is not"),
        ({"JOB_COMPLETION_INDEX": "1"}, "JOB_COMPLETIONS is not: set it in the job's file"),
        ({"JOB_COMPLETION_INDEX": "6", "JOB_COMPLETIONS": "6"}, "does not lie below JOB_COMPLETIONS=6"),
        ({"SLURM_PROCID": "-1", "SLURM_NTASKS": "6"}, "SLURM_PROCID='-1' must be a whole number"),
    ],
)  # fmt: skip
def test_half_of_a_share_is_refused_by_the_name_of_what_is_missing(environment, message):
    with pytest.raises(ValueError, match=message):
        share_of_job(environment)

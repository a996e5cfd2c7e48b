"""Trials that can never be placed are refused with the numbers."""

from __future__ import annotations

from typing import Any

from raytune_lora.cluster.connect import Node, placement_problems
from raytune_lora.config.compose import compose


def found(nodes: list[Node], concurrent: int = 1, **settings: Any) -> list[str]:
    return placement_problems(
        compose(["experiment=tiny", *(f"{key}={value}" for key, value in settings.items())]),
        nodes,
        concurrent=concurrent,
    )


def test_a_worker_that_is_larger_than_the_largest_machine() -> None:
    (problem,) = found([Node(8, 2), Node(16, 2)], workers=2, gpus_per_worker=4)
    assert problem.startswith(
        "one trial needs workers=2 x (1 CPU and 4 GPU), and a worker never spans machines: the largest has "
        "16 CPUs and 2 GPUs; ask for fewer"
    )


def test_a_worker_never_spans_two_machines() -> None:
    assert found([Node(8, 4), Node(8, 4)], workers=2, gpus_per_worker=4) == []
    assert found([Node(8, 6), Node(8, 2)], workers=2, gpus_per_worker=4) == [
        "workers=2 with 1 CPU and 4 GPU each do not fit: the cluster has 8 CPUs and 6 GPUs + 8 CPUs and 2 GPUs, "
        "enough for 1; ask for fewer, or set cluster.autoscaler=true where machines will be added"
    ]


def test_more_trials_at_once_than_the_cluster_has_room_for() -> None:
    (problem,) = found([Node(4, 0)] * 3, workers=2, concurrent=7)
    assert "in each of search.concurrent=7 trials" in problem
    assert "the cluster has 3 x (4 CPUs), enough for 12" in problem


def test_no_machine_with_a_gpu() -> None:
    assert "none of the 2 machines has a GPU" in found([Node(4, 0)] * 2, gpus_per_worker=1)[0]


def test_where_machines_are_added_trials_wait_for_them() -> None:
    assert found([Node(1, 0)], workers=2, gpus_per_worker=4, **{"cluster.autoscaler": "true"}) == []

"""The exchange that is chosen at typical points, and the sentence that says why."""

import subprocess
import sys

import pytest

from pretrain.plan.choice import choose_exchange
from pretrain.plan.hardware import CPU


def names(choice):
    return [option.name for option in choice.alternatives]


def test_one_rank_needs_no_exchange():
    assert choose_exchange(ranks=1, rows=8192, width=512).name == "local"


@pytest.mark.parametrize(
    ("ranks", "rows", "width", "chosen"),
    [
        (2, 16, 64, "gather"),
        (8, 1024, 512, "gather"),
        (64, 4096, 512, "gather"),
        (1024, 1024, 512, "gather"),  # 3.2 of 4 GB
        (256, 4096, 768, "streamed"),  # 4.8 GB together, 2.4 in slices
        (1024, 8192, 512, "hierarchical"),  # 25.8 GB together, 12.9 in slices
    ],
)
def test_typical_points(ranks, rows, width, chosen):
    assert choose_exchange(ranks=ranks, rows=rows, width=width).name == chosen


def test_wider_numbers_change_the_choice():
    case = {"ranks": 1024, "rows": 1024, "width": 512}
    assert choose_exchange(**case, bytes_each=2).name == "gather"
    assert choose_exchange(**case, bytes_each=4).name != "gather"


def test_memory_forces_a_ring_where_nodes_are_no_help():
    choice = choose_exchange(ranks=8, rows=8192, width=512, memory_bytes=60e6)
    assert choice.name in ("ring", "bidirectional")
    assert "hierarchical" not in names(choice)


def test_what_fits_nowhere_is_said():
    choice = choose_exchange(ranks=8, rows=8192, width=512, memory_bytes=1e6)
    assert choice.name == "ring"
    assert "nothing fits into 1 MB" in choice.reason


def test_hierarchical_needs_full_nodes():
    assert "hierarchical" not in names(choose_exchange(ranks=12, rows=64, width=64))
    assert "hierarchical" not in names(choose_exchange(ranks=16, rows=64, width=64, node_size=1))
    assert "hierarchical" in names(choose_exchange(ranks=16, rows=64, width=64))


def test_only_what_is_offered_is_chosen():
    choice = choose_exchange(ranks=8, rows=8192, width=512, memory_bytes=1e6, among=("gather",))
    assert choice.name == "gather"
    with pytest.raises(ValueError, match="none of hierarchical serves 3 ranks"):
        choose_exchange(ranks=3, rows=8, width=8, among=("hierarchical",))


def test_the_reason_is_one_sentence_with_numbers():
    choice = choose_exchange(ranks=64, rows=4096, width=512)
    assert choice.reason.startswith("262144 pairs of width 512 on 64 ranks: gather takes 0.805 GB of 4 GB, predicted ")
    assert "\n" not in choice.reason


def test_gather_is_mentioned_where_it_was_passed_over():
    assert "gather: predicted" in choose_exchange(ranks=1024, rows=8192, width=512).reason


def test_ranks_without_a_gpu_choose_too():
    assert choose_exchange(ranks=4, rows=32, width=64, bytes_each=4, machine=CPU).name == "gather"


def test_no_torch_is_imported():
    modules = "pretrain.plan.choice, pretrain.plan.communication, pretrain.plan.hardware, pretrain.plan.loss"
    code = f"import sys, {modules}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0

"""The engine of an sm_90 on the host: asynchronous work in every order, and faults that it finds.

The host cannot see a missing ``fence_for_products`` or ``fence_barriers``, nor the scopes of what
blocks of a cluster tell each other, nor conflicts of banks.
"""

import shutil
import subprocess

import pytest
from support import host_kernels

pytestmark = pytest.mark.skipif(
    host_kernels.missing() is not None, reason=str(host_kernels.missing())
)
LAST = "    sm90::wait_products<0>();\n    free_stage(step - 1);"
TOLD = "if (lane() < kCluster) sm90::arrive_at(empty, lane());"
# What was taken from engine_mainloop.h, and what stands there instead.
FAULTS = {
    "no wait for a load": [
        ("sm90::wait_barrier(&shared().full[at], step / kStages & 1);", "")],
    "no wait for a free stage": [
        ("sm90::wait_barrier(&shared().empty[at], (step / kStages & 1) ^ 1);", "")],
    "a stage is freed while it is read": [
        ("if (k > 0) free_stage(step - 1);", ""),
        ("sm90::wait_products<1>();", "free_stage(step);\n      sm90::wait_products<1>();"),
        (LAST, "sm90::wait_products<0>();"),
    ],
    "the last stage is not freed": [
        (LAST, "sm90::wait_products<0>();")],
    "sums are read too early": [
        (LAST, "free_stage(step - 1);")],
    "a wrong phase of empty": [
        ("empty[at], (step / kStages & 1) ^ 1", "empty[at], step / kStages & 1")],
    "a wrong phase of full": [
        ("&shared().full[at], step / kStages & 1", "&shared().full[at], (step / kStages & 1) ^ 1")],
    "rows of left are not swizzled": [("(chunk ^ (local & 7)) * 8", "chunk * 8")],
    "a wrong distance of boxes": [("kBoxRows * 128)", "kBoxRows * 64)")],
    "a wrong step of k": [("part * 16 * (kTransposed ? 1 : 64)", "part * 16")],
    "copies do not count": [
        ("sm90::init_barrier(&shared().full[stage], 1 + kGroup);",
         "sm90::init_barrier(&shared().full[stage], 1);"),
        ("sm90::arrive_when_copied(&shared().full[at]);", "")],
    "too few bytes are awaited": [("sizeof(stage.right));", "sizeof(stage.right) / 2);")],
    "both warpgroups take the same tiles": [
        ("return !kInTurn || turn % 2 == same_in_warp(consumer() / kGroup);",
         "return !kInTurn || same_in_warp(turn) % 2 == 0;")],
    "steps of the other warpgroup are not counted": [
        ("step += (args.size_k + kBlockK - 1) / kBlockK;", "")],
    "warpgroups do not wait for their turn": [
        ("if (kInTurn) sm90::wait_barrier(&shared().turns[(turn + 1) % 2],"
         " ((turn + 1) / 2 & 1) ^ 1);", "")],
    "one barrier for the turns of both warpgroups": [
        ("sm90::wait_barrier(&shared().turns[(turn + 1) % 2], ((turn + 1) / 2 & 1) ^ 1);",
         "sm90::wait_barrier(&shared().turns[0], (turn & 1) ^ 1);"),
        ("sm90::arrive(&shared().turns[turn % 2]);", "sm90::arrive(&shared().turns[0]);")],
    "the next turn does not begin": [
        ("if (kInTurn && lane() == 0) sm90::arrive(&shared().turns[turn % 2]);", "")],
    "as many free a stage as multiply two": [
        ("sm90::init_barrier(&shared().empty[stage], kCluster * kTogether / 32);",
         "sm90::init_barrier(&shared().empty[stage], kCluster * 8);")],
    "up beside the expert's": [("i * (kGated ? args.size_n : kBoxRows)", "i * kBoxRows")],
    "an added expert's matrix from the base": [
        ("of_base ? &maps.base : &maps.extra", "&maps.base")],
    "a block is not told that the other has freed a stage": [
        (TOLD, "if (lane() == 0) sm90::arrive(empty);")],
    "a block is not told that it has freed a stage itself": [
        (TOLD, "if (lane() == 0) sm90::arrive_at(empty, 1 - rank());")],
    "a stage is free when one block has freed it": [
        ("&shared().empty[stage], kCluster * kTogether / 32);",
         "&shared().empty[stage], kTogether / 32);")],
    "a half of W for one block": [
        ("sm90::load_box<kCluster>(map, box, k, row", "sm90::load_box<1>(map, box, k, row")],
    "both blocks load the same half": [("rank() * kOwnBoxes + own;", "own;")],
    "both blocks load both halves": [
        ("own < kOwnBoxes;", "own < kCluster * kOwnBoxes;"),
        ("rank() * kOwnBoxes + own;", "own;")],
    "both blocks take the same rows": [("of_map.first + rank() * kBlockM", "of_map.first")],
    "a block loads before the other has barriers": [("sm90::meet_cluster();", "__syncthreads();")],
    "a block ends before the other": [
        ("sm90::wait_barrier(&shared().empty[step % kStages], (step / kStages & 1) ^ 1);", "")],
}  # fmt: skip


# Of adapter_tile.h.
FAULTS_OF_FOLDS = {
    "rows are read before they are written": [
        ("write_left(pair);\n      Loop::meet();\n", "write_left(pair);\n")],
    "rows are written before they were read": [
        ("sum_rows(pair, column);\n      Loop::meet();\n", "sum_rows(pair, column);\n")],
    "weights are read before they are written": [
        ("                            : 0.0f;\n    Loop::meet();\n",
         "                            : 0.0f;\n")],
    "du1 begins anew": [("present && column > tile.column", "false")],
    "du1 does not begin at 0": [("present && column > tile.column", "present")],
    "all tiles have one slot": [
        ("number) + before", "number) + 0 * before")],
    "two rows change places": [("0xffffu : 0", "0xffff0000u : 0")],
}  # fmt: skip


def run(folder, changes=(), file="engine_mainloop.h"):
    """Compile the check with these changes of the engine, and return its exit status."""
    sources = shutil.copytree(host_kernels.KERNELS, folder / "cuda")
    engine = sources / file
    text = engine.read_text()
    for old, new in changes:
        assert text.count(old) == 1, old
        text = text.replace(old, new)
    engine.write_text(text)
    source = host_kernels.HOST / "engine_host.cpp"
    check = host_kernels.executable(folder / "check", source, sources)
    return subprocess.run([check], capture_output=True).returncode


def test_every_order_of_asynchronous_work(tmp_path):
    assert run(tmp_path) == 0


@pytest.mark.slow
@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_found(fault, tmp_path):
    assert run(tmp_path, FAULTS[fault]) != 0


@pytest.mark.slow
@pytest.mark.parametrize("fault", FAULTS_OF_FOLDS)
def test_a_fault_in_folding_is_found(fault, tmp_path):
    assert run(tmp_path, FAULTS_OF_FOLDS[fault], "adapter_tile.h") != 0

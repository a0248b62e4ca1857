"""Several ranks: what ends one ends all of them, with the same sentence."""

import os
import time
from pathlib import Path

import pytest
import torch

from onpath.config.methods.topd import TOPDOptions
from onpath.methods.base import check_generated
from onpath.methods.topd.candidates import candidate_counts
from onpath.records import Edit, Trajectory
from onpath.system import distributed
from onpath.system.errors import UserError
from tests.forks import forked, ranks


def rewrites(*reasons: str) -> list[Trajectory]:
    made = [Edit(kind="rewrite", kept=not r, reason=r or "kept") for r in reasons]
    return [Trajectory(student_context=(1,), teacher_context=(1,), response=(2,), edit=e) for e in made]


def check(trajectories: list[Trajectory]) -> None:
    check_generated(trajectories, step=0, who="it", of="attempts", look="it")


def sums(rank: int) -> None:
    check(rewrites("") if rank else rewrites("empty"))
    print("counts", candidate_counts([400], TOPDOptions(max_per_step=10, top_share=0.1)), flush=True)
    odd = TOPDOptions(max_per_step=9, top_share=0.1)
    most = distributed.total([sum(candidate_counts([400], odd, keys=[f"k{rank}"]))])
    print("odd", most, flush=True)
    check(rewrites("empty"))


def one(rank: int) -> None:
    if rank == 1:
        raise UserError("data.train: this rank cannot read its share")


def dies(rank: int) -> None:
    if rank == 1:
        os._exit(1)


def last(err: str) -> str:
    """Without what the C++ half of torch prints when rank 0, which holds the store, is the first to go."""
    return next(line for line in reversed(err.splitlines()) if line.startswith("onpath:"))


def test_one_empty_rewrite_is_no_reason_and_all_are_one_sentence(tmp_path: Path) -> None:
    for code, out, err in ranks(sums, tmp_path):
        assert code == 2
        told = "counts [5]\nodd [9.0]\n"
        assert out == told, "ten, or nine, over both processes; one empty rewrite of two ends nobody"
        assert last(err) == (
            "onpath: step 1: it returned no text for any of 2 attempts, so there is nothing to train on; "
            "look at it (a reasoning model may have thought for all of rollout.max_new_tokens)"
        )


def test_an_error_of_one_rank_is_everybodys_sentence(tmp_path: Path) -> None:
    for code, _, err in ranks(one, tmp_path):
        assert (code, last(err)) == (2, "onpath: data.train: this rank cannot read its share")


def test_a_rank_that_dies_is_told_in_a_sentence(tmp_path: Path) -> None:
    (code, _, err), _ = ranks(dies, tmp_path)
    assert code == 2
    assert last(err).startswith("onpath: another process of this run has ended before its time")
    assert "Traceback" not in err


def slow(rank: int) -> None:
    with distributed.one_fate():
        distributed.start(torch.device("cpu"), timeout=5.0)
        if rank == 1:
            time.sleep(8.0)
        distributed.barrier()


def test_one_that_is_late_is_not_called_dead(tmp_path: Path) -> None:
    (code, _, err), _ = forked(slow, tmp_path)
    assert code == 2
    assert "was not heard of for parallel.timeout seconds" in last(err)


def ends(rank: int) -> None:
    with distributed.one_fate():
        distributed.start(torch.device("cpu"), timeout=30.0)
        distributed.barrier()
        if rank == 1:
            time.sleep(0.5)


def test_a_good_end_says_nothing(tmp_path: Path) -> None:
    """Whoever holds the store is the last to leave."""
    for code, out, err in forked(ends, tmp_path):
        assert (code, out) == (0, "")
        assert "frame #" not in err


def test_what_one_process_alone_says(monkeypatch: pytest.MonkeyPatch) -> None:
    empty = Trajectory(
        student_context=(1,), teacher_context=(1,), response=(2,), edit=Edit(kind="r", reason="empty")
    )
    monkeypatch.setattr(distributed, "total", lambda values, device=None: [2 * v for v in values])
    with pytest.raises(UserError, match="any of 2 attempts"):
        check_generated([empty], step=0, who="it", of="attempts", look="it")
    with pytest.raises(UserError, match="mine"), distributed.one_fate():
        raise UserError("mine")
    with pytest.raises(RuntimeError, match="not of a peer"), distributed.one_fate():
        raise RuntimeError("not of a peer")
    assert not torch.distributed.is_initialized()


def test_who_still_joins_the_group_hears_why_another_has_left_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The last to join finds its line closed: what ended the other is on the board all the same."""

    def joins(*_: object, **__: object) -> None:
        if os.environ["RANK"] == "1":
            time.sleep(0.5)
            raise torch.distributed.DistNetworkError("connection closed by peer")

    monkeypatch.setattr(torch.distributed, "init_process_group", joins)

    def run(rank: int) -> None:
        with distributed.one_fate():
            distributed.start(torch.device("cpu"), timeout=20.0)
            raise UserError("data.train: there is no file here")

    for code, _, said in forked(run, tmp_path):
        assert code == 2
        assert "onpath: data.train: there is no file here" in said

"""What a black box has answered is kept, whatever happens to the process."""

from pathlib import Path

from onpath.engines.remote.replay import Replay
from onpath.records import Completion

DONE = Completion(ids=(4, 2), logprobs=(-0.5, -0.25), finish_reason="stop")


def test_half_written_lines_are_passed_over(tmp_path: Path) -> None:
    Replay(tmp_path).put({"a": DONE})
    path = tmp_path / "process-0.jsonl"
    with path.open("a") as file:
        file.write('{"key": "b", "ids": [4')
    again = Replay(tmp_path)
    assert again.get("a") == DONE
    assert again.get("b") is None
    again.put({"c": DONE})
    assert Replay(tmp_path).get("c") == DONE

"""Golden runs: ten steps of each setting give the losses that are committed.

A change that should not alter results leaves them alone; one that should is named under *Numerics* in
CHANGELOG.md and writes them anew: `python -m tests.run.test_golden`, or with names only those. Float32 sums
differ a little between processors, hence the tolerance.
"""

import json
import sys
import tempfile
from collections.abc import Callable, Sequence
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest

from onpath.config.whole import Config
from onpath.run.log import read_lines
from onpath.training import train

GOLDEN = Path(__file__).parent / "golden"
TRD = {"method__name": "trd", "method__template": "{problem} {attempt}", "method__gate": False}
SETTINGS: dict[str, dict[str, Any]] = {
    "opd_reverse_kl": {},
    "opd_forward_kl": {"method__divergence": "forward_kl"},
    "opd_jensen_shannon": {"method__divergence": "jensen_shannon", "method__beta": 0.3},
    "opd_sampled": {"method__divergence": "sampled"},
    "opd_teacher_top8": {"method__support": "teacher_topk", "method__support_k": 8},
    "opd_sharpened": {"method__teacher_temperature": 0.25},
    "opd_lora": {"student__lora_rank": 4},
    "opsd_base": {"method__name": "opsd"},
    "opsd_ema": {"method__name": "opsd", "method__weights": "ema", "method__ema_decay": 0.9},
    "topd": {
        **{"method__name": "topd", "method__window": 4, "method__top_share": 0.2},
        "method__decide": "quantile",
    },
    "topd_by_default": {"method__name": "topd", "method__window": 4, "method__top_share": 0.2},
    "topd_upper_quartile": {
        **{"method__name": "topd", "method__window": 4, "method__top_share": 0.2, "method__mass": "row"},
        "method__decide": "upper_quartile_of_low_loss",
    },
    "topd_spliced": {
        **{"method__name": "topd", "method__window": 4, "method__plan": "spliced"},
        "method__decide": "quantile",
    },
    "branch": {"method__name": "branch", "method__branches": 2},
    "bridge": {"method__name": "bridge", "method__window": 4, "method__keep": "all"},
    "relay": {"method__name": "relay", "method__delta": 2.0},
    "truncate": {"method__name": "truncate", "method__stop_when": "low_kl", "method__window": 3},
    "trd": TRD,
    "trd_self": {**TRD, "method__teacher": "self", "method__template": "{solution} {problem} {attempt}"},
    "trd_offline_compat": {**TRD, "method__offline": True, "method__paper_compat": True},
}
COLUMNS = ("loss", "tokens", "reverse_kl_nats", "grad_norm", "lr")


def ten_steps(config: Config) -> list[dict[str, float]]:
    result = train(config, quiet=True)
    return [{k: row[k] for k in COLUMNS} for row in read_lines(result.directory / "metrics.jsonl")]


@pytest.mark.parametrize("name", SETTINGS)
def test_ten_steps_are_as_committed(name: str, tiny: Callable[..., Config]) -> None:
    rows = ten_steps(tiny(optim__steps=10, data__eval={}, **SETTINGS[name]))
    expected = json.loads((GOLDEN / f"{name}.json").read_text())
    assert len(rows) == len(expected) == 10
    for row, golden in zip(rows, expected, strict=True):
        assert row == pytest.approx(golden, rel=2e-3, abs=1e-6)


def test_settings_differ_from_each_other() -> None:
    """Each setting changes the numbers by more than the tolerance, or its golden run would prove nothing."""
    last = {n: json.loads((GOLDEN / f"{n}.json").read_text())[-1] for n in SETTINGS}
    for one, two in combinations(SETTINGS, 2):
        pairs = [(last[one][k], last[two][k]) for k in ("loss", "grad_norm")]
        assert any(abs(a - b) > 4e-3 * max(a, b) for a, b in pairs), (one, two)


def write_anew(names: Sequence[str]) -> None:
    """Writes golden files, of these settings."""
    import torch

    from onpath import config as config_module
    from tests.conftest import make_model, make_tokenizer

    torch.set_num_threads(1)
    root = Path(tempfile.mkdtemp())
    for name, model in {"student": make_model(0), "teacher": make_model(1, hidden=48)}.items():
        model.save_pretrained(root / name)
        make_tokenizer().save_pretrained(root / name)
    sums = [
        {
            "id": str(i),
            "prompt": f"{i}+{7 * i}=?",
            "answer": str(8 * i),
            "solution": f"{i} plus {7 * i} is {8 * i}",
        }
        for i in range(40)
    ]
    (root / "sums.jsonl").write_text("".join(json.dumps(r) + "\n" for r in sums))
    for name, overrides in ((name, SETTINGS[name]) for name in names):
        data: dict[str, dict[str, Any]] = {
            "student": {"model": str(root / "student"), "device": "cpu"},
            "teacher": {"model": str(root / "teacher"), "device": "cpu"},
            "data": {"train": str(root / "sums.jsonl"), "eval": {}},
            "rollout": {"prompts": 8, "max_new_tokens": 12},
            "optim": {"steps": 10, "lr": 1e-3},
            "eval": {"grader": "exact", "n": 2, "k": 2},
            "run": {"name": name, "dir": str(root), "save_every": 0, "trajectories_every": 0},
        }
        for key, value in overrides.items():
            section, _, option = key.partition("__")
            data.setdefault(section, {})[option] = value
        rows = ten_steps(config_module.build(data))
        (GOLDEN / f"{name}.json").write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    write_anew(sys.argv[1:] or list(SETTINGS))

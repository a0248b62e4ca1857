"""Damage of the files of a run; docs/make_reliability.py counts it. No torch."""

CONTENTS: dict[str, bytes | None] = {
    "empty": b"",
    "{}": b"{}\n",
    "5": b"5\n",
    "null": b"null\n",
    "list": b"[1, 2]\n",
    "text": b"what is this\n",
    "binary": b"\xff\xfe\x00\x01" * 9,
    "deep": b"[" * 3_000,
    "wrong types": b'{"step": "x", "seconds": 5, "split": [], "ci95": 3, "run": 5, "optim": []}\n',
    "a directory": None,
    "half": b"half",
}
FILES = (
    *("config.yaml", "environment.json", "metrics.jsonl", "eval.jsonl", "probes/prefix_failure.jsonl"),
    *("trajectories/step_000001.parquet", "trajectories"),
)
CHECKPOINT = "checkpoints/step_1"
OF_MODELS = {
    "model": (
        *("config.yaml", "model/config.json", "model/generation_config.json", "model/model.safetensors"),
        *("model/tokenizer.json", "model/tokenizer_config.json", "model/chat_template.jinja", "model"),
    ),
    CHECKPOINT: (
        "config.yaml",
        *(f"{CHECKPOINT}/{name}" for name in ("state.json", "inputs.json", "model.safetensors")),
        *(CHECKPOINT, "checkpoints"),
    ),
}
"""Files that a model of a run is read from: the final one, or the newest checkpoint where there is none."""
TRAIN_FILES = ("config.yaml", "metrics.jsonl", "environment.json", f"{CHECKPOINT}/state.json")
TRAIN_CONTENTS = ("{}", "5", "null", "binary", "a directory", "half", "deep")

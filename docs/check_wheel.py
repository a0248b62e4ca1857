"""Checks the built wheel: it imports by itself and lightly, and its data is inside."""

import subprocess
import sys
import zipfile
from pathlib import Path

LIGHT = """
import sys
sys.path.insert(0, sys.argv[1])
import onpath, onpath.config, onpath.records, onpath.gym
assert sys.argv[1] in onpath.__file__, onpath.__file__
heavy = [m for m in ("torch", "transformers", "datasets", "peft") if m in sys.modules]
assert not heavy, f"import onpath loads {heavy}"
"""
NEEDED = (
    "onpath/py.typed",
    "onpath/commands/report/assets/page.html",
    "onpath/gym/bundled/student/model.safetensors",
    "onpath/gym/bundled/teacher/model.safetensors",
)

if __name__ == "__main__":
    (wheel,) = sorted(Path(sys.argv[1]).glob("onpath-*.whl"))
    names = zipfile.ZipFile(wheel).namelist()
    missing = [n for n in NEEDED if n not in names]
    if missing:
        sys.exit(f"{wheel.name} lacks {', '.join(missing)}")
    subprocess.run([sys.executable, "-c", LIGHT, str(wheel)], check=True)
    print(f"{wheel.name}: {len(names)} files, {wheel.stat().st_size / 1e6:.1f} MB, import is light")

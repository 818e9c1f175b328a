# @title Set up: the same cell opens every chapter
import subprocess
import sys
from pathlib import Path

REPOSITORY, TAG = "https://github.com/your-org/llama-3.2-unsloth-t4", "v0.1.0"
places = [Path.cwd(), *Path.cwd().parents, Path("llama-3.2-unsloth-t4").resolve()]
root = next((place for place in places if (place / "helpers/environment/setup.py").is_file()), places[-1])
if not root.is_dir():  # Colab and Kaggle start in an empty folder: get the series as it was when this was written
    clone = f"git -c advice.detachedHead=false clone --quiet --depth=1 --branch={TAG} {REPOSITORY}"
    subprocess.run([*clone.split(), root], check=True)
sys.path.insert(0, str(root))
from helpers.environment import set_up  # noqa: E402 (it was not there before the line above)

set_up()

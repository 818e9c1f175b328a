# @title Set up, in every chapter · 准备，每章开头都一样
import os, subprocess  # noqa: E401

GIT = "git clone -qc advice.detachedHead=0 --depth=1 -b v0.1.0 https://github.com/your-org/llama-3.2-unsloth-t4 series"
root = next((up for up in (".", "..", "../..", "../../..") if os.path.isfile(f"{up}/helpers/base.py")), "series")
if root == "series" and not os.path.isfile("series/.git/index") and subprocess.run(GIT.split()).returncode:
    raise RuntimeError(f"`{GIT}` failed. Delete the folder `series`, if there is one, and run this cell again.")
os.chdir(root)
from helpers.environment import set_up  # noqa: E402

set_up()

"""What Unsloth writes for GGUF, brought into order."""

import shutil
from pathlib import Path

from helpers.export.plan import ExportError


def keep_gguf(folder: str | Path, *, name: str) -> list[Path]:
    """Bring what `save_pretrained_gguf` wrote into order: the GGUF files as `NAME-q8_0.gguf`, and nothing else.

    Unsloth writes them beside a 16-bit copy of the model, which was needed only to make them, and a 16-bit GGUF file.

    Args:
        folder: where it wrote to; everything in it but the quantised files is deleted.

    Returns:
        The files, largest first.

    Raises:
        ExportError: there are none.
    """
    folder = Path(folder)
    found = [path for path in folder.rglob("*.gguf") if not path.stem.upper().endswith(("BF16", "F16", "F32"))]
    if not found:
        fix = "read what Unsloth printed, and run the cell again"
        raise ExportError(folder.name, found="no quantised GGUF file", expected="at least one", fix=fix)
    kept = []
    for path in found:
        target = folder / f"{name}-{path.stem.rpartition('.')[2].lower()}.gguf"
        kept.append(path.rename(target))
    for path in folder.iterdir():
        if path not in kept:
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    return sorted(kept, key=lambda path: -path.stat().st_size)

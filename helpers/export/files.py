"""What Unsloth writes for GGUF, brought into order."""

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from helpers.export.modelfile import make_modelfile
from helpers.export.plan import ExportError
from helpers.messages import _

NAME = "model"


def keep_gguf(folder: str | Path, types: Sequence[str], model: Any, tokenizer: Any, *, context_tokens: int) -> str:
    """Bring what `save_pretrained_gguf` wrote into order: the files `model-q8_0.gguf` and so on, and a Modelfile.

    Unsloth writes them beside a 16-bit copy of the model, which was needed only to make them, and a 16-bit GGUF file.

    Args:
        folder: where it wrote to; everything in it but the quantised files is deleted.
        types: those that were asked for; the Modelfile names the first.
        context_tokens: tokens that a prompt and its reply may have.

    Returns:
        The Modelfile's text, see `make_modelfile`.

    Raises:
        ExportError: there is no such file of a type.
        ModelfileError: the chat template cannot be written as one.
    """
    folder = Path(folder)
    modelfile = make_modelfile(model, tokenizer, gguf_file=f"{NAME}-{types[0]}.gguf", context_tokens=context_tokens)
    quantised = [path for path in folder.rglob("*.gguf") if not path.stem.upper().endswith(("BF16", "F16", "F32"))]
    kept = [path.rename(folder / f"{NAME}-{path.stem.rpartition('.')[2].lower()}.gguf") for path in quantised]
    if missing := [name for name in types if folder / f"{NAME}-{name}.gguf" not in kept]:
        found, expected = _("no quantised GGUF file {types}", types=", ".join(missing)), _("one of each type")
        fix = _("read what Unsloth printed, and run the cell again")
        raise ExportError(folder.name, found=found, expected=expected, fix=fix)
    for path in folder.iterdir():
        if path not in kept:
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    (folder / "Modelfile").write_text(modelfile, encoding="utf-8")
    return modelfile

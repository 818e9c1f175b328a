"""Find the model that a reader names, before anything is loaded."""

import os
from pathlib import Path

from helpers.base import InputError
from helpers.environment.hub import choose_hub, download_from_modelscope, missing_files, require_hub, uses_modelscope
from helpers.messages import _


def find_model(name: str, *, endpoint: str = "", modelscope: bool = False, weights: bool = True) -> str:
    """What `from_pretrained` is to load, once it is sure that it can.

    Args:
        name: a name on the hub, or a folder.
        endpoint, modelscope: where models come from, see `choose_hub`.
        weights: False where only the tokenizer or the configuration is loaded, so that no weights are downloaded.

    Returns:
        The name as given; of a folder its absolute path; from ModelScope the folder that it was downloaded into.

    Raises:
        InputError: the folder holds no model; or the hub has no such model, or cannot be reached.

    Example:
        >>> find_model("unsloth/Llama-3.2-3B-Instruct")
        'unsloth/Llama-3.2-3B-Instruct'
    """
    choose_hub(endpoint, modelscope=modelscope)
    folder = Path(os.path.expanduser(name))
    if os.path.isdir(folder):  # where Path raises, for a name that is too long
        if missing := missing_files(folder):
            raise InputError(
                f"MODEL_NAME {folder}",
                found=_("a folder without {files}", files=", ".join(missing)),
                expected=_("a Hugging Face model folder"),
                fix=_("give the folder that save_pretrained wrote, or the name of a Hub repository"),
            )
        return str(folder.absolute())  # "models/mine" looks like a name on the Hub, which Unsloth asks GitHub about
    if uses_modelscope():
        return download_from_modelscope(name, weights=weights)
    require_hub(name, setting="MODEL_NAME", repo_type="model")
    return name

"""Where models and data sets come from: the Hugging Face Hub, a mirror of it, or ModelScope.

The Hub's client reads the address once, when it is imported: `choose_hub` comes before it, and imports no library.
"""

import importlib.util
import json
import os
import sys
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlsplit

from helpers.base import InputError
from helpers.messages import N_, _

HUGGING_FACE = "https://huggingface.co"
ENDPOINT, MODELSCOPE = "HF_ENDPOINT", "UNSLOTH_USE_MODELSCOPE"  # environment variables: the Hub's client's, Unsloth's
HUB_SECONDS = 5  # a hub that does not answer in this time is given up
RESTART = N_("restart the session, then run the notebook from the top")
WEIGHTS = ("*.safetensors", "*.bin")
OTHER_FORMATS = ("*.gguf", "*.pth")  # the same weights once more, for other programs

# {environment variable: (its own value, this session's choice)}
_choices: dict[str, tuple[str, str]] = {}


def choose_hub(endpoint: str = "", *, modelscope: bool = False) -> None:
    """Set where models and data sets come from; prints one sentence where something is chosen.

    A choice that is taken back leaves the environment as it was.

    Args:
        endpoint: a mirror of the Hugging Face Hub; empty for what the environment's own HF_ENDPOINT says.
        modelscope: take models from ModelScope; False for what the environment's own UNSLOTH_USE_MODELSCOPE says.

    Raises:
        InputError: no address, no package `modelscope`, or the Hub's client is loaded and has
            read another address.

    Example:
        >>> choose_hub("https://hf-mirror.com/")
        Models and data sets come from https://hf-mirror.com.
    """
    chosen = {ENDPOINT: read_endpoint(endpoint), MODELSCOPE: "1" if modelscope else ""}
    own = {name: _own_value(name) for name in chosen}
    wanted = {name: value or own[name] for name, value in chosen.items()}
    if wanted[MODELSCOPE] == "1":
        require_modelscope()
    if chosen[ENDPOINT] or wanted[ENDPOINT] != os.environ.get(ENDPOINT, ""):
        _check_loaded(wanted[ENDPOINT])
    for name, value in wanted.items():
        if value:
            os.environ[name] = value
        else:
            os.environ.pop(name, None)
        _choices.pop(name, None)
        if chosen[name]:
            _choices[name] = (own[name], value)
    if any(chosen.values()):
        mirror = wanted[ENDPOINT] or HUGGING_FACE
        if wanted[MODELSCOPE] == "1":
            print(_("Models come from ModelScope, data sets from {mirror}.", mirror=mirror))
        else:
            print(_("Models and data sets come from {mirror}.", mirror=mirror))


def read_endpoint(endpoint: object) -> str:
    """The address of a mirror without the slash at its end; "" for none.

    Example: "https://hf-mirror.com/" -> "https://hf-mirror.com"
    """
    address = str("" if endpoint is None else endpoint).strip().rstrip("/")
    expected = _("an address such as https://hf-mirror.com, or nothing")
    fix = _("correct {setting} or leave it empty", setting=ENDPOINT)
    try:
        parts = urlsplit(address)
        sound = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:  # a port that is no number, half of an IPv6 address
        sound = False
    if address and (not sound or len(address.split()) > 1 or parts.query or parts.fragment):
        raise InputError(ENDPOINT, found=repr(endpoint), expected=expected, fix=fix)
    if address and "@" in parts.netloc:  # it would be printed
        found = _("an address with a user name or a password")
        raise InputError(ENDPOINT, found=found, expected=expected, fix=fix)
    return address


def _own_value(name: str) -> str:
    """What the environment says without this session's choice; "" where it says nothing."""
    own, choice = _choices.get(name, ("", None))
    now = os.environ.get(name, "")
    return own if now == choice else now


def _check_loaded(endpoint: str) -> None:
    """Raises InputError where the Hub's client is loaded and has read another address: it never looks again."""
    wanted = endpoint.rstrip("/") or HUGGING_FACE
    loaded = getattr(sys.modules.get("huggingface_hub.constants"), "ENDPOINT", wanted)
    if loaded != wanted:
        found = _("huggingface_hub loaded with {address}", address=loaded)
        expected = _("{address} before it is loaded", address=wanted)
        raise InputError(ENDPOINT, found=found, expected=expected, fix=_(RESTART))


def uses_modelscope() -> bool:
    """Whether models come from ModelScope: what Unsloth reads too."""
    return os.environ.get(MODELSCOPE) == "1"


def missing_modelscope() -> str:
    """The line that installs ModelScope's client where it is missing, too old or broken, else ""."""
    if importlib.util.find_spec("modelscope") is None:
        return "%pip install modelscope"
    try:
        import modelscope_hub.config  # noqa: F401 (since 1.38 the client is a package of its own)
    except ImportError:
        return "%pip install -U modelscope"
    return ""


def require_modelscope() -> None:
    """Raises InputError where ModelScope's client cannot be used, with the line that installs it."""
    if line := missing_modelscope():
        raise InputError(
            "USE_MODELSCOPE",
            found=_("a package modelscope that is too old or not whole")
            if "-U" in line
            else _("no package modelscope"),
            expected=_("ModelScope's client, 1.38 or newer"),
            fix=_("run `{command}` in a new cell, then this cell again", command=line),
        )


def models_address() -> str:
    """The address that is asked for models: ModelScope's as its client computes it, a mirror's, or the Hub's.

    Example: "https://huggingface.co"
    """
    if uses_modelscope():
        from modelscope_hub.config import get_default_config

        return get_default_config().endpoint
    return os.environ.get(ENDPOINT, "").rstrip("/") or HUGGING_FACE


def model_url(name: str) -> str:
    """What answers whether a model exists.

    Example: "me/tuned" -> "https://huggingface.co/api/models/me/tuned"
    """
    return f"{models_address()}/api/{'v1/' if uses_modelscope() else ''}models/{quote(name)}"


def no_answer_fix(local: str, *, connect: str = "") -> str:
    """What helps where `models_address` does not answer."""
    connect = connect or _("connect to the network")
    other_hub = _("set USE_MODELSCOPE to False") if uses_modelscope() else mirror_fix()
    return _("{first}, {second}, or {third}", first=connect, second=other_hub, third=local)


def mirror_fix() -> str:
    """What to try with HF_ENDPOINT where the Hub, or its mirror, does not answer."""
    if os.environ.get(ENDPOINT):
        return _("correct {setting} or leave it empty", setting=ENDPOINT)
    return _("set {setting} to a mirror", setting=ENDPOINT)


def require_hub(repository: str, *, setting: str, repo_type: str = "model") -> None:
    """Make sure that a Hub repository can be had: it is in the local cache, or the Hub or its mirror says it exists."""
    from huggingface_hub import HfApi, snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        HFValidationError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
    )

    what = _("data set") if repo_type == "dataset" else _("model")
    local = _("a .jsonl file") if repo_type == "dataset" else _("a folder with a model")
    where = f"{setting} {repository}"
    try:
        snapshot_download(repository, repo_type=repo_type, local_files_only=True)
        return
    except HFValidationError:
        expected = _("{local}, or a Hub name such as owner/name", local=local)
        raise InputError(where, found=_("no such folder"), expected=expected, fix=_("correct the path")) from None
    except (LocalEntryNotFoundError, OSError):
        pass
    try:
        HfApi().repo_info(repository, repo_type=repo_type, timeout=HUB_SECONDS)
    except GatedRepoError:
        found, expected = _("a gated {what}", what=what), _("its licence accepted")
        fix = _(
            "accept it on the {what}'s page and put a token into HF_TOKEN (on Colab: the key icon, Secrets)", what=what
        )
        raise InputError(where, found=found, expected=expected, fix=fix) from None
    except RepositoryNotFoundError:
        found = _("no such repository at {address}", address=HfApi().endpoint)
        fix = _("correct the name, or give {local}", local=local)
        raise InputError(where, found=found, expected=_("a {what}", what=what), fix=fix) from None
    except Exception as error:  # the Hub's client raises its own, httpx's and the socket's errors
        fix = _("set {setting} to {local}", setting=setting, local=local)
        fix = _("{first}, {second}, or {third}", first=_("connect to the network"), second=mirror_fix(), third=fix)
        expected = _("a {what} that can be downloaded", what=what)
        raise InputError(where, found=_no_answer(HfApi().endpoint, error), expected=expected, fix=fix) from None


def _no_answer(address: str, error: object) -> str:
    """What is found where a hub does not answer; an exception is named by its type alone."""
    error = type(error).__name__ if isinstance(error, Exception) else error
    return _("no answer from {address} ({error})", address=address, error=error)


def missing_files(folder: Path, *, weights: bool = True) -> list[str]:
    """What a model's folder lacks to be loaded.

    Example: ["tokenizer_config.json", "*.safetensors"]
    """
    wanted = ["config.json", "tokenizer_config.json"]
    index = folder / "model.safetensors.index.json"
    if weights and index.is_file():
        wanted += sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    elif weights:
        wanted.append("*.safetensors")
    return [name for name in wanted if not any(folder.glob(name))]


def base_name(model: str | Path) -> str:
    """A model's name without its owner, also of a folder in a hub's cache, which is called after the revision.

    Example: "~/.cache/modelscope/models/unsloth--Llama-3.2-3B-Instruct/snapshots/master" -> "Llama-3.2-3B-Instruct"
    """
    path = Path(model)
    return path.parent.parent.name.rpartition("--")[2] if path.parent.name == "snapshots" else path.name


def hide_token(text: object) -> str:
    """A text in one line, with the reader's access token as "hf_…": an address that gives it back would show it."""
    from huggingface_hub import get_token

    line, token = " ".join(str(text).split()), get_token()
    return line.replace(token, "hf_…") if token else line


def hub_name(model: str) -> str:
    """A model's name on the hub, or "" where it is a folder.

    Example: "unsloth/Llama-3.2-3B-Instruct" -> the same, "/models/mine" -> ""
    """
    folder = model.startswith(("/", ".", "~")) or Path(model).is_dir()
    return model if model.count("/") == 1 and not folder else ""


def download_from_modelscope(name: str, *, weights: bool = True) -> str:
    """The folder into which ModelScope's client has downloaded a model; what is there already stays."""
    require_modelscope()
    from modelscope import snapshot_download

    from helpers.environment.probes import run_probe

    where, local = f"MODEL_NAME {name}", _("give a folder with a model")
    answer = run_probe("hub", model_url(name), seconds=HUB_SECONDS)
    if not answer.ok:
        try:
            folder = snapshot_download(name, local_files_only=True)
        except Exception:  # the client's own, for a model that is not here
            folder = ""
        if folder and not missing_files(Path(folder), weights=weights):
            return folder
        found, expected = (
            _no_answer(models_address(), answer.found),
            _("a {what} that can be downloaded", what=_("model")),
        )
        raise InputError(where, found=found, expected=expected, fix=no_answer_fix(local))
    try:
        return snapshot_download(name, ignore_patterns=[*OTHER_FORMATS, *(() if weights else WEIGHTS)])
    except Exception as error:  # requests' errors, the client's own and those of the disk
        raise _download_error(error, where=where, local=local) from None


def _download_error(error: Exception, *, where: str, local: str) -> InputError:
    """A failed download in one line, by the status that ModelScope answered where it did."""
    status = _status(error) or _status(error.__cause__)
    if status == 404:
        first, second = _("correct the name"), _("set USE_MODELSCOPE to False")
        fix = _("{first}, {second}, or {third}", first=first, second=second, third=local)
        found, expected = _("no such model on ModelScope"), _("a {what}", what=_("model"))
        return InputError(where, found=found, expected=expected, fix=fix)
    if status in (401, 403):
        fix = _("accept its licence on ModelScope and put a token into MODELSCOPE_API_TOKEN, or {local}", local=local)
        return InputError(where, found=_("a model that needs a token"), expected=_("one that is open"), fix=fix)
    found = _("a download that did not come to its end ({error})", error=type(error).__name__)
    fix = _("run the cell again, which goes on with it, or {local}", local=local)
    return InputError(where, found=found, expected=_("a model from {address}", address=models_address()), fix=fix)


def _status(error: Any) -> int | None:
    return getattr(error, "status_code", None) or getattr(getattr(error, "response", None), "status_code", None)

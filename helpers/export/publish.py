"""The files of a form of the model, as the Hub gets them."""

import contextlib
import json
import logging
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

from helpers.environment.hub import base_name, hide_token, hub_name
from helpers.export.plan import ExportError
from helpers.handoff.run import Run
from helpers.messages import _


def hub_files(run: Run, form: str, *, card: str, base_model: str) -> dict[str, Path | bytes]:
    """{name in the repository: file or content} of what `publish` uploads: the files that the run recorded, no others.

    The card is ours in place of the library's empty form, and an adapter names its base model as the Hub does instead
    of by the folder that it was loaded from.
    """
    folder = run.artefact(form)
    files: dict[str, Path | bytes] = {name: folder / name for name in sorted(run.facts(form)["files"])}
    files["README.md"] = card.encode()
    if "adapter_config.json" in files:
        config = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
        config["base_model_name_or_path"] = hub_name(base_model) or base_name(base_model)
        files["adapter_config.json"] = json.dumps(config, indent=2).encode()
    return files


def publish(run: Run, form: str, *, repository: str, card: str, base_model: str) -> str:
    """Upload a verified form to the Hub in one commit, with the token that the Hub's client finds.

    Before it uploads, the client lets the Hub check the card's header. Whatever the Hub answers, the token is shown as
    "hf_…": a mirror that gives it back would bring it into the notebook's outputs.

    Args:
        form: "adapter", "merged" or "gguf".
        repository: `owner/name`; made, as a private one, if it does not exist.

    Returns:
        The commit's address.

    Raises:
        ExportError: the Hub refuses the card, and nothing was uploaded; or it refuses something else.
    """
    from huggingface_hub import CommitOperationAdd, HfApi, get_token

    files = hub_files(run, form, card=card, base_model=base_model)
    operations = [CommitOperationAdd(name, content) for name, content in files.items()]
    failed = ""
    with _remarks_through(hide_token):
        try:
            api = HfApi(token=get_token())
            api.create_repo(repository, private=True, exist_ok=True)
            commit = api.create_commit(repository, operations, commit_message="Upload the tuned model")
        except Exception as error:  # the client's own, httpx's and the socket's errors
            failed = hide_token(f"{type(error).__name__}: {error}")
    if failed:  # raised here, it takes no error with it that holds the token
        where = _("publishing in {repository}", repository=repository)
        fix = _("read the Hub's words, then correct the card, PUSH_TO or the token's rights")
        raise ExportError(where, found=failed[:500], expected=_("a commit"), fix=fix)
    return hide_token(commit.commit_url)


@contextlib.contextmanager
def _remarks_through(hide: Callable[[object], str]) -> Iterator[None]:
    """What is logged or warned of in the block goes through a function first."""
    make_record = logging.getLogRecordFactory()

    def hidden(*args, **options) -> logging.LogRecord:
        record = make_record(*args, **options)
        record.msg, record.args = hide(record.getMessage()), ()
        return record

    logging.setLogRecordFactory(hidden)
    try:
        with warnings.catch_warnings(record=True) as remarks:
            yield
    finally:
        logging.setLogRecordFactory(make_record)
    for remark in remarks:
        print(hide(remark.message))

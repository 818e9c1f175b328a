"""The files of a form of the model, as the Hub gets them."""

import json
from pathlib import Path

from helpers.environment.hub import base_name
from helpers.export.card import hub_name
from helpers.handoff.run import Run


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

    Before it uploads, the client lets the Hub check the card's header.

    Args:
        form: "adapter", "merged" or "gguf".
        repository: `owner/name`; made, as a private one, if it does not exist.

    Returns:
        The commit's address.

    Raises:
        ValueError: the Hub refuses the card; nothing was uploaded.
    """
    from huggingface_hub import CommitOperationAdd, HfApi, get_token

    api = HfApi(token=get_token())
    api.create_repo(repository, private=True, exist_ok=True)
    files = hub_files(run, form, card=card, base_model=base_model)
    operations = [CommitOperationAdd(name, content) for name, content in files.items()]
    return api.create_commit(repository, operations, commit_message="Upload the tuned model").commit_url

"""The chapters: the only place that names them. To add one, write its source in notebooks/src and a row here."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Chapter:
    """One notebook of the series.

    Attributes:
        name: of its source and notebook, such as "04_train".
        title: its heading.
        needs: the artefacts of the run folder that it reads.
        writes: the artefacts that it hands on; each belongs to those before it.
        trains: what it hands on took training, and is never deleted, only set aside.
    """

    name: str
    title: str
    needs: tuple[str, ...] = ()
    writes: tuple[str, ...] = ()
    trains: bool = False


CHAPTERS = (
    Chapter("00_quickstart", "Fine-tune Llama 3.2 in one notebook"),
    Chapter("01_install", "Install Unsloth and check the machine"),
    Chapter("02_load_and_lora", "Load the model in 4-bit and add LoRA"),
    Chapter("03_data", "Turn your conversations into training text", writes=("dataset",)),
    Chapter(
        "04_train",
        "Train on the answers only, and prove that it learned",
        needs=("dataset",),
        writes=("adapter", "report.json", "report.html"),
        trains=True,
    ),
    Chapter("05_infer", "Talk to the tuned model", needs=("dataset", "adapter", "report.json")),
    Chapter(
        "06_save",
        "Save, merge, export to GGUF, reload and verify",
        needs=("dataset", "adapter", "report.json"),
        writes=("merged", "gguf", "README.md"),
    ),
    Chapter("07_when_it_goes_wrong", "Read a run that did not work"),
    Chapter("08_scale_up", "Train on more than one GPU", needs=("dataset",), writes=("settings.json",)),
)
CHAPTER_NAMES = tuple(chapter.name for chapter in CHAPTERS)


def producer_of(artefact: str) -> Chapter:
    """The chapter that hands an artefact on; the last one where none says so. Example: `"adapter"` -> 04_train's."""
    return next((chapter for chapter in CHAPTERS if artefact in chapter.writes), CHAPTERS[-1])


def chapter_of(name: str) -> Chapter:
    """The chapter of a name; for "" one that needs and writes nothing. KeyError for a name that no chapter has."""
    return {"": Chapter("", ""), **{chapter.name: chapter for chapter in CHAPTERS}}[name]

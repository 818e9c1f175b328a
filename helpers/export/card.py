"""The model card, from what the run recorded."""

import html
import json
import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from helpers.base import InputError, text_table
from helpers.environment.hub import base_name, hub_name
from helpers.handoff.manifest import identity
from helpers.handoff.run import Run
from helpers.messages import _, in_english
from helpers.training.report import LORA_SETTINGS
from helpers.training.report import SETTINGS as TRAINER_SETTINGS

TEMPLATE = Path(__file__).with_name("card.md")  # in Jinja's language
# A base model's name begins with this -> (its licence on the Hub, what its licence asks of your card)
LICENCES = {
    "llama-3.2": ("llama3.2", "Built with Llama. The Llama 3.2 Community License applies, and its use policy."),
    "llama-3.1": ("llama3.1", "Built with Llama. The Llama 3.1 Community License applies, and its use policy."),
    "smollm2": ("apache-2.0", "The base model is under the Apache License 2.0."),
}
OTHER_LICENCE = ("other", "The base model's licence applies; look it up before you publish.")
USE = {
    "adapter": """from unsloth import FastLanguageModel

model, tokenizer = FastLanguageModel.from_pretrained({name}, load_in_4bit=True)""",
    "merged": """from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained({name}, dtype="auto")
tokenizer = AutoTokenizer.from_pretrained({name})""",
    "gguf": """ollama create my-model -f Modelfile
ollama run my-model""",
}
# A script that one language of the many readers has to itself, and the words that a text in Latin letters is known by.
SCRIPTS = {"HIRAGANA": "ja", "KATAKANA": "ja", "CJK": "zh", "HANGUL": "ko", "GREEK": "el", "HEBREW": "he", "THAI": "th"}
COMMON_WORDS = {
    "en": "the and is of to you it that for with this not",
    "de": "der die das und ist nicht ein eine zu mit sie den",
    "fr": "le la les et est des un une vous pas pour que",
    "es": "el los las es un una que por para con del su",
    "it": "il di che è un una per non con della sono si",
    "pt": "o os as é um uma que não para com você do",
    "nl": "de het een en is van niet dat voor met je zijn",
}
SURE = 0.05  # of a text's words are among the common ones of its language; 15 to 30 % are usual
LIBRARIES = {"adapter": "peft", "merged": "transformers", "gguf": "llama.cpp"}


class CardError(InputError):
    """A model card that the Hub would refuse."""


def languages_of(texts: Iterable[str]) -> list[str]:
    """The language that texts are in, as ISO 639-1 names it; none where it is not plain.

    By the letters where a script is one language's alone, else by the commonest words: those of one language must be
    `SURE` of all words, and twice as many as those of any other.

    Example: ["Wo ist das Handbuch?", "Sie finden es mit dem Gerät."] -> ["de"]
    """
    text = " ".join(texts).lower()
    scripts = Counter(unicodedata.name(letter, "").partition(" ")[0] for letter in text if letter.isalpha())
    letters = scripts.total()
    foreign = Counter({name: scripts[script] for script, name in SCRIPTS.items() if scripts[script]})
    if "ja" in foreign and foreign["ja"] > 0.1 * letters:  # kanji beside kana
        return ["ja"]
    if foreign and foreign.most_common(1)[0][1] > 0.5 * letters:
        return [foreign.most_common(1)[0][0]]
    words = re.findall(r"[^\W\d_]+", text)
    shares = {name: sum(word in set(common.split()) for word in words) for name, common in COMMON_WORDS.items()}
    (name, most), (_, next_most) = Counter(shares).most_common(2)
    return [name] if most > SURE * len(words) and most >= 2 * next_most else []


def make_model_card(run: Run, *, form: str, name: str, base_model: str, exports: Any = None) -> str:
    """The card's text: base model and licence, data, settings, versions, metrics, how to use it, limits.

    Data, settings and metrics are those of the training, from `report.json`, not those of the present choices.

    Args:
        run: holds `adapter` and `report.json`.
        form: "adapter", "merged" or "gguf": how the card says to load it.
        name: `owner/name` on the Hub; or a name of your own, and then the card loads the form's folder.
        base_model: the name on the hub or the folder; of a folder only its name is written.
        exports: the `ExportReport` of chapter 06.

    Raises:
        CardError: the card does not pass `check_model_card`.
    """
    from huggingface_hub import ModelCard

    base, report = base_name(base_model), run.read_json("report.json")
    starts = (both for start, both in LICENCES.items() if base.lower().startswith(start))
    licence, terms = next(starts, OTHER_LICENCE)
    metrics = _metrics(report)
    name = one_line(name)
    place, title = name if "/" in name else f"./{form}", name.rpartition("/")[2]
    with in_english():
        verdicts = "" if exports is None else repr(exports)
    card = ModelCard.from_template(
        _header(report, metrics, _answers(run), title=title, form=form, licence=licence, hub=hub_name(base_model)),
        template_str=TEMPLATE.read_text(encoding="utf-8"),
        title=as_markdown(title),
        base=as_markdown(base),
        form=form,
        terms=terms,
        data={name: as_markdown(text) for name, text in report["data"].items()},
        settings=_lines(_settings(report)),
        results=text_table(["", "before", "after"], [[n, f"{b:.3f}", f"{a:.3f}"] for n, b, a in metrics]),
        exports=verdicts,
        use=USE[form].format(name=json.dumps(place, ensure_ascii=False)),
        versions=_lines({"adapter": identity(run.facts("adapter")), **run.facts("adapter")["versions"]}),
    )
    return check_model_card(str(card) + "\n")


def one_line(text: object) -> str:
    """A text from outside in one line: whatever ends a line, or cannot be seen, becomes a space."""
    return " ".join("".join(letter if letter.isprintable() else " " for letter in str(text)).split())


def as_markdown(text: object) -> str:
    """A text from outside as Markdown that shows it as it is, in one line: no HTML, no list, no code, no link.

    Example: "my <b>`best`</b> model" -> "my &lt;b&gt;\\`best\\`&lt;/b&gt; model", "me/Llama-3.2" -> the same
    """
    line = html.escape(one_line(text), quote=False)
    line = re.sub(r"[\\`*\[\]~|$]|(?<![^\W_])_|_(?![^\W_])|^#|#$", r"\\\g<0>", line)
    list_or_line = r"^(?:[-+=:]|\d(?=\d*(?:[.)](?:\s|$)|$)))"
    return re.sub(list_or_line, lambda found: f"&#{ord(found[0])};", line)


def _metrics(report: Mapping[str, Any]) -> list[tuple[str, float, float]]:
    """(name, before, after) of what the run measured."""
    counted = (("replies in house style", "house_style"), ("replies with the right help", "right_help"))
    metrics = [("held-out loss", report["held_out_loss"]["before"], report["held_out_loss"]["after"])]
    return metrics + [(label, report[key]["before"], report[key]["after"]) for label, key in counted if report.get(key)]


def _answers(run: Run) -> list[str]:
    """The held-out answers, or none where the run folder has no data any more."""
    from datasets import load_from_disk

    try:
        held_out = load_from_disk(str(run.path / "dataset"))["held_out"]["conversations"]
    except FileNotFoundError:
        return []
    return [turn["content"] for turns in held_out for turn in turns if turn["role"] == "assistant"]


def _header(
    report: Mapping[str, Any], metrics: list, answers: list[str], *, title: str, form: str, licence: str, hub: str
) -> Any:
    from huggingface_hub import EvalResult, ModelCardData

    data_name = one_line(report["data"]["dataset"])
    results = [
        EvalResult(
            task_type="text-generation",
            dataset_type=data_name,
            dataset_name=f"{data_name}, held out",
            metric_type=label.replace(" ", "_").replace("-", "_"),
            metric_value=round(after, 4),
        )
        for label, _, after in metrics
    ]
    return ModelCardData(
        model_name=title,
        base_model=one_line(hub) or None,
        datasets=[data_name] if data_name.count("/") == 1 else None,
        library_name=LIBRARIES[form],
        license=licence,
        license_name="see-the-base-model" if licence == "other" else None,
        language=languages_of(answers) or None,
        pipeline_tag="text-generation",
        tags=["unsloth", "lora", "conversational"],
        eval_results=results,
    )


def _settings(report: Mapping[str, Any]) -> dict[str, Any]:
    given = report["settings"]
    settings = {name: given[name] for name in (*LORA_SETTINGS, *TRAINER_SETTINGS) if name in given}
    settings["target_modules"] = ", ".join(given.get("target_modules", ()))
    return settings | {"precision": report["environment"]["precision"], "steps": report["steps"]}


def _lines(facts: Mapping[str, Any]) -> str:
    return "\n".join(one_line(f"{name}: {value}") for name, value in facts.items())


def check_model_card(text: str) -> str:
    """Read a card as `huggingface_hub` does, its results included; returns it unchanged.

    The Hub's own check of the header needs a connection: `publish` asks it before it uploads.

    Raises:
        CardError: the header cannot be read, or has no licence.
    """
    from huggingface_hub import ModelCard

    where, fix = _("model card"), _("correct the header between the two lines of ---")
    try:
        card = ModelCard(text, ignore_metadata_errors=False)
        header = card.data.to_dict()
    except Exception as error:  # yaml's errors, and the client's own
        raise CardError(where, found=f"{error}".splitlines()[0], expected=_("a header"), fix=fix) from None
    if not header.get("license"):
        raise CardError(where, found=_("no licence"), expected=_("license: …"), fix=fix)
    return text

"""Tokenizers to test with: the real ones of Llama 3 and SmolLM2, and small ones made here for seven more templates.

The small ones are built as their models' are (byte-level or SentencePiece, legacy prefix space or not, BOS put in front
or not), and trained on a few sentences; their chat templates are the ones that Unsloth ships.
"""

import base64
import importlib.util
import json
import pathlib
from dataclasses import dataclass

CORPUS = [
    "What is the capital of France? The capital of France is Paris.",
    "Please write a function that adds two numbers:\n\ndef add(a, b):\n    return a + b\n",
    "assistant user system model INST answer question You are a helpful assistant.",
    "Über café naïve 日本語 😀 <b>bold</b> & more, 2024.",
]
WHITE_SPACE = (("▁", "merged_with_next"), ("\n", "isolated"))


@dataclass(frozen=True)
class Kind:
    """How a tokenizer is built, and what its template writes around an answer."""

    template: str
    before_answer: str
    end: str
    before_question: str
    special: tuple[str, ...]  # bos, eos, pad first; None where there is none
    sentencepiece: str = ""  # "llama" puts a space in front of each text, "gemma" does not; else byte-level
    adds_bos: bool = False
    eats_space: bool = False  # special tokens swallow the white space behind them, as Phi-3's do


KINDS = {
    "chatml": Kind(
        "chatml", "<|im_start|>assistant\n", "<|im_end|>", "<|im_start|>user\n",
        (None, "<|im_end|>", "<|pad|>", "<|im_start|>"),
    ),
    "gemma": Kind(
        "gemma", "<start_of_turn>model\n", "<end_of_turn>", "<start_of_turn>user\n",
        ("<bos>", "<end_of_turn>", "<pad>", "<start_of_turn>"), "gemma", adds_bos=True,
    ),
    "mistral": Kind(
        "mistral", " [/INST]", "</s>", "[INST] ", ("<s>", "</s>", "<pad>"), "llama", adds_bos=True,
    ),
    "phi-3": Kind(
        "phi-3", "<|assistant|>\n", "<|end|>", "<|user|>\n",
        ("<s>", "<|end|>", "<|endoftext|>", "<|user|>", "<|assistant|>", "<|system|>"), "llama", eats_space=True,
    ),
    "phi-4": Kind(
        "phi-4", "<|im_start|>assistant<|im_sep|>", "<|im_end|>", "<|im_start|>user<|im_sep|>",
        ("<|endoftext|>", "<|im_end|>", "<|dummy|>", "<|im_start|>", "<|im_sep|>"),
    ),
    "qwen": Kind(
        "qwen-2.5", "<|im_start|>assistant\n", "<|im_end|>", "<|im_start|>user\n",
        (None, "<|im_end|>", "<|endoftext|>", "<|im_start|>"),
    ),
    "qwen3": Kind(
        "qwen3", "<|im_start|>assistant\n", "<|im_end|>", "<|im_start|>user\n",
        (None, "<|im_end|>", "<|endoftext|>", "<|im_start|>"),
    ),
    "zephyr": Kind(
        "zephyr", "<|assistant|>\n", "</s>", "<|user|>\n", ("<s>", "</s>", "<pad>"), "llama", adds_bos=True,
    ),
}  # fmt: skip
LLAMA = Kind(
    "llama-3.1",
    "<|start_header_id|>assistant<|end_header_id|>\n\n",
    "<|eot_id|>",
    "<|start_header_id|>user<|end_header_id|>\n\n",
    ("<|begin_of_text|>", "<|eot_id|>", "<|finetune_right_pad_id|>"),
    adds_bos=True,
)
SMOLLM2 = Kind(
    "", "<|im_start|>assistant\n", "<|im_end|>", "<|im_start|>user\n", ("<|im_start|>", "<|im_end|>", "<|endoftext|>")
)
ALL_KINDS = {"llama-3.1": LLAMA, "smollm2": SMOLLM2, **KINDS}


def chat_template(name: str) -> str:
    """Unsloth's template, with its own default system message filled in."""
    from unsloth.chat_templates import CHAT_TEMPLATES, _change_system_message

    return _change_system_message(CHAT_TEMPLATES[name][0], name, None)[0]


def pinned(template: str) -> str:
    """The template with the date that chapter 03 writes into it."""
    return ('{%- set date_string = "26 July 2024" %}' if "date_string" in template else "") + template


def build(name: str):
    """The tokenizer of `ALL_KINDS[name]`, its template's date pinned as chapter 03 does."""
    if name == "smollm2":
        from transformers import AutoTokenizer

        from tests.maintain.smollm2 import prepare_smollm2

        return AutoTokenizer.from_pretrained(prepare_smollm2())
    kind = ALL_KINDS[name]
    tokenizer = llama3() if name == "llama-3.1" else _wrap(_small(kind), kind)
    tokenizer.chat_template = pinned(chat_template(kind.template))
    return tokenizer


def llama3():
    """Llama 3's tokenizer, from the vocabulary in the package `llama-models`, with the template still to be set."""
    from tokenizers import Tokenizer, models
    from transformers.convert_slow_tokenizer import TikTokenConverter, bytes_to_unicode

    package = pathlib.Path(importlib.util.find_spec("llama_models").origin).parent
    lines = (package / "llama3/tokenizer.model").read_bytes().splitlines()
    letters = dict(bytes_to_unicode())
    ranks = {base64.b64decode(token): int(rank) for token, rank in (line.split() for line in lines)}

    def spelled(token: bytes) -> str:
        return token.decode("latin-1").translate(letters)

    class Converter(TikTokenConverter):  # its own way to the vocabulary needs tiktoken
        def tokenizer(self):
            merges = []
            for token, rank in ranks.items():
                splits = [(token[:i], token[i:]) for i in range(1, len(token))]
                splits = sorted(((ranks[a], ranks[b]), a, b) for a, b in splits if a in ranks and b in ranks)
                merges += [(rank, spelled(a), spelled(b)) for _, a, b in splits]
            merges.sort(key=lambda merge: merge[0])
            vocabulary = {spelled(token): rank for token, rank in ranks.items()}
            return Tokenizer(
                models.BPE(vocabulary, [merge[1:] for merge in merges], fuse_unk=False, ignore_merges=True)
            )

    named = ["begin_of_text", "end_of_text", "reserved_special_token_0", "reserved_special_token_1"]
    named += ["finetune_right_pad_id", "step_id", "start_header_id", "end_header_id", "eom_id", "eot_id", "python_tag"]
    named += ["image"]
    named += [f"reserved_special_token_{i}" for i in range(2, 2 + 256 - len(named))]
    special = [f"<|{name}|>" for name in named]
    return _wrap(Converter(extra_special_tokens=special).converted(), LLAMA)


def _small(kind: Kind):
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

    if kind.sentencepiece:
        backend = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
        space = normalizers.Replace(" ", "▁")
        start = [normalizers.Prepend("▁")] if kind.sentencepiece == "llama" else []
        backend.normalizer = normalizers.Sequence([*start, space])
        steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
        backend.decoder = decoders.Sequence(steps + [decoders.Strip(" ", 1, 0)] * bool(start))
        # SentencePiece's own training does not merge over a space or a newline
        words, lines = (pre_tokenizers.Split(Regex(mark), how) for mark, how in WHITE_SPACE)
        backend.pre_tokenizer = pre_tokenizers.Sequence([words, lines])
        base = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256))]
        trainer = trainers.BpeTrainer(vocab_size=len(base) + 400, special_tokens=base, show_progress=False)
    else:
        backend = Tokenizer(models.BPE())
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        backend.decoder = decoders.ByteLevel()
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        trainer = trainers.BpeTrainer(vocab_size=600, initial_alphabet=alphabet, show_progress=False)
    backend.train_from_iterator(CORPUS * 3, trainer)
    if kind.sentencepiece:
        # training needs the byte tokens as special tokens, but in SentencePiece they are ordinary pieces
        model = json.loads(backend.to_str())["model"]
        merges = [tuple(merge) for merge in model["merges"]]
        trained = backend
        backend = Tokenizer(models.BPE(model["vocab"], merges, byte_fallback=True, unk_token="<unk>", fuse_unk=True))
        backend.normalizer, backend.decoder = trained.normalizer, trained.decoder
    backend.add_special_tokens(
        [AddedToken(token, normalized=False, special=True, rstrip=kind.eats_space) for token in kind.special if token]
    )
    return backend


def _wrap(backend, kind: Kind):
    from tokenizers.processors import TemplateProcessing
    from transformers import PreTrainedTokenizerFast

    bos, eos, pad = kind.special[:3]
    if kind.adds_bos:
        backend.post_processor = TemplateProcessing(
            single=f"{bos} $A", pair=f"{bos} $A {bos} $B", special_tokens=[(bos, backend.token_to_id(bos))]
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token=bos, eos_token=eos, pad_token=pad, clean_up_tokenization_spaces=False
    )

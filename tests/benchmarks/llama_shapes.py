"""Llama 3.2's shapes with random weights: for speed and memory only the shape matters, and nothing is downloaded."""

PARAMETERS = {"1B": 1_235_814_400, "3B": 3_212_749_824}
SHAPES = {
    "tiny": dict(hidden_size=256, intermediate_size=512, num_hidden_layers=2, num_attention_heads=8, head_dim=32),
    "1B": dict(hidden_size=2048, intermediate_size=8192, num_hidden_layers=16, num_attention_heads=32, head_dim=64),
    "3B": dict(hidden_size=3072, intermediate_size=8192, num_hidden_layers=28, num_attention_heads=24, head_dim=128),
}


def llama_config(shape: str):
    """The configuration of Llama 3.2 (`meta-llama/Llama-3.2-1B`, `-3B`), or of a tiny model for a dry run."""
    from transformers import LlamaConfig

    rope = {"rope_type": "llama3", "rope_theta": 500_000.0, "factor": 32.0, "low_freq_factor": 1.0}
    rope |= {"high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
    return LlamaConfig(
        **SHAPES[shape],
        num_key_value_heads=8,
        vocab_size=128_256 if shape != "tiny" else 49_152,
        tie_word_embeddings=True,
        max_position_embeddings=131_072,
        rope_parameters=rope,
        rms_norm_eps=1e-5,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=3,
    )


def save_model(shape: str, folder: str) -> None:
    """Save a model of this shape with random bfloat16 weights, and a word-level tokenizer."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        model = LlamaForCausalLM(llama_config(shape))
    torch.set_default_dtype(torch.float32)
    model.save_pretrained(folder)
    words = ["<unk>", "<s>", "</s>", "<pad>", *(f"w{number}" for number in range(28_000))]
    tokenizer = Tokenizer(models.WordLevel({word: number for number, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    special = dict(unk_token="<unk>", bos_token="<s>", eos_token="</s>", pad_token="<pad>")
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special).save_pretrained(folder)

"""A model's weights: how many LoRA trains, which of them moved, and whether the frozen ones did."""

import hashlib
from collections.abc import Iterator
from typing import Any


def frozen_checksum(model: Any) -> int:
    """A checksum over every weight that is not trained: equal before and after training.

    It is a sum over all bits, as 32-bit numbers, so that it does not notice when such numbers change places. Of a 4-bit
    weight it covers the scales too (bitsandbytes' `quant_state`), without which the 4 bits mean nothing.
    """
    import torch

    total = 0
    for tensor in _frozen_tensors(model):
        data = tensor.detach().contiguous().flatten().view(torch.uint8)
        words = data[: data.numel() // 4 * 4].view(torch.int32)
        total += int(words.sum(dtype=torch.int64)) + int(data[data.numel() // 4 * 4 :].sum(dtype=torch.int64))
    return total


def _frozen_tensors(model: Any) -> Iterator[Any]:
    """The weights that are not trained, and the scales of those that are in 4 bits."""
    for parameter in model.parameters():
        if not parameter.requires_grad:
            yield parameter
            state = getattr(parameter, "quant_state", None)
            if state is not None:
                yield state.absmax
                if state.nested:  # the scales are quantised themselves ("double quantisation")
                    yield from (state.state2.absmax, state.offset)


def count_changed_adapters(model: Any) -> tuple[int, int]:
    """(how many LoRA B matrices are not zero, how many there are). All are zero before training."""
    matrices = [parameter for name, parameter in model.named_parameters() if "lora_B" in name]
    return sum(bool(parameter.detach().any()) for parameter in matrices), len(matrices)


def adapter_checksum(model: Any) -> str:
    """16 digits that name the values of all trained weights: equal on two processes that trained the same."""
    import torch

    digest = hashlib.sha256()
    for parameter in model.parameters():
        if parameter.requires_grad:
            digest.update(parameter.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]

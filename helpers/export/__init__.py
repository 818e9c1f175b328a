"""Give the model away: does it fit, GGUF files, a model card, and proof that what was saved is what was trained."""

from helpers.export.card import make_model_card, publish
from helpers.export.gguf import use_llama_cpp
from helpers.export.modelfile import make_modelfile, write_modelfile
from helpers.export.plan import (
    check_adapter,
    check_push,
    count_parameters,
    hub_token,
    keep_gguf,
    list_files,
    plan_export,
    read_gguf_types,
    require_16_bit,
)
from helpers.export.probe import SavedForm, probe_gguf, probe_in_fresh_processes, probe_model
from helpers.export.verify import compare_exports

"""Give the model away: does it fit, GGUF files, a model card, and proof that what was saved is what was trained."""

from helpers.export.card import make_model_card
from helpers.export.files import keep_gguf
from helpers.export.gguf import serve_gguf
from helpers.export.plan import plan_export
from helpers.export.probe import probe_model
from helpers.export.publish import publish
from helpers.export.verify import verify_exports

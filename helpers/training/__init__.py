"""Around the trainer: curves, checkpoints, and evidence that the model learned."""

from helpers.training.best import keep_best
from helpers.training.checkpoints import Checkpoints
from helpers.training.curves import live_plot
from helpers.training.divergence import stop_on_divergence
from helpers.training.evidence import check_evidence
from helpers.training.held_out import held_out_losses
from helpers.training.loaded import check_loaded
from helpers.training.report import write_report

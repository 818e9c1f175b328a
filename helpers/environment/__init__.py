"""Is this machine ready? Set it up, check it, and find the model."""

from helpers.environment.hub import choose_hub
from helpers.environment.preflight import check_environment
from helpers.environment.setup import set_up

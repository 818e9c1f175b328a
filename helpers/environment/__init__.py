"""Is this machine ready? Set it up, check it, check the choices, and find the model."""

from helpers.environment.choices import check_choices
from helpers.environment.models import find_model
from helpers.environment.preflight import check_environment
from helpers.environment.setup import set_up

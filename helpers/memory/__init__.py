"""Memory and time: measured, predicted, and what to do where they do not suffice."""

from helpers.memory.fit import fit_into_memory
from helpers.memory.plan import plan_batch
from helpers.memory.stats import track_memory

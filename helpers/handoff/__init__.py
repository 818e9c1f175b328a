"""What one chapter hands to the next."""

from helpers.handoff.run import open_run

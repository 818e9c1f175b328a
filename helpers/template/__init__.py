"""The chat template: what it writes, and whether tokenizer and model agree with it."""

from helpers.template.check import check_template

"""Conversations before they are rendered: found and checked."""

from helpers.conversations.source import find_dataset
from helpers.conversations.validate import validate_conversations

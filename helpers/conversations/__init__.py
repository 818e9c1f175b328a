"""Conversations before they are rendered: read, checked, split."""

from helpers.conversations.validate import split_conversations, validate_conversations

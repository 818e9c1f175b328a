"""Conversations before they are rendered: read from any common form, and checked row by row."""

from helpers.conversations.read import read_conversations, validate_conversations

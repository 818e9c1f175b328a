"""Ask the model: replies at once or streamed, and a chat box."""

from helpers.chat.box import ChatBox
from helpers.chat.replies import stream_reply

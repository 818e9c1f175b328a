"""Ask the model: replies at once or streamed, and a chat box."""

from helpers.chat.box import ChatBox
from helpers.chat.house_style import judge_reply
from helpers.chat.replies import (
    batch_replies,
    compare_replies,
    count_tokens,
    print_text,
    stop_tokens,
    stream_reply,
    trim_conversation,
)

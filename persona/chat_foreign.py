"""What chat clients put into the user's role that is not the user's: tasks of their own, and documents.

Both are answered and never history: nobody's words but the user's train.
"""

import re

from persona.domain import Message, Role

# What chat clients ask on their own account, in the user's role: title, tags, follow-ups, search queries.
_TASKS = tuple(
    re.compile(pattern, re.IGNORECASE | re.DOTALL)
    for pattern in (
        r"\s*### Task:\s.*<(?:/?chat_history|type)>",  # Open WebUI, every task of it
        r"\s*(?:### Task:\s*)?Generate (?:a concise, 3-5 word title|1-3 broad tags)\b",
        r"\s*Create a concise, 3-5 word (?:phrase|title)\b",  # Open WebUI before 0.5
        r"\s*Your task is to reflect the speaker's likely facial expression through a fitting emoji",
        r"\s*Provide a concise, 5-word-or-less title for the conversation",  # LibreChat
        r"\s*Based on the chat history, give this conversation a name\b",  # Chatbox
    )
)
_QUOTING = re.compile(r"\s*### Task:\s", re.IGNORECASE)  # Open WebUI, before what was found or attached, and a question
_FOUND = ("<context>", "</context>")


def is_task(messages: tuple[Message, ...]) -> bool:
    """Whether a client asks on its own account, say for a title: answered, never history."""
    last = messages[-1] if messages else None
    return last is not None and last.role is Role.USER and any(task.match(last.text) for task in _TASKS)


def is_foreign(messages: tuple[Message, ...]) -> bool:
    """Whether what stands in the user's role is, wholly or for the most part, not the user's."""
    return is_task(messages) or any(message.role is Role.USER and documents(message.text) for message in messages)


def documents(text: str) -> int:
    """Where the documents end that a client put before its user's question; 0 without any."""
    if not (begun := _QUOTING.match(text)) or (start := text.find(_FOUND[0], begun.end())) < 0:
        return 0
    end = text.rfind(_FOUND[1])
    return end + len(_FOUND[1]) if end > start else 0

"""Conversations that go on: sessions, what they keep, and an assistant with a personality."""

from minicpmv.chat.history import HistoryError
from minicpmv.chat.session import ChatSession, SessionBusyError, SessionError, SessionFullError


__all__ = ["ChatSession", "HistoryError", "SessionBusyError", "SessionError", "SessionFullError"]

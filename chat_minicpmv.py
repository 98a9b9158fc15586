class ChatMixin:
    pass

"""What processes say to each other and where they meet: launch, step messages, calls, live mask, liveness page.

Imports ipc. Start with `messages.py`.
"""

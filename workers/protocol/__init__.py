"""What processes say to each other and where they meet: step messages, calls, live mask, liveness page.

Imports ipc. Start with `messages.py`.
"""

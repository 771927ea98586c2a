"""What processes send to each other and the memory they share: launch, step messages, calls, live mask, liveness page.

Imports ipc. Start with `messages.py`.
"""

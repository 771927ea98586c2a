"""MessageQueue: one writer, many readers, over shared memory or ZeroMQ.

Imports ipc. Start with `message_queue.py`.
"""

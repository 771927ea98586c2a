"""What a model's answer says: reasoning, text and tool calls, taken apart while it is generated. Pure.

Start at `reader.py`; a format of tool calls is an entry in `formats.py`.
"""

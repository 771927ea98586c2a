"""Chat templates in the styles that checkpoints come with, written anew: each uses something that the others do not."""

from __future__ import annotations

CHATML = """\
{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}\
{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"""

CHATML_WITH_DEFAULT_SYSTEM = """\
{%- if messages[0].role != 'system' %}
    {{- '<|im_start|>system\nYou are helpful.<|im_end|>\n' }}
{%- endif %}
{%- for m in messages %}
    {{- '<|im_start|>' ~ m.role ~ '\n' ~ m.content | trim ~ '<|im_end|>\n' }}
{%- endfor %}
{{- '<|im_start|>assistant\n' if add_generation_prompt else '' }}"""

LLAMA2 = """\
{% if messages[0]['role'] == 'system' %}{% set rest = messages[1:] %}{% set system = messages[0]['content'] %}\
{% else %}{% set rest = messages %}{% set system = false %}{% endif %}\
{% for m in rest %}{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}\
{{ raise_exception('Roles must alternate user/assistant/user/assistant/...') }}{% endif %}\
{% if loop.index0 == 0 and system %}{% set content = '<<SYS>>\n' + system + '\n<</SYS>>\n\n' + m['content'] %}\
{% else %}{% set content = m['content'] %}{% endif %}\
{% if m['role'] == 'user' %}{{ bos_token + '[INST] ' + content.strip() + ' [/INST]' }}\
{% elif m['role'] == 'assistant' %}{{ ' ' + content.strip() + ' ' + eos_token }}{% endif %}{% endfor %}"""

LLAMA3 = """\
{{- bos_token }}
{%- if not date_string is defined %}{%- set date_string = strftime_now("%Y") %}{%- endif %}
{%- if not tools_in_user_message is defined %}{%- set tools_in_user_message = true %}{%- endif %}
{%- if messages[0]['role'] == 'system' %}
    {%- set system_message = messages[0]['content']|trim %}{%- set messages = messages[1:] %}
{%- else %}{%- set system_message = "" %}{%- endif %}
{{- "<|start_header_id|>system<|end_header_id|>\n\n" }}
{{- "Today Date: " + date_string + "\n\n" }}
{{- system_message + "<|eot_id|>" }}
{%- if tools is not none %}
    {{- "Environment: ipython\n" }}
    {%- for t in tools %}{{- t | tojson(indent=4) }}{{- "\n\n" }}{%- endfor %}
{%- endif %}
{%- for message in messages %}
    {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n'+ message['content'] | trim + '<|eot_id|>' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{%- endif %}"""

MISTRAL_WITH_TOOLS = """\
{%- set loop_messages = messages[1:] if messages[0]["role"] == "system" else messages %}
{%- set user_messages = loop_messages | selectattr("role", "equalto", "user") | list %}
{%- set ns = namespace(index=0) %}
{%- for message in loop_messages if not message.tool_calls is defined %}
    {%- if (message["role"] == "user") != (ns.index % 2 == 0) %}
        {{- raise_exception("After the optional system message, roles must alternate user/assistant") }}
    {%- endif %}
    {%- set ns.index = ns.index + 1 %}
{%- endfor %}
{{- bos_token }}
{%- for message in loop_messages %}
    {%- if message["role"] == "user" %}
        {%- if tools is not none and (message == user_messages[-1]) %}
            {{- "[AVAILABLE_TOOLS] [" }}
            {%- for tool in tools %}
                {%- for key, val in tool.function.items() if key != "return" %}
                    {{- '"' + key + '": ' + (val | tojson if val is not string else '"' + val + '"') }}
                    {{- ", " if not loop.last }}
                {%- endfor %}
                {{- ", " if not loop.last else "]" }}
            {%- endfor %}
            {{- "[/AVAILABLE_TOOLS]" }}
        {%- endif %}
        {{- "[INST] " + message["content"] + "[/INST]" }}
    {%- elif message["role"] == "assistant" %}
        {{- " " + message["content"]|trim + eos_token}}
    {%- else %}{{- raise_exception("Only user and assistant roles are supported!") }}{%- endif %}
{%- endfor %}"""

QWEN_WITH_TOOLS_AND_THINKING = """\
{%- if tools %}
    {{- '<|im_start|>system\n' }}
    {%- if messages[0].role == 'system' %}{{- messages[0].content + '\n\n' }}{%- endif %}
    {{- "# Tools\n\n<tools>" }}
    {%- for tool in tools %}{{- "\n" }}{{- tool | tojson }}{%- endfor %}
    {{- "\n</tools><|im_end|>\n" }}
{%- elif messages[0].role == 'system' %}{{- '<|im_start|>system\n' + messages[0].content + '<|im_end|>\n' }}{%- endif %}
{%- set ns = namespace(multi_step=true, last=messages|length - 1) %}
{%- for message in messages[::-1] %}
    {%- set index = (messages|length - 1) - loop.index0 %}
    {%- if ns.multi_step and message.role == "user" and not message.content.startswith('<tool_response>') %}
        {%- set ns.multi_step = false %}{%- set ns.last = index %}
    {%- endif %}
{%- endfor %}
{%- for message in messages %}
    {%- set content = message.content if message.content is string else '' %}
    {%- if message.role == "user" or (message.role == "system" and not loop.first) %}
        {{- '<|im_start|>' + message.role + '\n' + content + '<|im_end|>\n' }}
    {%- elif message.role == "assistant" %}
        {%- set thought = '' %}
        {%- if '</think>' in content %}
            {%- set thought = content.split('</think>')[0].rstrip('\n').split('<think>')[-1].lstrip('\n') %}
            {%- set content = content.split('</think>')[-1].lstrip('\n') %}
        {%- endif %}
        {%- if loop.index0 > ns.last and (loop.last or thought) %}
            {{- '<|im_start|>assistant\n<think>\n' + thought.strip('\n') + '\n</think>\n\n' + content }}
        {%- else %}{{- '<|im_start|>assistant\n' + content }}{%- endif %}
        {{- '<|im_end|>\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}{{- '<think>\n\n</think>\n\n' }}{%- endif %}
{%- endif %}"""

QWEN_TOOL_CALLS = """\
{%- if tools %}{{- '<|im_start|>system\n# Tools\n<tools>' }}
    {%- for tool in tools %}{{- "\n" + (tool | tojson) }}{%- endfor %}
    {{- '\n</tools>\nWithin <tool_call></tool_call>: {"name": <name>, "arguments": <object>}<|im_end|>\n' }}
{%- endif %}
{%- for message in messages %}
    {%- if message.role in ("user", "system") or message.role == "assistant" and not message.tool_calls %}
        {{- '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>\n' }}
    {%- elif message.role == "assistant" %}
        {{- '<|im_start|>' + message.role }}
        {%- if message.content %}{{- '\n' + message.content }}{%- endif %}
        {%- for tool_call in message.tool_calls %}
            {%- if tool_call.function is defined %}{%- set tool_call = tool_call.function %}{%- endif %}
            {{- '\n<tool_call>\n{"name": "' + tool_call.name + '", "arguments": ' }}
            {{- tool_call.arguments | tojson }}{{- '}\n</tool_call>' }}
        {%- endfor %}
        {{- '<|im_end|>\n' }}
    {%- elif message.role == "tool" %}
        {{- '<|im_start|>user\n<tool_response>\n' + message.content + '\n</tool_response><|im_end|>\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}{%- endif %}
{%- if reasoning_effort is defined %}{{- '[' + reasoning_effort + ']' }}{%- endif %}"""

MISTRAL_TOOL_CALLS = """\
{{- bos_token }}
{%- for message in messages %}
    {%- if message["role"] == "user" %}
        {%- if tools is not none and loop.last %}{{- "[AVAILABLE_TOOLS]" + (tools | tojson) }}{%- endif %}
        {{- "[INST] " + message["content"] + "[/INST]" }}
    {%- elif message.tool_calls is defined and message.tool_calls is not none %}
        {{- "[TOOL_CALLS] [" }}
        {%- for tool_call in message.tool_calls %}
            {%- set out = tool_call.function | tojson %}{{- out[:-1] }}
            {%- if not tool_call.id is defined or tool_call.id | length != 9 %}
                {{- raise_exception("Tool call IDs should be alphanumeric strings with length 9!") }}
            {%- endif %}
            {{- ', "id": "' + tool_call.id + '"}' }}{{- ", " if not loop.last else "]" + eos_token }}
        {%- endfor %}
    {%- elif message["role"] == "assistant" %}{{- " " + message["content"] | trim + eos_token }}
    {%- elif message["role"] == "tool" %}
        {{- '[TOOL_RESULTS] {"content": ' + message.content | string + ', "call_id": "' + message.tool_call_id + '"}' }}
    {%- else %}{{- raise_exception("Only user, assistant and tool roles are supported!") }}{%- endif %}
{%- endfor %}"""

LLAMA_TOOL_CALLS = """\
{{- bos_token }}
{%- if not tools is defined %}{%- set tools = none %}{%- endif %}
{%- if tools is not none %}
    {{- 'Respond in the format {"name": function name, "parameters": dictionary of argument name and its value}.' }}
    {%- for t in tools %}{{- t | tojson(indent=4) }}{{- "\n\n" }}{%- endfor %}
{%- endif %}
{%- for message in messages %}
    {%- if not (message.role == 'ipython' or message.role == 'tool' or 'tool_calls' in message) %}
        {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n' }}
        {{- message['content'] | trim + '<|eot_id|>' }}
    {%- elif 'tool_calls' in message %}
        {%- if not message.tool_calls|length == 1 %}
            {{- raise_exception("This model only supports single tool-calls at once!") }}
        {%- endif %}
        {%- set tool_call = message.tool_calls[0].function %}
        {{- '<|start_header_id|>assistant<|end_header_id|>\n\n{"name": "' + tool_call.name + '", "parameters": ' }}
        {{- tool_call.arguments | tojson }}{{- "}<|eot_id|>" }}
    {%- else %}
        {{- "<|start_header_id|>ipython<|end_header_id|>\n\n" }}
        {%- if message.content is mapping or message.content is iterable %}{{- message.content | tojson }}
        {%- else %}{{- message.content }}{%- endif %}{{- "<|eot_id|>" }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{%- endif %}"""

DEEPSEEK_TOOL_CALLS = """\
{{ bos_token }}{%- if tools %}{{ tools | tojson }}{%- endif %}
{%- for message in messages %}
{%- if message['role'] == 'user' %}{{ '<｜User｜>' + message['content'] }}{%- endif %}
{%- if message['role'] == 'assistant' and message['content'] is none %}
{{- '<｜Assistant｜><｜tool▁calls▁begin｜>' }}
{%- for tool in message['tool_calls'] %}
{{- '<｜tool▁call▁begin｜>' + tool['type'] + '<｜tool▁sep｜>' + tool['function']['name'] + '\n```json\n' }}
{{- tool['function']['arguments'] + '\n```<｜tool▁call▁end｜>' }}{{- '\n' if not loop.last }}
{%- endfor %}{{ '<｜tool▁calls▁end｜><｜end▁of▁sentence｜>' }}
{%- elif message['role'] == 'assistant' %}{{ '<｜Assistant｜>' + message['content'] }}{%- endif %}
{%- if message['role'] == 'tool' %}{{ '<｜tool▁output▁begin｜>' + message['content'] }}{%- endif %}
{%- endfor %}{% if add_generation_prompt %}{{ '<｜Assistant｜>' }}{% endif %}"""

DEEPSEEK = """\
{% if not add_generation_prompt is defined %}{% set add_generation_prompt = false %}{% endif %}\
{% set ns = namespace(is_first=true, system_prompt='') %}\
{%- for message in messages %}{%- if message['role'] == 'system' %}{% if ns.is_first %}\
{% set ns.system_prompt = ns.system_prompt + message['content'] %}{% set ns.is_first = false %}\
{%- else %}{% set ns.system_prompt = ns.system_prompt + '\n\n' + message['content'] %}{%- endif %}\
{%- endif %}{%- endfor %}{{ bos_token }}{{ ns.system_prompt }}\
{%- for message in messages %}{%- if message['role'] == 'user' %}{{ '<｜User｜>' + message['content'] }}{%- endif %}\
{%- if message['role'] == 'assistant' and message['content'] is not none %}{% set content = message['content'] %}\
{% if '</think>' in content %}{% set content = content.split('</think>')[-1] %}{% endif %}\
{{ '<｜Assistant｜>' + content + '<｜end▁of▁sentence｜>' }}{%- endif %}{%- endfor -%}\
{% if add_generation_prompt %}{{ '<｜Assistant｜><think>\\n' }}{% endif %}"""

GEMMA = """\
{{ bos_token }}{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}\
{% for message in messages %}{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}\
{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{% endif %}\
{% if (message['role'] == 'assistant') %}{% set role = 'model' %}{% else %}{% set role = message['role'] %}{% endif %}\
{{ '<start_of_turn>' + role + '\n' + message['content'] | trim + '<end_of_turn>\n' }}{% endfor %}\
{% if add_generation_prompt %}{{'<start_of_turn>model\n'}}{% endif %}"""

GEMMA_WITH_PARTS = """\
{{ bos_token }}
{%- for message in messages -%}
    {{ '<start_of_turn>' + message['role'] + '\n' }}
    {%- if message['content'] is string -%}{{ message['content'] | trim }}
    {%- elif message['content'] is iterable -%}
        {%- for item in message['content'] -%}
            {%- if item['type'] == 'image' -%}{{ '<start_of_image>' }}
            {%- elif item['type'] == 'text' -%}{{ item['text'] | trim }}{%- endif -%}
        {%- endfor -%}
    {%- else -%}{{ raise_exception("Invalid content type") }}{%- endif -%}
    {{ '<end_of_turn>\n' }}
{%- endfor -%}
{%- if add_generation_prompt -%}{{'<start_of_turn>model\n'}}{%- endif -%}"""

ONLY_PARTS = """\
{% for message in messages %}<{{ message.role }}>\
{% for part in message.content | selectattr('type', 'equalto', 'text') %}{{ part.text }};{% endfor %}
{% endfor %}<assistant>"""

PHI = """\
{% for message in messages %}{% if message['role'] == 'system' and message['content'] %}\
{{'<|system|>\n' + message['content'] + '<|end|>\n'}}{% elif message['role'] == 'user' %}\
{{'<|user|>\n' + message['content'] + '<|end|>\n'}}{% elif message['role'] == 'assistant' %}\
{{'<|assistant|>\n' + message['content'] + '<|end|>\n'}}{% endif %}{% endfor %}\
{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% else %}{{ eos_token }}{% endif %}"""

COMMAND_R_WITH_DOCUMENTS = """\
{{ bos_token }}{%- macro document_turn(documents) -%}
# Documents
{% for doc in documents %}
## Document {{ loop.index0 }}
{% for key, value in doc.items() %}{{ key }}: {{ value }}
{% endfor %}{% endfor %}{%- endmacro -%}
{%- if documents %}{{ document_turn(documents) }}{% else %}# No documents{% endif -%}
{%- for message in messages %}<|{{ message.role | upper }}_TOKEN|>{{ message.content }}{% endfor %}<|CHATBOT_TOKEN|>"""

ZEPHYR = """\
{% for message in messages %}
{% if message['role'] == 'user' %}
{{ '<|user|>\n' + message['content'] + eos_token }}
{% elif message['role'] == 'system' %}
{{ '<|system|>\n' + message['content'] + eos_token }}
{% elif message['role'] == 'assistant' %}
{{ '<|assistant|>\n'  + message['content'] + eos_token }}
{% endif %}
{% if loop.last and add_generation_prompt %}
{{ '<|assistant|>' }}
{% endif %}
{% endfor %}"""

VICUNA = """\
{% if messages[0]['role'] == 'system' %}{{ messages[0]['content'] + ' ' }}{% set messages = messages[1:] %}{% endif %}\
{% for m in messages %}{{ {'user': 'USER', 'assistant': 'ASSISTANT'}[m['role']] ~ ': ' ~ m['content'] }}\
{{ ' ' if loop.index is odd else eos_token }}{% endfor %}ASSISTANT:"""

ALPACA = """\
{%- for m in messages if m.role in ('user', 'assistant') -%}
### {{ 'Instruction' if m.role == 'user' else 'Response' }}:
{{ m.content }}

{% endfor -%}
### Response:
"""

GENERATION = """\
{%- for message in messages -%}
{%- if message.role == 'assistant' -%}<|a|>{% generation %}{{ message.content }}{{ eos_token }}{% endgeneration %}
{%- else -%}<|{{ message.role[0] }}|>{{ message.content }}{%- endif -%}
{%- endfor -%}<|a|>"""

GENERATION_WITH_SCOPE = """\
{% set said = 'before' %}{%- for m in messages %}{%- generation -%}{% set said = m.content %}{{ said }}|{{ loop.index }}
{%- endgeneration -%}{{ said }}{% endfor %}"""

SORTED_JSON = """{{ messages | tojson(sort_keys=true) }}"""
ASCII_JSON = (
    """{% for m in messages %}{{ m.content | tojson(ensure_ascii=True) }}{{ m.content | tojson }}{% endfor %}"""
)
DENSE_JSON = (
    """{{ {'b': tools, 'a': documents} | tojson(separators=(',', ':'), sort_keys=True) }}{{ messages[-1].content }}"""
)
INDENTED_JSON = (
    """{{ tools | tojson(indent=2) }}{{ messages[-1].content | tojson(indent=none) }}<&'">{{ '<&>' | tojson }}"""
)

LOOP_CONTROLS = """\
{% for m in messages %}{% if m.role == 'system' %}{% continue %}{% endif %}\
{% if loop.index > 3 %}{% break %}{% endif %}\
{{ m.role }}={{ m.content }}
{% endfor %}"""

ALL_SPECIALS = """{{ bos_token }}|{{ eos_token }}|{{ unk_token }}|{{ pad_token }}|{{ sep_token }}|{{ image_token }}|\
{{ bos_token is defined }}{{ pad_token is defined }}{{ messages[0].content }}"""

NONE_OR_UNDEFINED = """\
{{ tools is none }}{{ documents is none }}{{ tools is defined }}{{ anything is defined }}{{ add_generation_prompt }}\
{{ messages | length }}"""

NAMES = """{% for m in messages %}{{ m.role }}{% if m.name %}({{ m.name }}){% endif %}: {{ m.content }}
{% endfor %}"""

DEVELOPER = """\
{%- for m in messages %}{% if m.role in ['developer', 'system'] %}<|start|>developer<|message|>{{ m.content }}<|end|>\
{% else %}<|start|>{{ m.role }}<|message|>{{ m.content }}<|end|>{% endif %}{% endfor %}<|start|>assistant"""

FILTERS = """\
{{ messages | map(attribute='content') | join(' / ') | upper }}\
{{ messages | rejectattr('role', 'eq', 'user') | list | count }}\
{{ (messages | last).content[:5] }}{{ messages[0].content | replace('a', 'A') | default('none', true) }}\
{{ '%s-%d' | format('x', 3) }}{{ range(3) | list }}{{ messages[0].content.split() | first }}"""

CALLS_AND_DICTS = """\
{%- set table = dict(user='U', assistant='A', system='S') -%}{%- set zeros = dict.fromkeys(['x', 'y'], 0) -%}
{%- macro turn(m) -%}{{ table.get(m.role, '?') }}:{{ caller() }}{%- endmacro -%}
{%- for m in messages %}{% call turn(m) %}{{ m.content }}{% endcall %}{% endfor %}{{ zeros }}"""

WHITESPACE = """
  {% for m in messages %}
    {%- if loop.first %} first {%+ endif %}
  {# a comment #}
  {{ m.content }}
    {%- endfor %}

"""

CLOSED_LIST = """{{ messages.append('x') }}"""
PRIVATE = """{{ messages.__class__.__mro__ }}"""
PRIVATE_NAMESPACE = """{% set ns = namespace(_x=1) %}{{ ns._x }}"""
STUMBLES = """{{ messages[0].content + 1 }}"""
MISSING = """{{ messages[0].nothing.more }}"""
REFUSES_ALL = """{{ raise_exception('not today') }}"""

TEMPLATES: dict[str, str] = {
    name.lower(): text for name, text in list(globals().items()) if name.isupper() and isinstance(text, str)
}

"""Shortened chat templates that write tools, calls and thoughts as the known families do, and rows that have them."""

from __future__ import annotations

from typing import Any

TOOL: dict[str, Any] = {
    "type": "function",
    "function": {
        "name": "lookup_tide",
        "description": "Tide at a harbour",
        "parameters": {"type": "object", "properties": {"harbour": {"type": "string"}}, "required": ["harbour"]},
    },
}


def call(harbour: str, id: str = "abcdefghi") -> dict[str, Any]:
    return {"id": id, "type": "function", "function": {"name": "lookup_tide", "arguments": {"harbour": harbour}}}


def said(role: str, content: str | None, **fields: Any) -> dict[str, Any]:
    return {"role": role, "content": content, **fields}


ASKED = [
    said("user", "Tide at Islet?"),
    said("assistant", "", tool_calls=[call("islet")]),
    said("tool", "2 m", name="lookup_tide", tool_call_id="abcdefghi"),
    said("assistant", "High."),
]

# Qwen2.5 and Hermes 2 Pro: definitions in the system message, calls between tags, answers of tools as the user's.
QWEN25 = """{%- if tools -%}
<|im_start|>system
{% if messages[0].role == 'system' %}{{ messages[0].content + '\\n' }}{% endif -%}
Tools:{% for tool in tools %}
{{ tool | tojson }}{% endfor %}<|im_end|>
{% elif messages[0].role == 'system' -%}
<|im_start|>system
{{ messages[0].content }}<|im_end|>
{% endif -%}
{%- for m in messages -%}
{%- if m.role == 'user' or (m.role == 'assistant' and not m.tool_calls) -%}
{{ '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n' }}
{%- elif m.role == 'assistant' -%}
{{ '<|im_start|>assistant' }}
{%- if m.content %}{{ '\\n' + m.content }}{% endif -%}
{%- for c in m.tool_calls -%}
{{ '\\n<tool_call>\\n{"name": "' + c.function.name + '", "arguments": ' + c.function.arguments | tojson
   + '}\\n</tool_call>' }}
{%- endfor -%}
{{ '<|im_end|>\\n' }}
{%- elif m.role == 'tool' -%}
{{ '<|im_start|>user\\n<tool_response>\\n' + m.content + '\\n</tool_response><|im_end|>\\n' }}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif -%}"""

# Qwen3: the same with thoughts, kept since the last question of a user.
QWEN3 = (
    QWEN25.replace(
        "{%- for m in messages -%}\n",
        "{%- set ns = namespace(last=0) -%}\n{%- for m in messages -%}{%- if m.role == 'user' -%}"
        "{%- set ns.last = loop.index0 -%}{%- endif -%}{%- endfor -%}\n{%- for m in messages -%}\n",
        1,
    )
    .replace("m.role == 'user' or (m.role == 'assistant' and not m.tool_calls)", "m.role == 'user'")
    .replace(
        "{{ '<|im_start|>assistant' }}\n{%- if m.content %}{{ '\\n' + m.content }}{% endif -%}",
        "{{ '<|im_start|>assistant' }}\n{%- if loop.index0 > ns.last and (loop.last or m.reasoning_content) -%}"
        "{{ '\\n<think>\\n' + (m.reasoning_content or '') + '\\n</think>\\n' }}{%- endif -%}"
        "\n{%- if m.content %}{{ '\\n' + m.content }}{% endif -%}",
    )
    .replace("in m.tool_calls -%}", "in m.tool_calls or [] -%}")
)

# Llama 3.1: one call, without its tag, and answers of tools as JSON text.
LLAMA31 = """{{- bos_token -}}
{%- for m in messages -%}
{%- if m.role == 'tool' -%}
{{ '<|start_header_id|>ipython<|end_header_id|>\\n\\n' + m.content | tojson + '<|eot_id|>' }}
{%- elif m.tool_calls -%}
{%- if m.tool_calls | length > 1 %}{{ raise_exception('one call at once') }}{% endif -%}
{%- set c = m.tool_calls[0].function -%}
{{ '<|start_header_id|>assistant<|end_header_id|>\\n\\n{"name": "' + c.name + '", "parameters": '
   + c.arguments | tojson + '}<|eot_id|>' }}
{%- else -%}
{{ '<|start_header_id|>' + m.role + '<|end_header_id|>\\n\\n' }}
{%- if tools and loop.first %}{{ tools | tojson + '\\n\\n' }}{% endif -%}
{{ m.content | trim + '<|eot_id|>' }}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{% endif -%}"""

# Mistral V3: definitions before the last question, ids of nine letters, no generation prompt.
MISTRAL = """{{- bos_token -}}
{%- set ns = namespace(last=0) -%}
{%- for m in messages -%}{%- if m.role == 'user' %}{% set ns.last = loop.index0 %}{% endif -%}{%- endfor -%}
{%- for m in messages -%}
{%- if m.role == 'user' -%}
{%- if tools and loop.index0 == ns.last %}{{ '[AVAILABLE_TOOLS]' + tools | tojson + '[/AVAILABLE_TOOLS]' }}{% endif -%}
{{ '[INST] ' + m.content + '[/INST]' }}
{%- elif m.tool_calls -%}
{{ '[TOOL_CALLS][' }}
{%- for c in m.tool_calls -%}
{%- if not c.id or c.id | length != 9 %}{{ raise_exception('ids must have nine letters') }}{% endif -%}
{{ (c.function | tojson)[:-1] + ', "id": "' + c.id + '"}' + (']' + eos_token if loop.last else ', ') }}
{%- endfor -%}
{%- elif m.role == 'tool' -%}
{{ '[TOOL_RESULTS]{"content": ' + m.content | string + ', "call_id": "' + m.tool_call_id + '"}[/TOOL_RESULTS]' }}
{%- else -%}
{{ ' ' + m.content + eos_token }}
{%- endif -%}
{%- endfor -%}"""

# DeepSeek V3: only messages of null call, and their arguments must be text.
DEEPSEEK = """{{- bos_token -}}{{ tools | tojson if tools }}
{%- for m in messages -%}
{%- if m.role == 'assistant' and m.content is none -%}
{{ '<|Assistant|>' }}
{%- for c in m.tool_calls -%}
{{ '<|call|>' + c.function.name + '\\n```json\\n' + c.function.arguments + '\\n```<|end_call|>' }}
{%- endfor -%}
{{ '<|end|>' }}
{%- elif m.role == 'assistant' -%}
{{ '<|Assistant|>' + m.content.split('</think>')[-1] + '<|end|>' }}
{%- else -%}
{{ '<|' + m.role + '|>' + m.content }}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt %}{{ '<|Assistant|>' }}{% endif -%}"""

# DeepSeek-R1's distillations: the generation prompt opens a thought, which a whole conversation leaves out.
R1 = DEEPSEEK.replace("{{ '<|Assistant|>' }}{% endif", "{{ '<|Assistant|><think>\\n' }}{% endif")

# Apriel 1.6: the last answer is not closed, and its calls have no ids.
APRIEL = """{{ tools | tojson if tools }}
{%- for m in messages -%}
{%- if m.role == 'assistant' -%}
{{ '\\n<|begin_assistant|>\\n' + (m.content or '') }}
{%- if m.tool_calls -%}
{{ '\\n<tool_calls>[' }}
{%- set last = loop.last -%}
{%- for c in m.tool_calls -%}
{{ '{"name": "' + c.function.name + '", "arguments": ' + c.function.arguments | tojson }}
{%- if c.id and not last %}{{ ', "id": "' + c.id + '"' }}{% endif %}{{ '}' + ('' if loop.last else ', ') }}
{%- endfor -%}
{{ ']</tool_calls>' }}
{%- endif -%}
{%- if not loop.last %}{{ '\\n<|end|>\\n' }}{% endif -%}
{%- else -%}
{{ '<|begin_' + m.role + '|>\\n' + m.content + ('\\n' if m.role == 'tool' else '') }}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt %}{{ '\\n<|begin_assistant|>\\n' }}{% endif -%}"""

# Nemotron Nano v2: the last answer stands within the thought that its prompt opens, and its calls end otherwise.
NEMOTRON = """{{ tools | tojson if tools }}
{%- macro calls(m) -%}
<TOOLCALL>[{% for c in m.tool_calls -%}
{{ '{"name": "' + c.function.name + '", "arguments": ' + c.function.arguments | tojson + '}' }}
{{- ', ' if not loop.last }}{% endfor %}]</TOOLCALL>
{%- endmacro -%}
{%- for m in messages -%}
{%- if m.role == 'tool' -%}
{{ '<|11|>User\\n<TOOL_RESPONSE>[' + m.content + ']</TOOL_RESPONSE>\\n' }}
{%- elif m.role == 'user' -%}
{{ '<|11|>User\\n' + m.content + '\\n' }}
{%- elif loop.last -%}
{{ '<|11|>Assistant\\n' + (calls(m) + '<|12|>\\n' if m.tool_calls else '<think>\\n' + m.content + '\\n<|12|>\\n') }}
{%- else -%}
{{ '<|11|>Assistant\\n' + m.content.split('</think>')[-1].strip() + (calls(m) if m.tool_calls else '')
   + '\\n<|12|>\\n' }}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt %}{{ '<|11|>Assistant\\n<think>\\n' }}{% endif -%}"""

# Nemotron 3: an empty thought, unless the text has one; of earlier answers it is always empty.
NEMOTRON3 = """{%- for m in messages -%}
{{ '<|im_start|>' + m.role + '\\n' }}
{%- set empty = m.role == 'assistant' and (not loop.last or '</think>' not in m.content) -%}
{{ ('<think></think>' + m.content.split('</think>')[-1] if empty else m.content) + '<|im_end|>\\n' }}
{%- endfor -%}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n<think>\\n' }}{% endif -%}"""

# Apertus: a turn is closed by the question after it, and goes on over calls and answers of tools.
APERTUS = """{{ tools | tojson if tools }}
{%- set ns = namespace(inside=false) -%}
{%- for m in messages -%}
{%- if m.role == 'user' -%}
{{ ('<|assistant_end|>' if ns.inside else '') + '<|user_start|>' + m.content + '<|user_end|>' }}
{%- set ns.inside = false -%}
{%- elif m.role == 'tool' -%}
{{ '[' + m.content + ']' }}
{%- else -%}
{{ ('' if ns.inside else '<|assistant_start|>') + m.content }}
{%- set ns.inside = true -%}
{%- for c in m.tool_calls or [] -%}
{{ '<|tools_prefix|>[{"' + c.function.name + '": ' + c.function.arguments | tojson + '}]<|tools_suffix|>' }}
{%- endfor -%}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt %}{{ '<|assistant_start|>' }}{% endif -%}"""

SPECIAL = {
    QWEN25: ("<|im_start|>", "<|im_end|>"),
    QWEN3: ("<|im_start|>", "<|im_end|>"),
    LLAMA31: ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
    MISTRAL: ("</s>", "[INST]", "[/INST]", "[TOOL_CALLS]", "[AVAILABLE_TOOLS]", "[TOOL_RESULTS]"),
    DEEPSEEK: ("<|Assistant|>", "<|user|>", "<|call|>", "<|end_call|>", "<|end|>"),
    R1: ("<|Assistant|>", "<|user|>", "<|call|>", "<|end_call|>", "<|end|>"),
    APRIEL: ("<|begin_user|>", "<|begin_tool|>", "<|begin_assistant|>", "<|end|>"),
    NEMOTRON: ("<|11|>", "<|12|>"),
    APERTUS: (
        *("<|user_start|>", "<|user_end|>", "<|assistant_start|>", "<|tools_prefix|>", "<|tools_suffix|>"),
        "<|assistant_end|>",
    ),
}
ENDS = {QWEN25: "<|im_end|>", QWEN3: "<|im_end|>", LLAMA31: "<|eot_id|>", MISTRAL: "</s>"}

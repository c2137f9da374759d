"""Chat templates with tools, shortened from published ones, and a tiny model that has one."""

from pathlib import Path

import fakes
from engines import make_parts
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from llava_ray.model.assembly import LlavaParts

HERMES = """\
{%- if tools %}{{- '<|im_start|>system\\n' }}
{%- if messages[0]['role'] == 'system' %}{{- messages[0]['content'] + '\\n\\n' }}{%- endif %}
{{- "# Tools\\n<tools>" }}{%- for tool in tools %}{{- "\\n" }}{{- tool | tojson }}{%- endfor %}
{{- "\\n</tools>\\nReturn <tool_call>\\n{\\"name\\": <name>, \\"arguments\\": <args>}\\n</tool_call><|im_end|>\\n" }}
{%- elif messages[0]['role'] == 'system' %}{{- '<|im_start|>system\\n' + messages[0]['content'] + '<|im_end|>\\n' }}
{%- endif %}
{%- for message in messages %}
{%- if message.role == "user" or (message.role == "assistant" and not message.tool_calls) %}
{{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}
{%- elif message.role == "assistant" %}{{- '<|im_start|>' + message.role }}
{%- if message.content %}{{- '\\n' + message.content }}{%- endif %}
{%- for tool_call in message.tool_calls %}
{{- '\\n<tool_call>\\n{"name": "' + tool_call.function.name + '", "arguments": ' }}
{{- tool_call.function.arguments | tojson }}{{- '}\\n</tool_call>' }}
{%- endfor %}{{- '<|im_end|>\\n' }}
{%- elif message.role == "tool" %}
{%- if loop.index0 == 0 or messages[loop.index0 - 1].role != "tool" %}{{- '<|im_start|>user' }}{%- endif %}
{{- '\\n<tool_response>\\n' + message.content + '\\n</tool_response>' }}
{%- if loop.last or messages[loop.index0 + 1].role != "tool" %}{{- '<|im_end|>\\n' }}{%- endif %}
{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}
"""

LLAMA_JSON = """\
{%- if messages[0]['role'] == 'system' %}{%- set system = messages[0]['content'] %}{%- set messages = messages[1:] %}
{%- else %}{%- set system = '' %}{%- endif %}
{{- '<|im_start|>system\\n' + system }}
{%- if tools is defined and tools %}{{- 'Respond with {"name": name, "parameters": values}.\\n' }}
{%- for tool in tools %}{{- tool | tojson }}{{- '\\n' }}{%- endfor %}{%- endif %}{{- '<|im_end|>' }}
{%- for message in messages %}
{%- if message.role == 'tool' %}{{- '<|im_start|>ipython\\n' + message.content + '<|im_end|>' }}
{%- elif message.tool_calls %}
{%- if message.tool_calls | length != 1 %}{{- raise_exception('This model only supports single tool-calls at once!') }}
{%- endif %}{%- set call = message.tool_calls[0].function %}
{{- '<|im_start|>assistant\\n{"name": "' + call.name + '", "parameters": ' }}{{- call.arguments | tojson }}{{- '}' }}
{{- '<|im_end|>' }}
{%- else %}{{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>' }}{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}
"""

MISTRAL = """\
{{- bos_token }}{%- for message in messages %}
{%- if message.role == 'user' %}
{%- if tools and loop.index0 == messages | length - 1 or tools and loop.first %}
{{- '[AVAILABLE_TOOLS] ' }}{{- tools | tojson }}{{- '[/AVAILABLE_TOOLS]' }}{%- endif %}
{{- '[INST] ' + message.content + '[/INST]' }}
{%- elif message.tool_calls %}{{- '[TOOL_CALLS] [' }}
{%- for call in message.tool_calls %}
{%- if call.id is undefined or call.id | length != 9 %}{{- raise_exception('ids have nine characters') }}{%- endif %}
{{- '{"name": "' + call.function.name + '", "arguments": ' }}{{- call.function.arguments | tojson }}
{{- ', "id": "' + call.id + '"}' }}{%- if not loop.last %}{{- ', ' }}{%- endif %}
{%- endfor %}{{- ']' + eos_token }}
{%- elif message.role == 'tool' %}
{{- '[TOOL_RESULTS] {"content": ' + message.content + ', "call_id": "' + message.tool_call_id + '"}[/TOOL_RESULTS]' }}
{%- elif message.role == 'assistant' %}{{- ' ' + message.content + eos_token }}
{%- else %}{{- message.content + '\\n\\n' }}{%- endif %}
{%- endfor %}
"""

PYTHONIC = """\
{%- if tools %}{{- '<|im_start|>system\\nAnswer [func_name1(params_name1=params_value1)].\\n' }}
{%- for tool in tools %}{{- tool | tojson }}{%- endfor %}{{- '<|im_end|>' }}{%- endif %}
{%- for message in messages %}
{%- if message.tool_calls %}{{- '<|im_start|>assistant\\n[' }}
{%- for call in message.tool_calls %}{{- call.function.name + '(' }}
{%- for key, value in call.function.arguments.items() %}{{- key + '=' }}{{- value | tojson }}
{%- if not loop.last %}{{- ', ' }}{%- endif %}{%- endfor %}{{- ')' }}{%- if not loop.last %}{{- ', ' }}{%- endif %}
{%- endfor %}{{- ']<|im_end|>' }}
{%- else %}{{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>' }}{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}
"""

TEMPLATES = {"hermes": HERMES, "llama_json": LLAMA_JSON, "mistral": MISTRAL, "pythonic": PYTHONIC}
# Added tokens of the published vocabularies, and those of them that are special.
ADDED = {"hermes": ["<tool_call>", "</tool_call>"]}
SPECIAL = {"mistral": ["[TOOL_CALLS]", "[AVAILABLE_TOOLS]", "[INST]", "[/INST]"], "llama_json": ["<|python_tag|>"]}


def write_tokenizer(folder: Path, name: str) -> PreTrainedTokenizerBase:
    """Give the tokenizer in a folder the chat template of that name, and its marks where it has ids for them."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens(ADDED.get(name, []))
    tokenizer.add_special_tokens({"additional_special_tokens": SPECIAL.get(name, [])})
    tokenizer.chat_template = TEMPLATES[name]
    tokenizer.save_pretrained(folder)
    return AutoTokenizer.from_pretrained(folder)


def make_tool_parts(root: Path, name: str) -> LlavaParts:
    """A random model with that chat template; only the end token ends its answers."""
    if not (root / "llama").exists():
        fakes.make_language_model(root / "llama", vocab_size=310)
        write_tokenizer(root / "llama", name)
    return only_end_token(make_parts(root, version="chat_template"))


def only_end_token(parts: LlavaParts) -> LlavaParts:
    """Let no word of the vocabulary end an answer."""
    parts.llava.language_model.generation_config.eos_token_id = fakes.EOS
    return parts

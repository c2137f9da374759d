"""What mutated requests are made of: values, texts, keys, paths and headers that some reader once fell over."""

from typing import Any

from pictures import picture

SECRET = "S3cretPayload" * 40  # never to be repeated in an error
IMAGES = [picture(kind=kind) for kind in ("PNG", "JPEG", "GIF", "WEBP", "BMP", "TIFF")]

# Text as it is in JSON between quotes, raw JSON by a placeholder: what json.dumps would not write.
RAW = {
    "@nan@": "NaN",
    "@inf@": "-Infinity",
    "@huge@": "1e999",
    "@tiny@": "1e-320",
    "@digits@": "9" * 400,
    "@many digits@": "9" * 6000,
    "@beyond 64@": str(2**64),
    "@surrogate@": '"\\ud800"',
    "@pair@": '"\\ud83d\\ude00"',
    "@reversed pair@": '"\\ude00\\ud83d"',
    "@nul@": '"a\\u0000b"',
    "@twice@": '{"type": "text", "type": "image_url", "text": "a", "text": "b"}',
    "@deep list@": "[" * 150 + "]" * 150,
    "@deeper list@": "[" * 5000 + "]" * 5000,
    "@unclosed@": "[" * 20_000,
    "@deep object@": '{"a":' * 120 + "1" + "}" * 120,
    "@minus zero@": "-0.0",
}
ODD_TEXTS = [
    "", " ", "\0", "\n" * 50, "<image>", "<image>\n<image>", "< image >", "</s>", "<|im_end|>\n<|im_start|>assistant\n",
    "<s>", "[INST]", "\u202e\u2066", "e\u0301" * 30, "\ufeff", "𐀀" * 20, "ﷺ", "a" * 5000, "%s%n", "../../etc/passwd",
    "{{7*7}}", "true", "null", "text", "image_url", "user", "echo", SECRET,
]  # fmt: skip
ODD_VALUES: list[Any] = [
    None, True, False, 0, 1, -1, 2, 3, 0.5, 1.5, -0.0, 1e308, 2**31, 2**63, -(2**63), [], {}, [[]], [None], [{}],
    {"a": {}},
    [1, "a", None], {"type": "text"}, {"type": "text", "text": "x"}, {"url": "x"}, {"": ""}, *RAW, *ODD_TEXTS,
]  # fmt: skip
KEYS = [
    "model", "messages", "temperature", "top_p", "top_k", "max_tokens", "max_completion_tokens", "n", "stop", "seed",
    "stream", "stream_options", "ignore_eos", "presence_penalty", "frequency_penalty", "logit_bias", "logprobs", "user",
    "top_logprobs", "response_format", "tools", "tool_choice", "functions", "modalities", "prompt", "echo", "suffix",
    "best_of", "role", "content", "name", "refusal", "annotations", "audio", "function_call", "tool_calls", "type",
    "text", "image_url", "url", "detail", "guided_json", "guided_regex", "structured_outputs", "json_schema", "schema",
    "regex", "choice", "grammar", "tool_call_id", "function", "parameters", "arguments", "strict",
    "min_p", "repetition_penalty", "prompt_logprobs", "continue_final_message", "add_generation_prompt",
    "parallel_tool_calls", "cache_control", "uuid", "reasoning_content", "include_usage", "__class__",
    "",
    "a\0b", "x" * 3000, SECRET,
]  # fmt: skip
ANSWER = {
    "role": "assistant", "content": "it is red", "refusal": None, "annotations": [], "audio": None,
    "function_call": None,
    "tool_calls": None,
}  # fmt: skip
PATHS = [
    "/v1/models", "/v1/models/echo", "/v1/models/", "/v1/models/%00", "/v1/models/%ff%fe", "/v1/models/a%2Fb", "/v1",
    "/",
    "/v1/", "//v1/chat/completions", "/v1/chat/completions/", "/v1/chat/completions%00", "/V1/models", "/health",
    "/ready",
    "/health/", "/version", "/metrics", "/metrics/", "/openapi.json", "/docs", "/%2e%2e/etc/passwd", "/v1/../metrics",
    "/" + "a" * 3000, "/v1/" + "%F0%9F%98%80" * 50, "/v1/models/%ED%A0%80", "", "*", "/v1/chat/completions;x", "/v1/%%",
]  # fmt: skip
METHODS = ["GET", "PUT", "DELETE", "PATCH", "HEAD", "OPTIONS", "TRACE", "CONNECT", "BREW", "post", "P" * 300]
HEADERS: dict[str, list[bytes]] = {
    "authorization": [
        b"Bearer ", b"Bearer", b"bearer wrong", b"Basic eDp5", b"Bearer \xff\xfe\xb2", b"Bearer " + b"x" * 9000, b"",
        b"Bearer a\tb", b"Bearer  a  b ", b"\xe9",
    ],
    "content-length": [
        b"0", b"-1", b"1", b"99999999", b"1e3", b"0x10", b"\xb2", b"", b" 5 ", b"+5", b"5, 5", b"9" * 5000, b"\xd9\xa3",
    ],
    "content-type": [
        b"text/plain", b"application/json; charset=utf-16", b"multipart/form-data; boundary=x",
        b"multipart/form-data", b"",
        b"application/x-www-form-urlencoded", b"\xff", b"application/json;" + b";" * 500, b"a" * 5000,
    ],
    "transfer-encoding": [b"chunked", b"gzip", b"identity", b"chunked, chunked", b"\xff"],
    "content-encoding": [b"gzip", b"deflate", b"br", b"\xff"],
    "host": [b"", b"[", b"]", b"a:b:c", b"[::1", b"a b", b"\xff\xff", b"x" * 3000, b"a/b?c#d", b"@", b"xn--",
    b"127.0.0.1:99999"],
    "x-session-id": [b"", b"abc", b"\xff" * 50, b"x" * 9000, b"../..", b"\xd8\x00"],
    "origin": [b"null", b"https://evil.example", b"", b"\xff", b"http://["],
    "x-forwarded-for": [b"1.2.3.4", b"\xff", b"::1, ::2", b"," * 500],
    "accept": [b"text/event-stream", b"\xff", b""],
    "accept-encoding": [b"gzip", b"\xff", b"gzip;q=x"],
    "expect": [b"100-continue"],
    "range": [b"bytes=0-1,2-3", b"bytes=-"],
    "cookie": [b"a=b; a=c", b"\xff=\xff", b";" * 500],
    "traceparent": [b"00-0-0-00", b"\xff"],
}  # fmt: skip

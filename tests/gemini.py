"""A recording Gemini API server that misbehaves on demand: fakes.Upstream, speaking what google-generativeai speaks.

It knows the REST side of v1beta: models, generateContent and streamGenerateContent (a JSON array sent in pieces).
The functions after the steering build answers and Google's error bodies, for the steering attributes that take some.
"""

from __future__ import annotations

import json
import re
from urllib.parse import parse_qs, urlsplit

from fakes import STEERING, Handler, Upstream, pieces

API = "v1beta"
JSON = "application/json; charset=UTF-8"
GENERATE = ("generateContent", "streamGenerateContent")

# An answer, wherever one is scripted, is an error body of Google's (its own code is the HTTP status), a response, a
# tuple (status, body), or a callable that makes one of these from the request body. A stream may also be a list of
# responses; one response is a stream of one element. A body of bytes is sent as it is, as HTML.
GEMINI_STEERING = {
    # From Upstream: reply, cut_after, hold, hold_after, headers, gzip as there; no_done ends a stream without its `]`;
    # no_choices puts elements without candidates among the others; events are the raw bytes of a stream. context and
    # crlf mean nothing here.
    **STEERING,
    "status": None,  # HTTP status of generateContent; None: the error's own code, 200 where there is no error
    "error": None,  # Google's error body (dict), a message (str) or the raw body (bytes)
    "error_after": None,  # (number of chunks, Google's error body): an element of the stream is an error
    "answers": (),  # scripted answers, one for each generate request as it arrives; None there: behave as steered
    "key": None,  # the x-goog-api-key that requests must have
    "models": None,  # the models there are: entries, or names that stand for ordinary ones; an answer: instead of them
    "garbage_after": None,  # an element that is no JSON after so many chunks; a plain answer is none at all
    "finish": "STOP",  # the finish reason; a name that Google does not know, or a number, is sent too
    "no_finish": False,  # no finish reason
    "empty_candidates": False,  # no candidates, and no reason for that
    "blocked": None,  # block every prompt for this reason
    "blocked_if": None,  # callable: request body -> bool: block only these prompts
    "thoughts": 0,  # thoughtsTokenCount
    "thoughts_only": None,  # MAX_TOKENS and no text where maxOutputTokens is below this number; True: always
    "cached": 0,  # cachedContentTokenCount
    "no_usage": False,  # no usageMetadata
}


# ---------------------------------------------------------------------------- Google's error bodies

STATUSES = {
    400: "INVALID_ARGUMENT",
    401: "UNAUTHENTICATED",
    403: "PERMISSION_DENIED",
    404: "NOT_FOUND",
    429: "RESOURCE_EXHAUSTED",
    499: "CANCELLED",
    500: "INTERNAL",
    501: "UNIMPLEMENTED",
    503: "UNAVAILABLE",
    504: "DEADLINE_EXCEEDED",
}
SERVICE = "generativelanguage.googleapis.com"
RATE_LIMITS = "https://ai.google.dev/gemini-api/docs/rate-limits"
REQUESTS = f"{SERVICE}/generate_content_free_tier_requests"
TOKENS = f"{SERVICE}/generate_content_free_tier_input_token_count"
PER_MINUTE = "GenerateRequestsPerMinutePerProjectPerModel-FreeTier"
PER_DAY = "GenerateRequestsPerDayPerProjectPerModel-FreeTier"
TOKENS_PER_MINUTE = "GenerateContentInputTokensPerModelPerMinute-FreeTier"


def google_error(code: int, message: str, details: list[dict] | None = None, status: str | None = None) -> dict:
    """An error body as Google sends it."""
    error = {"code": code, "message": message, "status": status or STATUSES.get(code, "UNKNOWN")}
    return {"error": error | ({"details": details} if details else {})}


def detail(kind: str, **fields) -> dict:
    return {"@type": f"type.googleapis.com/google.rpc.{kind}", **fields}


def error_info(reason: str, **metadata) -> dict:
    return detail("ErrorInfo", reason=reason, domain="googleapis.com", metadata={"service": SERVICE, **metadata})


def quota_error(violations: list[tuple], delay: str | None, model: str) -> dict:
    """A 429 for violations: tuples (metric, quota id, limit)."""
    lines = [
        "You exceeded your current quota, please check your plan and billing details. For more information on this "
        f"error, head to: {RATE_LIMITS}. To monitor your current usage, head to: https://ai.dev/rate-limit. "
    ]
    lines += [
        f"* Quota exceeded for metric: {metric}, limit: {limit}, model: {model}" for metric, _, limit in violations
    ]
    dimensions = {"location": "global", "model": model}
    failures = [
        {"quotaMetric": metric, "quotaId": quota, "quotaDimensions": dimensions}
        | ({"quotaValue": str(limit)} if limit else {})  # a limit of 0 is left out, as a default value
        for metric, quota, limit in violations
    ]
    help_links = [{"description": "Learn more about Gemini API quotas", "url": RATE_LIMITS}]
    details = [detail("Help", links=help_links), detail("QuotaFailure", violations=failures)]
    if delay:
        lines.append(f"Please retry in {delay}.")
        details.append(detail("RetryInfo", retryDelay=delay))
    return google_error(429, "\n".join(lines), details)


def rate_limit(delay: str | None = "7s", model: str = "gemini-flash-latest") -> dict:
    """429: the requests of this minute are used up."""
    return quota_error([(REQUESTS, PER_MINUTE, 10)], delay, model)


def daily_quota(delay: str | None = "51s", model: str = "gemini-flash-latest", limit: int = 50) -> dict:
    """429: the requests of this day are used up. Google names a delay all the same, of less than a minute."""
    return quota_error([(REQUESTS, PER_DAY, limit)], delay, model)


def zero_quota(delay: str | None = "45s", model: str = "gemini-pro-latest") -> dict:
    """429: the key's plan does not have this model at all."""
    return quota_error(
        [(REQUESTS, PER_DAY, 0), (REQUESTS, PER_MINUTE, 0), (TOKENS, TOKENS_PER_MINUTE, 0)], delay, model
    )


def exhausted() -> dict:
    """429 without any details."""
    return google_error(429, "Resource has been exhausted (e.g. check quota).")


def api_key_invalid(key: str | None = None) -> dict:
    """400. The real message does not name the key; given one, this does, to see where a message would get to."""
    named = f"API key '{key}' not valid" if key else "API key not valid"
    message = f"{named}. Please pass a valid API key."
    return google_error(400, message, [error_info("API_KEY_INVALID"), localized(message)])


def permission_denied(key: str) -> dict:
    """403: a suspended key, which Google names three times."""
    message = f"Permission denied: Consumer 'api_key:{key}' has been suspended."
    info = error_info("CONSUMER_SUSPENDED", consumer="projects/1234567890", containerInfo=f"api_key:{key}")
    return google_error(403, message, [info, localized(message)])


def localized(message: str) -> dict:
    return detail("LocalizedMessage", locale="en-US", message=message)


def location() -> dict:
    """400: the API is not offered where the request came from."""
    message = "User location is not supported for the API use."
    return google_error(400, message, status="FAILED_PRECONDITION")


def not_found(model: str) -> dict:
    """404: a model to generate with that is not there, or does not generate text."""
    return google_error(
        404,
        f"models/{model} is not found for API version {API}, or is not supported for generateContent. "
        "Call ListModels to see the list of available models and their supported methods.",
    )


def invalid_argument(message: str) -> dict:
    return google_error(400, message)


def internal() -> dict:
    advice = "Please retry or report in https://developers.generativeai.google/guide/troubleshooting"
    return google_error(500, f"An internal error has occurred. {advice}")


def unavailable() -> dict:
    return google_error(503, "The model is overloaded. Please try again later.")


# ---------------------------------------------------------------------------- responses

FINISH_REASONS = [
    "FINISH_REASON_UNSPECIFIED",
    "STOP",
    "MAX_TOKENS",
    "SAFETY",
    "RECITATION",
    "OTHER",
    "LANGUAGE",
    "BLOCKLIST",
    "PROHIBITED_CONTENT",
    "SPII",
    "MALFORMED_FUNCTION_CALL",
    "IMAGE_SAFETY",
    "UNEXPECTED_TOOL_CALL",
    "TOO_MANY_TOOL_CALLS",
]
BLOCK_REASONS = ["BLOCK_REASON_UNSPECIFIED", "SAFETY", "OTHER", "BLOCKLIST", "PROHIBITED_CONTENT", "IMAGE_SAFETY"]
CATEGORIES = [
    "UNSPECIFIED",
    "DEROGATORY",
    "TOXICITY",
    "VIOLENCE",
    "SEXUAL",
    "MEDICAL",
    "DANGEROUS",
    "HARASSMENT",
    "HATE_SPEECH",
    "SEXUALLY_EXPLICIT",
    "DANGEROUS_CONTENT",
    "CIVIC_INTEGRITY",
]
ENUMS = {
    "finishReason": FINISH_REASONS,
    "blockReason": BLOCK_REASONS,
    "category": [f"HARM_CATEGORY_{name}" for name in CATEGORIES],
    "probability": ["HARM_PROBABILITY_UNSPECIFIED", "NEGLIGIBLE", "LOW", "MEDIUM", "HIGH"],
}
NEWER = 99  # the number of an enum's name that is not in these lists


def numbered(value, name: str | None = None):
    """A response with its enums as numbers, which google-generativeai asks for."""
    if isinstance(value, dict):
        return {key: numbered(entry, key) for key, entry in value.items()}
    if isinstance(value, list):
        return [numbered(entry) for entry in value]
    if name in ENUMS and isinstance(value, str):
        return ENUMS[name].index(value) if value in ENUMS[name] else NEWER
    return value


def response(text: str, finish: str | int | None = "STOP", usage: dict | None = None, model: str = "gemini") -> dict:
    """A response, or an element of a stream: without text it has no parts, as Gemini's have none."""
    candidate = {"content": {"parts": [{"text": text}], "role": "model"} if text else {"role": "model"}}
    if finish is not None:
        candidate["finishReason"] = finish
    return about_model({"candidates": [candidate | {"index": 0}]}, usage, model)


def no_candidates(usage: dict | None = None, model: str = "gemini", reason: str | int | None = None) -> dict:
    """A response without candidates; with a reason: the prompt was blocked."""
    return about_model({"promptFeedback": {"blockReason": reason}} if reason else {}, usage, model)


def about_model(answer: dict, usage: dict | None, model: str) -> dict:
    more = {"usageMetadata": usage} if usage else {}
    return answer | more | {"modelVersion": model, "responseId": "fake-response"}


def thoughts_only(body: dict) -> dict:
    """A scripted answer whose thoughts used up all tokens: MAX_TOKENS, and no text."""
    thoughts = (body.get("generationConfig") or {}).get("maxOutputTokens") or 1000
    return response("", "MAX_TOKENS", usage_metadata(body, "", thoughts))


def usage_metadata(body: dict, text: str, thoughts: int = 0, cached: int = 0) -> dict:
    """Token counts; like Google's they leave out what is 0, and the thoughts count only in the total."""
    prompt = len(json.dumps([body.get("systemInstruction"), body.get("contents")])) // 4
    answer = len(pieces(text)) if text else 0
    counts = {
        "promptTokenCount": prompt,
        "candidatesTokenCount": answer,
        "totalTokenCount": prompt + answer + thoughts,
        "cachedContentTokenCount": cached,
        "thoughtsTokenCount": thoughts,
    }
    return {name: count for name, count in counts.items() if count}


def response_text(answer) -> str:
    """The text in a response or in a stream's elements."""
    if isinstance(answer, list):
        return "".join(map(response_text, answer))
    parts = [part for candidate in answer.get("candidates", []) for part in candidate["content"].get("parts", [])]
    return "".join(part.get("text", "") for part in parts)


def prompt_text(body: dict) -> str:
    """All text of a request: the system instruction, then the contents."""
    contents = [body.get("systemInstruction") or {}, *(body.get("contents") or [])]
    return "\n".join(part.get("text", "") for content in contents for part in content.get("parts", []))


# ---------------------------------------------------------------------------- models


def model_entry(name: str, methods: tuple = (*GENERATE, "countTokens"), **fields) -> dict:
    """A model as GET /v1beta/models has it."""
    return {
        "name": f"models/{name}",
        "version": "001",
        "displayName": name.replace("-", " ").title(),
        "description": f"The model {name}.",
        "inputTokenLimit": 1048576,
        "outputTokenLimit": 65536,
        "supportedGenerationMethods": list(methods),
        "temperature": 1,
        "topP": 0.95,
        "topK": 64,
        "maxTemperature": 2,
        "thinking": True,
    } | fields


MODELS = [
    model_entry("gemini-flash-latest"),
    model_entry("gemini-pro-latest"),
    model_entry("gemini-flash-lite-latest"),
    model_entry("gemini-embedding-001", ("embedContent",), inputTokenLimit=2048, outputTokenLimit=1, thinking=False),
]


# ---------------------------------------------------------------------------- what Gemini refuses


def refusals(body: dict | None):
    """The reasons why Gemini refuses a request, as its messages."""
    if not isinstance(body, dict):
        yield "Invalid JSON payload received. Unexpected token."
        return
    yield from content_refusals(body)
    yield from config_refusals(body.get("generationConfig") or {})
    yield from safety_refusals(body.get("safetySettings") or [])


def content_refusals(body: dict):
    contents = body.get("contents") or []
    if not contents:
        yield "* GenerateContentRequest.contents: contents is not specified\n"
        return
    roles = [content.get("role") or "user" for content in contents]  # Google reads a missing role as the user's
    if not set(roles) <= {"user", "model"}:
        yield "Please use a valid role: user, model."
    for number, content in enumerate(contents):
        yield from part_refusals(f"contents[{number}]", content)
    if "systemInstruction" in body:
        yield from part_refusals("system_instruction", body["systemInstruction"])
    if roles[-1] != "user":
        yield "Requests ending with a model turn are not supported."
    # Stricter than the real API, which takes equal roles one after another: older models refused them with this
    # message, and role-play reads worse when one side's turns are split up.
    if any(first == second for first, second in zip(roles, roles[1:], strict=False)):
        yield "Please ensure that multiturn requests alternate between user and model."


def part_refusals(where: str, content: dict):
    parts = content.get("parts") or []
    if not parts:
        yield f"* GenerateContentRequest.{where}.parts: contents.parts must not be empty.\n"
    for number, part in enumerate(parts):
        if not part:
            place = f"* GenerateContentRequest.{where}.parts[{number}].data"
            yield f"{place}: required oneof field 'data' must have one initialized field\n"
        elif part.get("text") == "":
            advice = "Add a value to the parameter and try again."
            yield f"Unable to submit request because it has an empty text parameter. {advice}"


RANGES = {
    "temperature": (0, 2),
    "topP": (0, 1),
    "topK": (1, 64),
    "maxOutputTokens": (1, float("inf")),
}


def config_refusals(config: dict):
    for name, (low, high) in RANGES.items():
        value = config.get(name)
        if value is not None and not low <= value <= high:
            yield f"* GenerateContentRequest.generation_config.{name}: {value} is not in the range [{low}, {high}].\n"
    stops = config.get("stopSequences") or []
    if len(stops) > 5:
        yield f"* GenerateContentRequest.generation_config.stop_sequences: {len(stops)} are more than 5.\n"
    if config.get("candidateCount", 1) != 1:
        yield "Multiple candidates is not enabled for this model"
    # Stricter than the real API too: that takes a penalty of 0.
    if {"presencePenalty", "frequencyPenalty"} & set(config):
        yield "Penalty is not enabled for this model"


def safety_refusals(settings: list[dict]):
    names = [safety_category(setting) for setting in settings]
    adjustable = ENUMS["category"][7:]  # the ones before are those of PaLM
    for number, name in enumerate(names):
        if name not in adjustable:
            place = f"* GenerateContentRequest.safety_settings[{number}]"
            yield f"{place}: element predicate failed: $.category in ({', '.join(adjustable)})\n"
    if len(set(names)) < len(names):
        yield "* GenerateContentRequest.safety_settings: duplicate safety settings for a category\n"


def safety_category(setting: dict) -> str:
    """The category's name: google-generativeai sends its number."""
    category = setting.get("category", 0)
    if isinstance(category, int):
        return ENUMS["category"][category] if category < len(ENUMS["category"]) else str(category)
    return category


# ---------------------------------------------------------------------------- the server


class Gemini(Upstream):
    """A recording Gemini API on a free port of 127.0.0.1; `url` is google-generativeai's api_endpoint.

    Steered and recorded like Upstream, with GEMINI_STEERING. The chats are the generate requests.
    """

    def __init__(self, port: int = 0, **steering):
        super().__init__(port)
        self.steer(**{**GEMINI_STEERING, **steering})
        self.httpd.RequestHandlerClass = GeminiHandler
        self.url = self.root

    def steer(self, **steering):
        """Set steering attributes."""
        if "answers" in steering:
            steering["answers"] = list(steering["answers"])  # used up here, not where it came from
        for name, value in steering.items():
            assert name in GEMINI_STEERING, name
            setattr(self, name, value)

    def reset(self):
        """Forget what was recorded and behave well again."""
        super().reset()
        self.steer(**GEMINI_STEERING)

    @property
    def chats(self) -> list[dict]:
        """The recorded generate requests, oldest first."""
        return [request for request in list(self.requests) if method_of(request["path"]) in GENERATE]

    def next_answer(self):
        """Take the next scripted answer; None where there is none."""
        with self.arrived:
            return self.answers.pop(0) if self.answers else None


def method_of(path: str) -> str:
    """What is asked of a model: what follows the colon in the path."""
    return urlsplit(path).path.rpartition(":")[2]


class GeminiHandler(Handler):
    """One connection to the fake Gemini."""

    def answer(self):
        upstream = self.server.upstream
        steering = {name: getattr(upstream, name) for name in GEMINI_STEERING}
        self.own_steering = steering  # Handler takes only the names that it knows, and takes them after this
        self.script = upstream.next_answer() if method_of(self.path) in GENERATE else None
        super().answer()

    def route(self, path: str):
        self.steering = self.own_steering
        if path in (self.steering["routes"] or {}):
            return super().route(path)
        found = re.fullmatch(f"/{API}/models(?:/([^/:]+)(?::([a-zA-Z]+))?)?", path)
        model, method = found.groups() if found else (None, None)
        if not found or (self.command == "POST") != (method in GENERATE):
            return self.send_plain(404, b"<html><title>Error 404 (Not Found)!!1</title></html>", "text/html")
        self.model, self.streams = model, method == "streamGenerateContent"
        if method and self.steering["hold"]:
            self.hold(self.steering["hold"])
        key = self.steering["key"]
        if key is not None and self.headers.get("x-goog-api-key") != key:
            return self.send_answer(api_key_invalid())
        return self.generate(self.request_record["body"]) if method else self.send_models(model)

    # -- models

    def entries(self) -> list[dict]:
        models = self.steering["models"]
        if not isinstance(models, list):
            return MODELS
        return [model_entry(entry) if isinstance(entry, str) else entry for entry in models]

    def entry(self, model: str) -> dict | None:
        return next((entry for entry in self.entries() if entry["name"] == f"models/{model}"), None)

    def send_models(self, model: str | None):
        models = self.steering["models"]
        if models is not None and not isinstance(models, list):
            return self.send_answer(models)
        if not model:
            return self.send_answer(self.page())
        missing = google_error(404, f"Model is not found: models/{model} for api version {API}")
        return self.send_answer(self.entry(model) or missing)

    def page(self) -> dict:
        """A page of the models; its token is the number of the first one."""
        entries, query = self.entries(), self.query()
        start = int(query.get("pageToken") or 0)
        end = start + (int(query.get("pageSize") or 0) or 50)
        return {"models": entries[start:end]} | ({"nextPageToken": str(end)} if end < len(entries) else {})

    def query(self) -> dict:
        return {name: values[-1] for name, values in parse_qs(urlsplit(self.path).query).items()}

    # -- generating

    def generate(self, body):
        entry = self.entry(self.model)
        if not entry or "generateContent" not in entry["supportedGenerationMethods"]:
            return self.send_answer(not_found(self.model))
        refusal = next(refusals(body), None)
        if refusal:
            return self.send_answer(invalid_argument(refusal))
        if self.script is not None:
            return self.send_answer(self.script)
        if self.steering["error"] is not None or self.steering["status"] not in (None, 200):
            return self.send_answer(self.steered_error())
        return self.send_generated(self.elements(body))

    def steered_error(self):
        """The error that `status` and `error` come to, with the status where that is said."""
        status, error = self.steering["status"], self.steering["error"]
        if not isinstance(error, (dict, bytes)):
            error = google_error(status or 500, error or "something went wrong")
        return (status, error) if status else error

    def send_answer(self, answer):
        """Send a scripted answer, an error or a list of models."""
        while callable(answer):
            answer = answer(self.request_record["body"])
        status, body = answer if isinstance(answer, tuple) else (None, answer)
        if isinstance(body, bytes):
            return self.send_plain(status or 500, body, "text/html")
        failed = isinstance(body, dict) and "error" in body
        status = status or (body["error"]["code"] if failed else 200)
        if status == 200 and not failed and method_of(self.path) in GENERATE:
            return self.send_generated(body if isinstance(body, list) else [body])
        # Errors of a stream are wrapped in an array, as its elements are.
        return self.send_plain(status, self.encoded([body] if self.streams and isinstance(body, dict) else body), JSON)

    def elements(self, body: dict) -> list[dict]:
        """What this request is answered: the elements of its stream, which may become one plain answer."""
        steering = self.steering
        if self.is_blocked(body):
            usage = self.usage(body, "")
            return [no_candidates(usage, self.model, steering["blocked"] or "PROHIBITED_CONTENT")]
        if steering["empty_candidates"]:
            return [no_candidates(self.usage(body, ""), self.model)]
        if self.only_thinks(body):
            usage = None if steering["no_usage"] else thoughts_only(body)["usageMetadata"]
            return [response("", self.finish_reason("MAX_TOKENS"), usage, self.model)]
        return self.text_elements(body)

    def is_blocked(self, body: dict) -> bool:
        matches = self.steering["blocked_if"]
        return bool(matches(body) if matches else self.steering["blocked"])

    def only_thinks(self, body: dict) -> bool:
        needed = self.steering["thoughts_only"]
        allowed = (body.get("generationConfig") or {}).get("maxOutputTokens") or float("inf")
        return needed is True or (needed is not None and allowed < needed)

    def finish_reason(self, reason):
        return None if self.steering["no_finish"] else reason

    def usage(self, body: dict, text: str) -> dict | None:
        if self.steering["no_usage"]:
            return None
        return usage_metadata(body, text, self.steering["thoughts"], self.steering["cached"])

    def text_elements(self, body: dict) -> list[dict]:
        """The reply: an element for each word of a stream, one for a plain answer; the last one says why it ends."""
        make, number = self.steering["reply"], next(self.server.upstream.counter)
        text = make(body) if make else f"Reply {number}: the story goes on, line {number}."
        words = pieces(text) if self.streams else [text]
        elements = []
        for count, word in enumerate(words, 1):
            finish = self.finish_reason(self.steering["finish"]) if count == len(words) else None
            usage = self.usage(body, "".join(words[:count]))
            elements.append(response(word, finish, usage, self.model))
            if self.steering["no_choices"] and self.streams:
                elements.append(no_candidates(usage, self.model))
        return elements

    # -- sending

    def encoded(self, value) -> bytes:
        """JSON as Google sends it: over many lines, enums as names or, where asked for, as numbers."""
        if "enum-encoding=int" in self.query().get("$alt", ""):
            value = numbered(value)
        return json.dumps(value, indent=2, ensure_ascii=False).encode()

    def send_generated(self, elements: list[dict]):
        """Send what was generated, plain or as a stream."""
        self.request_record["answer"] = response_text(elements)
        if self.streams:
            return self.send_array(elements)
        if self.steering["cut_after"] is not None:
            return self.cut()
        content = self.encoded(elements[0])
        if self.steering["garbage_after"] is not None:
            content = content[: len(content) // 2] + b"<html>Bad Gateway</html>"
        return self.send_plain(200, content, JSON)

    def send_array(self, elements: list[dict]):
        """Send a stream's elements one by one, and the end of their array."""
        self.send_response(200)
        self.send_header("Content-Type", JSON)
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        hold_count, hold_event = self.steering["hold_after"] or (None, None)
        for count, event in enumerate(self.array(elements)):
            if count == hold_count:
                self.hold(hold_event)
            if count == self.steering["cut_after"]:
                return self.cut()
            self.send_chunk(event)
        return self.wfile.write(b"0\r\n\r\n")

    def array(self, elements: list[dict]):
        """The pieces of a JSON array: each element with what separates it from the one before, then the end."""
        if self.steering["events"] is not None:
            yield from self.steering["events"]
            return
        for count, content in enumerate(self.spoilt(elements)):
            yield (b",\r\n" if count else b"[") + content
        if not self.steering["no_done"]:
            yield b"]"  # nothing after it: google-generativeai takes another byte for the start of something else

    def spoilt(self, elements: list[dict]):
        """The elements as bytes, with the garbage or the error that belongs among them."""
        error_count, error = self.steering["error_after"] or (None, None)
        for count, element in enumerate([*elements, None]):
            if count == self.steering["garbage_after"]:
                # Inside braces: google-generativeai skips whatever is between the elements.
                yield b'{"candidates": <html>Bad Gateway</html>}'
            if count == error_count:
                yield self.encoded(error)
                return
            if element is not None:
                yield self.encoded(element)

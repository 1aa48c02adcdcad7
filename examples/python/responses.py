"""Asks by the OpenAI Responses API, as openai-python does on the wire, and resumes where the connection broke.

    python3 responses.py http://127.0.0.1:8080/openai/v1 "Why is there a tide?"
"""
import http.client
import json
import sys
import time
import urllib.error
import urllib.request


def events(request):
    """The events of a response to a request. Raises when the connection breaks; an event that is not whole is not given."""
    with urllib.request.urlopen(request) as answer:
        data = []
        while (line := answer.readline()).endswith(b"\n"):
            text = line.decode().rstrip("\r\n")
            if text.startswith("data:"):
                data.append(text[5:].removeprefix(" "))
            elif text == "" and data:
                yield json.loads("\n".join(data))
                data = []
        if line:
            raise http.client.IncompleteRead(line)


def ask(base, question):
    """Yields the words of the answer."""
    headers = {"Content-Type": "application/json", "Authorization": "Bearer none"}
    body = json.dumps({"model": "demo", "input": question, "stream": True}).encode()
    request = urllib.request.Request(base + "/responses", body, headers)
    response, last = None, -1
    while True:
        try:
            for event in events(request):
                last = event["sequence_number"]
                response = response or event["response"]["id"]
                if event["type"] == "response.output_text.delta":
                    yield event["delta"]
                elif event["type"] == "response.completed":
                    return
                elif event["type"] in ("response.failed", "response.incomplete", "error"):
                    raise RuntimeError(event)
        except urllib.error.HTTPError as e:
            if e.code < 500:
                raise
            time.sleep(0.2)
        except (OSError, http.client.HTTPException):
            if response is None:
                raise
        if response is None:
            raise RuntimeError("it ended before it began")
        request = urllib.request.Request(f"{base}/responses/{response}?stream=true&starting_after={last}", headers=headers)


if __name__ == "__main__":
    for word in ask(sys.argv[1], sys.argv[2]):
        print(word, end="", flush=True)
    print()

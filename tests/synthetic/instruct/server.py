"""An OpenAI-compatible server on this machine that answers as it is told to: well, slowly, wrongly, or not at all."""

import json
import threading
import time
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

TALK = "Question: What is there?\nAnswer: A thing.\n\nQuestion: How many?\nAnswer: One."
DETAIL = "In the middle of a plain room stands one thing, and it fills most of what can be seen. Nothing moves here."
REASON = "Question: Why is it there?\nAnswer: Somebody has put it there, as things do not move by themselves."


def well(messages):
    """A good reply to each kind of request."""
    task = messages[0]["content"]
    return DETAIL if "paragraph" in task else TALK if "conversation" in task else REASON


class Server:
    """`behave(number, messages)` gives for each request what is done: a text, or ("status", 429, seconds), ("cut",),
    ("garbage",), ("slow", seconds, text). A request that comes again under its key gets what was paid for."""

    def __init__(self, behave):
        self.behave, self.lock = behave, threading.Lock()
        self.paid = Counter()  # answers made, by key
        self.times = []  # when requests came
        self.texts, self.requests, self.busy, self.most_busy = {}, [], 0, 0
        server = self

        class Handler(BaseHTTPRequestHandler):
            def log_message(self, *args):
                pass

            def do_POST(self):
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                with server.lock:
                    server.times.append(time.monotonic())
                    server.requests.append(body)
                    number = len(server.requests)
                    server.busy += 1
                    server.most_busy = max(server.most_busy, server.busy)
                try:
                    self.respond(number, body)
                except OSError:
                    pass  # the client is gone
                finally:
                    with server.lock:
                        server.busy -= 1

            def respond(self, number, body):
                key = self.headers["Idempotency-Key"]
                done = server.texts.get(key) or server.behave(number, body["messages"])
                if isinstance(done, tuple) and done[0] == "slow":
                    time.sleep(done[1])
                    done = done[2]
                if isinstance(done, str):
                    with server.lock:
                        if key not in server.texts:
                            server.texts[key] = done
                            server.paid[key] += 1
                    self.send(200, json.dumps(completion(done)))
                elif done[0] == "status":
                    wait = {} if done[2] is None else {"Retry-After": str(done[2])}
                    self.send(done[1], json.dumps({"error": {"message": "busy"}}), wait)
                elif done[0] == "garbage":
                    self.send(200, "<html>a proxy's page</html>")
                else:  # cut off in the middle
                    self.send_response(200)
                    self.send_header("Content-Length", "1000")
                    self.end_headers()
                    self.wfile.write(b'{"choices": [')
                    self.close_connection = True

            def send(self, status, text, headers=None):
                self.send_response(status)
                for name, value in {"Content-Type": "application/json", **(headers or {})}.items():
                    self.send_header(name, value)
                self.send_header("Content-Length", str(len(text)))
                self.end_headers()
                self.wfile.write(text.encode())

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.http.server_port}/v1"
        threading.Thread(target=self.http.serve_forever, daemon=True).start()

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.http.shutdown()
        self.http.server_close()


def completion(text):
    message = {"role": "assistant", "content": text}
    choice = {"index": 0, "message": message, "finish_reason": "stop"}
    usage = {"prompt_tokens": 100, "completion_tokens": 20, "total_tokens": 120}
    return {"id": "1", "object": "chat.completion", "created": 0, "model": "m", "choices": [choice], "usage": usage}
